"""Configs of parity runs: what is refused, in which words, before torch is imported."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config.loader import ConfigError
from megatron_md.parity.config import check_parity, load_parity_config, training_config
from tests.parity.parity_config import small

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"k": 7}}, "task.k 7 is above task.n 6: only 6 bits can be secret"),
        ({"task": {"train_samples": 65}}, "task.train_samples 65 is more than there are inputs of 6 bits, 64"),
        ({"task": {"train_samples": 50}}, "leaves 14 of the 64 inputs of 6 bits, fewer than task.valid_samples 24"),
        ({"task": {"train_samples": None, "valid_samples": 64}}, "leaves no input of 6 bits to train on"),
        ({"objective": {"mask_schedule": "uniform:0.6,0.2"}}, "objective.mask_schedule: .*lo must be below hi"),
        ({"objective": {"mask_schedule": "uniform:-0.1,0.2"}}, r"the window must lie in \[0, 1\]"),
        ({"objective": {"mask_schedule": "uniform:0,2"}}, r"the window must lie in \[0, 1\]"),
        ({"objective": {"mask_schedule": "uniform:0.2,0.2"}}, "one fixed rate: point:0.2"),
        ({"objective": {"mask_schedule": "unifrom:0,1"}}, "did you mean 'uniform'"),
        ({"objective": {"name": "direct"}}, "objective.name 'direct' is unknown"),
        ({"objective": {"name": "autoregressive"}}, "use direct_supervision"),
        ({"objective": {"mask_logit": "keep"}}, "exactly two tokens"),
        ({"model": {"vocab": 9}}, "model.vocab: the task decides it"),
        ({"model": {"preset": "tiny"}}, "model.preset: presets are for language models"),
        ({"model": {"heads": 3}}, "model.heads 3 does not divide model.hidden 16"),
        ({"train": {"global_batch_size": 18}}, "train.global_batch_size 18 is no multiple of 4"),
        ({"accuracy": {"every_steps": 5}, "log": {"every_steps": 2}}, "5 is no multiple of log.every_steps 2"),
        ({"parallel": {"tensor": 2}}, "the layout needs 2 processes"),
        ({"parallel": {"context": 2}}, r"parallel.context 2 does not divide task.n \+ 1 = 7"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parity(small(**sections))


def test_several_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_parity(small(task={"k": 7}, model={"heads": 3}, objective={"mask_logit": "keep"}))
    assert len(caught.value.lines) == 3


def test_uniform_attention_runs_in_one_process_on_the_cpu() -> None:
    check_parity(small(denoiser="uniform_attention"))
    with pytest.raises(ConfigError, match="one process, not 2"):
        check_parity(small(denoiser="uniform_attention"), 2)
    with pytest.raises(ConfigError, match=r"set train\.device=cpu"):
        check_parity(small(denoiser="uniform_attention", train={"device": "cuda"}))


def test_direct_supervision_is_an_objective_of_parity_runs() -> None:
    check_parity(small(objective={"name": "direct_supervision", "options": {"mask_inputs": True}}))


def test_unknown_keys_and_wrong_bounds_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "parity.yaml"
    file.write_text("task: {n: 10, samples: 200}\n")
    with pytest.raises(ConfigError, match=r"unknown key task\.samples"):
        load_parity_config(file)
    file.write_text("task: {n: 10}\n")
    with pytest.raises(ConfigError, match=r"command line: task\.n must be whole number >= 1 <= 62, got 63"):
        load_parity_config(file, ["task.n=63"])


def test_the_task_decides_vocabulary_and_length() -> None:
    config = training_config(small(task={"n": 12, "k": 3}))
    assert (config.model.vocab, config.model.max_length, config.data.seq_length) == (3, 13, 13)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples/parity").glob("*.yaml")))
def test_examples_can_be_run(name: str, tmp_path: Path) -> None:
    from megatron_md.parity.sweep import runs_of

    config = load_parity_config(ROOT / "examples/parity" / name, [f"run_dir={tmp_path}"])
    count = math.prod(len(part) for part in (config.sweep.arms, config.sweep.seeds, *config.sweep.grid.values()))
    assert len({run.config.run_dir for run in runs_of(config)}) == count > 1


def test_refusal_takes_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "parity.yaml"
    file.write_text("task: {n: 3, k: 4, train_samples: 4, valid_samples: 4}\n")
    code = (
        "import sys\nfrom megatron_md.cli import main\n"
        f"code = main(['parity', 'run', {str(file)!r}])\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"megatron-md: {file}: task.k 4 is above task.n 3: only 3 bits can be secret\n"
