"""Settings of a harness' requests: under our names and LLaDA's, and what they make of estimator and sampler."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_md.evaluate.answer_settings import HarnessSettings


def test_llada_instructs_published_settings_can_be_said() -> None:
    # GSM8K of LLaDA-8B-Instruct in its EVAL.md, and HumanEval.
    gsm8k = HarnessSettings.of(
        {"gen_length": 512, "steps": 512, "block_length": 512, "confidence_eos_eot_inf": True, "cfg": 0.5}
    )
    sampler = gsm8k.sampler({"max_gen_toks": 64, "until": ["Question:"]}, 4096)
    assert (sampler.length, sampler.total_steps, sampler.block_size, sampler.blocks) == (512, 512, 512, 1)
    assert sampler.confidence_eos_eot_inf and (sampler.eos, sampler.guidance) == ("stop", 0.5)
    assert gsm8k.estimator(causal=False).guidance == 0.5
    humaneval = HarnessSettings.of({"gen_length": 512, "logits_eos_inf": True}).sampler({}, 4096)
    assert humaneval.eos == "suppress" and not humaneval.confidence_eos_eot_inf
    likelihood = HarnessSettings.of({"mc_num": 128, "remasking": "random"})
    assert (likelihood.draws, likelihood.strategy) == (128, "random")
    assert likelihood.estimator(causal=False).minibatch == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": 3}, "model_args: unknown draw"),
        ({"cfg": 1.0, "guidance": 1.0}, "model_args: guidance is there twice, under two names"),
        ({"mc_num": 1, "draws": 1}, "model_args: draws is there twice"),
    ],
    ids=str,
)
def test_unknown_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessSettings.of(arguments)


def test_a_canvas_must_leave_room_for_the_prompt() -> None:
    settings = HarnessSettings(block=4)
    assert settings.sampler({"max_gen_toks": 9}, 32).length == 12
    with pytest.raises(ValueError, match="256 tokens to generate leave no room for a prompt in the model's 32"):
        settings.sampler({}, 32)
    sampled = HarnessSettings().sampler({"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9}, 32)
    assert (sampled.temperature, sampled.top_p) == (0.7, 0.9)


def test_a_causal_run_is_not_guided() -> None:
    with pytest.raises(ValueError, match="a causal one is scored exactly; leave guidance out"):
        HarnessSettings(guidance=1.0).estimator(causal=True)
