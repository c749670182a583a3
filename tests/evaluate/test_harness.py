"""The model behind lm-evaluation-harness: exact where it can be, the same on every layout, text that ends rightly."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluate.test_likelihood import evaluate
from tests.ranks import run_ranks

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-harness")

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GENERATE = """doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """group: tiny
task: [tiny_choice, tiny_generate]
aggregate_metric_list:
  - {metric: acc, filter_list: none}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three local tasks and a group of two."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [
        {"question": f"def name_{number}(x):", "choices": ["return x", "x = 1", "pass"], "answer": number % 3}
        for number in range(4)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, kind, rest in (
        ("choice", "multiple_choice", CHOICE),
        ("rolling", "loglikelihood_rolling", ROLLING),
        ("generate", "generate_until", GENERATE),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"tiny_{name}", file=data, kind=kind) + rest)
    (folder / "group.yaml").write_text(GROUP)
    return folder


def request(kind: str, *arguments: Any, doc: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", doc, 1))


def answers(run: Path, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    """On a rank: what a run says to some requests."""
    from megatron_md.evaluate.harness import HarnessModel

    model = HarnessModel(run, tensor=tensor, pipeline=pipeline, draws=8, batch_size=3, device="cpu")
    choices = [("def f(x):", " return x"), ("def f(x):", " pass"), ("import os\n" * 30, " y = x + 1")]
    texts = ["def f(x):\n    return x\n", "x = 1\n" * 30, ""]
    ways = [{"max_gen_toks": 6}, {"max_gen_toks": 6, "until": "e"}, {"max_gen_toks": 12, "until": ["zzz"]}]
    return {
        "likelihoods": model.loglikelihood(
            [request("loglikelihood", *pair, doc=at // 2) for at, pair in enumerate(choices)]
        ),
        "rolling": model.loglikelihood_rolling(
            [request("loglikelihood_rolling", text, doc=at) for at, text in enumerate(texts)]
        ),
        "texts": model.generate_until(
            [request("generate_until", context, way) for context in ("x = ", "", "def f(") for way in ways]
        ),
        "passes": model.forward_passes,
        "shortened": model.shortened,
    }


@pytest.mark.distributed
def test_answers_are_the_same_on_every_layout(trained: Path) -> None:
    (one,) = run_ranks(answers, 1, trained / "run")
    assert [greedy for _, greedy in one["likelihoods"]] == [False] * 3 and one["rolling"][2] == 0.0
    # The third question has one continuation: greedy decoding is tried; its prompt did not fit.
    assert one["shortened"] == 1 and len(one["texts"]) == 9 and any(one["texts"])
    assert all("e" not in text for text in one["texts"][1::3])
    for tensor, pipeline in ((2, 1), (1, 1), (1, 2)):
        for found in run_ranks(answers, 2, trained / "run", tensor, pipeline):
            for key in ("likelihoods", "rolling"):
                torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(one[key]), rtol=1e-5, atol=0.0)
            assert {key: found[key] for key in ("texts", "passes", "shortened")} == {
                key: one[key] for key in ("texts", "passes", "shortened")
            }, (tensor, pipeline)


def exactness(causal: Path, denoiser: Path) -> None:
    """On a rank: likelihoods against the logits that they are made of."""
    from megatron_md.evaluate.answerer import Likelihood
    from megatron_md.evaluate.harness import HarnessModel

    model = HarnessModel(causal, device="cpu")
    context, text = "def f(x):", "\n    return x + 1\n"
    prompt, answer = model._encode(context, text)
    tokens = torch.tensor([[*prompt, *answer]])
    logp_LV = model.model(tokens)[0].log_softmax(dim=-1)
    expected = sum(logp_LV[at, token].item() for at, token in enumerate(tokens[0].tolist()) if at >= len(prompt))
    ((found, _),) = model.loglikelihood([request("loglikelihood", context, text)])
    assert found == pytest.approx(expected, rel=1e-5)
    # The exact log-likelihood of a whole text is that of its parts, and long ones go in windows.
    whole = context + text
    assert model._encode_pair(context, text) == (prompt, answer)
    ((start, _),) = model.loglikelihood([request("loglikelihood", "", context)])
    assert model.loglikelihood_rolling([request("loglikelihood_rolling", whole)])[0] == pytest.approx(
        start + found, rel=1e-5
    )
    long = model.tok_encode(whole * 4)
    assert len(long) > model.max_length == 32
    pieces = [long[at : at + 32] for at in range(0, len(long), 32)]
    logs = [model.model(torch.tensor([piece]))[0].log_softmax(dim=-1) for piece in pieces]
    expected = sum(
        log_LV[at, token].item() for log_LV, piece in zip(logs, pieces, strict=True) for at, token in enumerate(piece)
    )
    assert model.loglikelihood_rolling([request("loglikelihood_rolling", whole * 4)])[0] == pytest.approx(
        expected, rel=1e-5
    )
    # What greedy decoding gives is recognised, and nothing else.
    filled = torch.tensor([prompt])
    for _ in range(3):
        logits_LV = model.model(torch.cat([filled, torch.zeros(1, 1, dtype=torch.int64)], dim=1))[0]
        filled = torch.cat([filled, logits_LV[-1].argmax().reshape(1, 1)], dim=1)
    greedy = filled[0, len(prompt) :].tolist()
    asked = [Likelihood(prompt, answer, 0, True) for answer in (greedy, [*greedy[:2], (greedy[2] + 1) % 300])]
    found = model.answerer.likelihoods(asked, model.settings.estimator(causal=True))
    assert [(answer.is_greedy, answer.forward_passes) for answer in found] == [(True, 1 + 3), (False, 1 + 3)]
    _one_token(denoiser, model.world)


def _one_token(denoiser: Path, world: Any) -> None:
    """An answer of one token is scored exactly, with one draw, by a masked model too."""
    from megatron_md.evaluate.harness import HarnessModel

    model = HarnessModel(denoiser, world=world, device="cpu", method="left_to_right")
    prompt, answer = model._encode("def f(x)", ":")
    assert len(answer) == 1
    logp_LV = model.model(torch.tensor([[*prompt, model.words.mask_token_id]]))[0].log_softmax(dim=-1)
    before = model.forward_passes
    ((found, greedy),) = model.loglikelihood([request("loglikelihood", "def f(x)", ":")])
    assert found == pytest.approx(logp_LV[-1, answer[0]].item(), rel=1e-5)
    assert greedy == (int(logp_LV[-1].argmax()) == answer[0]) and model.forward_passes == before + 2


@pytest.mark.distributed
def test_likelihoods_are_those_of_the_logits(trained: Path) -> None:
    run_ranks(exactness, 1, trained / "causal", trained / "run")


@pytest.mark.distributed
def test_tasks_give_the_same_figures_on_two_processes(trained: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["--tasks", "tiny,tiny_rolling", "--include-path", str(tasks), "--draws", "8", "--seeds", "1,2"]
    found = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        code = run_ranks(evaluate, ranks, str(trained / "run"), *words, "--json", str(output))
        assert code == [0] * ranks
        found.append(json.loads(output.read_text()))
    one, two = found
    assert one["forward_passes"] == two["forward_passes"] and one["settings"]["draws"] == 8
    assert one["tasks"].keys() == {"tiny", "tiny_choice", "tiny_generate", "tiny_rolling"}
    for task, figures in one["tasks"].items():
        for name, metric in figures["metrics"].items():
            assert two["tasks"][task]["metrics"][name]["seeds"] == pytest.approx(metric["seeds"], rel=1e-5)
        assert two["tasks"][task]["flips"] == figures["flips"]
    choice = one["tasks"]["tiny_choice"]
    assert choice["metrics"].keys() == {"acc,none", "acc_norm,none"} and choice["flips"]["none"]["questions"] == 4
    assert one["tasks"]["tiny"]["flips"]["none"]["questions"] == 8 and one["tasks"]["tiny_rolling"]["flips"] == {}
    bits = one["tasks"]["tiny_rolling"]["metrics"]["bits_per_byte,none"]
    assert bits["mean"] > 1.0 and bits["spread"] > 0.0


@pytest.mark.distributed
def test_a_causal_run_needs_no_draws_and_never_flips(trained: Path, tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "causal.json"
    words = ["--tasks", "tiny_choice", "--include-path", str(tasks), "--seeds", "1,2", "--json", str(output)]
    assert run_ranks(evaluate, 1, str(trained / "causal"), *words) == [0]
    found = json.loads(output.read_text())
    assert found["settings"]["method"] == "autoregressive" and found["forward_passes"] == 2 * 4 * 3
    assert found["tasks"]["tiny_choice"]["flips"]["none"] == {"flip_rate": 0.0, "changed": 0.0, "questions": 4}


def dialogues(run: Path) -> None:
    """On a rank: contexts that the harness renders as dialogues."""
    from megatron_md.data.entries import Message
    from megatron_md.evaluate.harness import HarnessModel

    model = HarnessModel(run, device="cpu", draws=8, template="plain", confidence_eos_eot_inf=True)
    assert "generation" in model.chat_template(True) and model.chat_template(False) == ""
    history = [{"role": "user", "content": "x<eos>"}]
    text = model.apply_chat_template(history)
    template = model._template
    expected = template.encode(model.words, [Message("user", "x<eos>")], add_generation_prompt=True)
    assert text == expected.text == "User:\nx<eos>\nAssistant:\n"
    # What the question spells is no special token, though the harness hands its text back.
    assert model.tok_encode(text) == expected.tokens.tolist()
    assert model.words.eos_token_id not in model.tok_encode(text)
    prompt, answer = model._encode(text, "y")
    assert prompt == expected.tokens.tolist() and answer == model.tok_encode("y")
    # The beginning of an answer stands behind the question.
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "so"}], add_generation_prompt=False)
    assert begun == text + "so" and model.tok_encode(begun) == [*prompt, *model.tok_encode("so")]
    assert model._eot_token_ids == (model.words.eos_token_id,)
    with pytest.raises(ValueError, match="choose one by the model argument template"):
        model.chat_template("other")
    ((value, _),) = model.loglikelihood([request("loglikelihood", text, "y")])
    assert value < 0.0 and model.shortened == 0


@pytest.mark.distributed
def test_contexts_may_be_dialogues(trained: Path) -> None:
    run_ranks(dialogues, 1, trained / "run")


@pytest.mark.distributed
def test_tasks_are_put_as_dialogues_and_go_on_from_their_answers(trained: Path, tasks: Path, tmp_path: Path) -> None:
    state, output = tmp_path / "answers.jsonl", tmp_path / "tasks.json"
    words = [str(trained / "run"), "--tasks", "tiny", "--include-path", str(tasks), "--draws", "32", "--cfg", "0.5"]
    words += ["--state", str(state), "--json", str(output), "--apply-chat-template", "--template", "plain"]
    words += ["--length", "4", "--num-fewshot", "0", "--fewshot-as-multiturn"]
    assert run_ranks(evaluate, 1, *words) == [0]
    one, lines = json.loads(output.read_text()), state.read_text().splitlines()
    assert len(lines) == 1 + 4 * 3 + 4 and one["settings"]["guidance"] == 0.5
    assert one["tasks"]["tiny_choice"]["half_flips"]["questions"] == 4
    card = json.loads((tmp_path / "tasks.card.json").read_text())
    assert card["versions"]["lm-eval"] and card["results"] == one and card["settings"]["template"] == "plain"
    # As if it had been killed within a line: the same figures, and only the rest is answered again.
    state.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    assert run_ranks(evaluate, 1, *words) == [0]
    assert state.read_text().splitlines()[:9] == lines[:9] and len(state.read_text().splitlines()) == len(lines)
    two = json.loads(output.read_text())
    assert two["tasks"] == one["tasks"] and two["forward_passes"] == one["forward_passes"]


def refusal(*words: str) -> str:
    """On a rank: what the command says when it refuses."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert evaluate(*words) == 2
    return errors.getvalue()


