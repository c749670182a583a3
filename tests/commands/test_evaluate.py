"""The command's modes: one of them, with its own options and no others; and commands that need the network parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_md.cli import build_parser, main
from megatron_md.commands.evaluate_options import DEFAULTS, settings_of, settle

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "give one of --nelbo DATA, --tasks NAMES and --generative"),
        (["--nelbo", "a", "--generative"], "give one of --nelbo DATA"),
        (["--tasks", "a", "--stderr", "0.1"], "--stderr belongs to --nelbo, not to --tasks"),
        (["--nelbo", "a", "--words", "--judge", "b"], "--judge belongs to --generative, not to --nelbo"),
        (["--generative", "--lines"], "--lines belongs to --nelbo, not to --generative"),
        (["--nelbo", "a", "--steps", "8"], "--steps belongs to --tasks or --generative, not to --nelbo"),
        (["--tasks", "a", "--limit", "0"], "--limit 0: must be positive"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1: must be 0 at least"),
        (["--tasks", "a", "--seeds", "1,2,1"], "--seeds 1,2,1: one is there twice"),
        (["--tasks", "a", "--steps", "8,16"], "--steps: tasks take one value, not 2"),
        (["--tasks", "a", "--template", "llada"], "--template needs --apply-chat-template"),
        (["--tasks", "a", "--fewshot-as-multiturn"], "--fewshot-as-multiturn needs --apply-chat-template"),
        (["--nelbo", "a", "--cfg", "1"], "--guidance belongs to --tasks, not to --nelbo"),
        (["--generative", "--state", "a"], "--state belongs to --nelbo or --tasks, not to --generative"),
        (["--generative"], "--generative needs --judge RUN_AR"),
    ],
)
def test_options_of_other_modes_are_refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nowhere", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps", "a"], ["--seeds", "x"]])
def test_lists_of_numbers_are_checked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "nowhere", "--tasks", "a", *words])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_defaults_are_those_of_the_mode() -> None:
    parse = build_parser("evaluate").parse_args
    args = parse(["evaluate", "run", "--tasks", "a,b"])
    assert settle(args) == "tasks"
    assert (args.strategy, args.draws, args.seeds, args.temperature) == ("low_confidence", 128, [0], None)
    assert not (args.apply_chat_template or args.confidence_eos_eot_inf or args.logits_eos_inf) and args.guidance == 0.0
    args = parse(["evaluate", "run", "--generative", "--temperatures", "0.5,1", "--judge", "ar"])
    assert settle(args) == "generative"
    assert (args.strategy, args.samples, args.temperatures) == ("ancestral", 64, [0.5, 1.0])
    args = parse(["evaluate", "run", "--nelbo", "a", "--passes", "5"])
    assert (
        settle(args) == "nelbo"
        and settings_of(args, "nelbo")["max_passes"] == 100
        and (args.passes, args.max_passes, args.words) == (5, 100, False)
    )
    assert args.draws is None


def test_a_folder_of_hugging_face_is_to_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    assert main(["evaluate", str(tmp_path), "--nelbo", str(tmp_path / "a.txt")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"a folder of Hugging Face; convert it first: megatron-md convert {tmp_path} runs/{tmp_path.name}" in line


def documented() -> list[str]:
    """The commands of the page's text blocks, which need the network or a GPU."""
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "megatron-md evaluate" in line or "-m megatron_md evaluate" in line]


def test_documented_commands_parse() -> None:
    found = documented()
    assert len(found) >= 8
    names = set()
    for command in found:
        words = shlex.split(command)
        args, rest = build_parser("evaluate").parse_known_args(words[words.index("evaluate") :])
        assert rest == [], command
        assert settle(args) in DEFAULTS
        names |= set((args.tasks or "").split(","))
    assert {"hellaswag", "arc_easy", "arc_challenge", "mmlu", "gpqa_main_n_shot", "gsm8k", "minerva_math"} <= names