@pytest.mark.distributed
def test_answers_of_other_settings_are_refused(trained: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["--tasks", "tiny_choice", "--include-path", str(tasks), "--draws", "8", "--state", str(tmp_path / "a")]
    assert run_ranks(evaluate, 1, str(trained / "run"), *words) == [0]
    (told,) = run_ranks(refusal, 1, str(trained / "run"), *words, "--cfg", "1")
    (line,) = told.splitlines()
    assert "a: holds answers of guidance 0.0, not 1.0; remove it to start anew, or name another file" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draw": 3}, "model_args: unknown draw"),
        ({"strategy": "guess"}, "unknown sampling strategy 'guess'"),
        ({"method": "guess"}, "method 'guess': unknown; use monte_carlo or left_to_right"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, trained: Path) -> None:
    from megatron_md.evaluate.harness import HarnessModel

    with pytest.raises(ValueError, match=message):
        HarnessModel(trained / "run", device="cpu", **settings)


def test_bad_tasks_are_refused_in_one_line(trained: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tasks / "lost.yaml").write_text(TASK.format(name="tiny_lost", file="nowhere.jsonl", kind="multiple_choice"))
    for name, text in (
        ("tiny_lost", "--tasks tiny_lost: cannot be loaded"),
        ("tiny,tiny_choice", "--tasks tiny_choice: tiny_choice is part of another one"),
        (",", "give names of tasks"),
    ):
        assert evaluate(str(trained / "run"), "--tasks", name, "--include-path", str(tasks)) == 2
        assert text in capsys.readouterr().err.splitlines()[-1]
    assert evaluate(str(trained / "run"), "--tasks", "a", "--include-path", str(tasks / "no")) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_task_gets_the_nearest_name(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(str(trained / "run"), "--tasks", "helaswag") == 2
    assert "--tasks helaswag: unknown to lm-eval; did you mean hellaswag?" in capsys.readouterr().err
