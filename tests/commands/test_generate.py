"""The command: alike on every layout and in every batch, infilling, typed prompts, a terminal, refusals by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.data.tokenizer import Tokenizer
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config

# None is empty: without a given token all positions are tied, and rounding decides which one a step commits.
PROMPTS = ["def f(", "value = ", "def g(", "x", "    return alpha"]


@pytest.fixture(scope="module")
def varied(trained: Path) -> Path:
    """A run with about the weights that were drawn: its greedy texts depend on the prompt, unlike after a few steps."""
    keys: dict[str, Any] = {"model": {"tied": False, "init_std": 0.1}, "optimizer": {"lr": 1e-9}}
    run_ranks(pretrain, 1, run_config(trained, "varied", **keys))
    return trained / "varied"


@pytest.fixture(scope="module")
def prompts(trained: Path) -> Path:
    path = trained / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def generate(*calls: list[str], typed: str = "", command: str = "generate") -> list[int]:
    """Several calls in one process, whose standard input is `typed`."""
    sys.stdin = io.StringIO(typed)
    return [main([command, *words]) for words in calls]


def texts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.distributed
def test_greedy_texts_are_the_same_on_every_layout_and_in_every_batch(
    trained: Path, varied: Path, prompts: Path
) -> None:
    output = trained / "texts.jsonl"
    words = [str(varied), "--prompts-file", str(prompts), "--length", "12", "--steps", "6"]
    words += ["--device", "cpu", "--output"]
    alone = trained / "alone.jsonl"
    assert run_ranks(generate, 1, [*words, str(output)], [*words, str(alone), "--batch-size", "1"]) == [[0, 0]]
    one = texts(output)
    tokenizer = Tokenizer(trained / "tokenizer.model")
    assert [text["prompt"] for text in one] == PROMPTS
    assert len({text["text"] for text in one}) == len(PROMPTS)  # so that a wrong order would be seen
    for text in one:
        assert text.keys() == {"prompt", "text", "seed", "tokens", "forward_passes", "steps", "seconds"}
        assert tokenizer.decode(text["tokens"]) == text["text"]
        assert (len(text["tokens"]), text["steps"], text["forward_passes"]) == (12, 6, 6)
    others = [texts(alone)]
    for split in ((), ("--pipeline", "2"), ("--tensor", "1")):  # tensor-, pipeline- and data-parallel
        assert run_ranks(generate, 2, [*words, str(output), *split]) == [[0], [0]]
        others.append(texts(output))
    for other in others:
        assert [text["tokens"] for text in other] == [text["tokens"] for text in one]


@pytest.mark.distributed
def test_samples_options_infilling_and_replay(trained: Path) -> None:
    run, output = str(trained / "run"), trained / "o.jsonl"
    given = 'def f([[3]]):\n    return "[[4]]"'
    page = trained / "trace.html"
    calls = {
        "samples": ["--length", "8", "--samples", "3", "--temperature", "1", "--top-p", "0.9", "--seed", "5"],
        "threshold": ["--length", "8", "--strategy", "threshold", "--threshold", "0.000001", "--steps", "8"],
        "guidance": ["--length", "8", "--steps", "4", "--guidance", "2", "--prompt", "def f(", "--eos", "suppress"],
        "infill": ["--infill", "--prompt", given, "--save-trace", str(page)],
        "ancestral": ["--infill", "--prompt", given, "--strategy", "ancestral", "--temperature", "1"],
    }
    words = [[run, "--device", "cpu", "--output", f"{output}.{name}", *words] for name, words in calls.items()]
    assert run_ranks(generate, 1, *words) == [[0] * len(calls)]
    found = {name: texts(Path(f"{output}.{name}")) for name in calls}
    assert [text["seed"] for text in found["samples"]] == [5, 6, 7]
    assert len({text["text"] for text in found["samples"]}) > 1
    assert found["threshold"][0]["steps"] == 1  # everything is above it
    assert found["guidance"][0]["forward_passes"] == 8
    (filled,) = found["infill"]
    tokenizer = Tokenizer(trained / "tokenizer.model")
    parts = [tokenizer.encode(part).tolist() for part in ("def f(", '):\n    return "', '"')]
    middle, end = len(parts[0]) + 3, len(filled["tokens"]) - len(parts[2])
    assert filled["tokens"][: len(parts[0])] == parts[0] and filled["tokens"][end:] == parts[2]
    assert filled["tokens"][middle : middle + len(parts[1])] == parts[1] and end == middle + len(parts[1]) + 4
    assert tokenizer.mask_token_id not in filled["tokens"] and filled["steps"] == 7
    assert tokenizer.decode(filled["tokens"]) == filled["text"]
    assert found["ancestral"][0]["steps"] <= 7  # one per open token, not per token of the canvas
    assert '"steps": "7, 7 forward passes"' in page.read_text()


def type_on_each_rank(words: list[str]) -> list[int]:
    return generate(words, typed="def f(\n" + "long " * 99 + "\nvalue = \n\nnever\n")


@pytest.mark.distributed
def test_typed_prompts_reach_every_rank_and_a_bad_one_ends_nothing(trained: Path) -> None:
    output = trained / "typed.jsonl"
    words = [str(trained / "run"), "--interactive", "--length", "4", "--device", "cpu", "--output", str(output)]
    assert run_ranks(type_on_each_rank, 2, [*words, "--pipeline", "2"]) == [[0], [0]]
    assert [text["prompt"] for text in texts(output)] == ["def f(", "value = "]


def on_terminal(words: list[str], environment: dict[str, str], command: str = "generate", typed: str = "") -> str:
    """What a terminal gets."""
    os.environ.update({"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment})
    leader, follower = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while b"\0" not in b"".join(shown[-1:]):
            shown.append(os.read(leader, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as sys.stdout:
        assert generate(words, command=command, typed=typed) == [0]
        sys.stdout.write("\0")
        sys.stdout.flush()
        reader.join()
    sys.stdout = sys.__stdout__
    return b"".join(shown).decode()


@pytest.mark.distributed
def test_a_terminal_sees_the_steps_unless_it_shows_no_colours(trained: Path) -> None:
    words = [str(trained / "run"), "--prompt", "def f(", "--length", "6", "--steps", "3", "--device", "cpu"]
    (shown,) = run_ranks(on_terminal, 1, words, {})
    assert "step 3 of 3" in shown and "\x1b[" in shown and shown.count("def f(") >= 1
    (plain,) = run_ranks(on_terminal, 1, words, {"NO_COLOR": "1"})
    assert "\x1b[" not in plain and "step 3 of 3" not in plain and plain.count("def f(") == 1


@pytest.mark.distributed
def test_a_text_commands_no_terminal_but_a_file_has_it_as_it_is(trained: Path) -> None:
    output = trained / "hostile.jsonl"
    words = [str(trained / "run"), "--prompt", "a\x1b]0;b\x07\u202e", "--length", "6", "--device", "cpu"]
    (shown,) = run_ranks(on_terminal, 1, [*words, "--output", str(output)], {"NO_COLOR": "1"})
    assert r"a\x1b]0;b\x07\u202e" in shown and not {"\x1b", "\x07", "\u202e"} & set(shown)
    (piped,) = run_ranks(in_pipe, 1, words)
    assert piped.startswith("a\x1b]0;b\x07\u202e") and texts(output)[0]["prompt"] == "a\x1b]0;b\x07\u202e"


def in_pipe(words: list[str]) -> str:
    """What a pipe gets."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert generate(words) == [0]
    return output.getvalue()


@pytest.mark.distributed
def test_a_causal_run_writes_from_left_to_right(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained / "causal.jsonl"
    words = [str(trained / "causal"), "--prompt", "def f(", "--length", "6", "--device", "cpu"]
    assert run_ranks(generate, 1, [*words, "--output", str(output)]) == [[0]]
    assert texts(output)[0]["forward_passes"] == 6
    assert main(["generate", *words, "--steps", "3"]) == 2
    assert "a causal model writes one token after the other; leave --steps out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x " * 40], "--prompt: the prompt's"),
        (["--length", "33"], "exceed the model's 32 positions"),
        (["--length", "8", "--block", "4", "--steps", "5"], "steps 5 is not a multiple of the 2 blocks"),
        (["--length", "8", "--block", "16"], "block 16 is longer than length 8"),
        (["--length", "0"], "length must be at least 1"),
        (["--length", "8", "--strategy", "low_confidense"], "did you mean 'low_confidence'"),
        (
            ["--length", "8", "--strategy", "random", "--threshold", "0.5"],
            "--threshold belongs to --strategy threshold",
        ),
        (["--length", "8", "--top-p", "0.5"], "top_p 0.5 changes nothing at temperature 0"),
        (["--length", "8", "--guidance", "1"], "--guidance needs a prompt"),
        (["--infill"], "--infill needs a prompt with placeholders"),
        (["--infill", "--prompt", "x = "], "--prompt: no placeholder to fill in"),
        (["--infill", "--prompt", "x = [[40]]"], "exceed the model's 32 positions"),
        (["--infill", "--prompt", "[[4]]", "--guidance", "1"], "--guidance needs given text"),
        (["--infill", "--prompt", "x = [[4]]", "--block", "2"], "--block does not go with --infill"),
        (["--infill", "--prompt", "x = [[4]]", "--length", "2"], "--length does not go with --infill"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--output", "nowhere/x.jsonl"], "the folder nowhere does not exist"),
        (["--save-trace", "nowhere/x.html"], "the folder nowhere does not exist"),
        (["--save-trace", "."], "is a folder: name a file"),
        (["--save-trace", "x.html", "--samples", "2"], "--save-trace replays one text"),
        (["--save-trace", "x.html", "--interactive"], "--save-trace replays one text"),
        (["--save-trace", "x", "--output", "x"], "--output and --save-trace are both x"),
        (["--chat"], "--chat needs a message: --prompt, --prompts-file or --interactive"),
        (["--chat", "--infill", "--prompt", "[[4]]"], "--infill fills in a text, --chat answers it: leave one out"),
        (["--prompt", "x", "--template", "plain"], "--template belongs to --chat"),
        (["--prompt", "x", "--system", "y"], "--system belongs to --chat"),
        (["--chat", "--prompt", "x"], "holds no chat template; choose one by --template"),
        (["--chat", "--template", "plain", "--prompt", "x " * 40], "--prompt: the prompt's"),
        (["--length", "8", "--tensor", "2"], "does not divide the 1 processes"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    words: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr("megatron_md.parallel.initialize", lambda config: pytest.fail("too late"))
    assert main(["generate", str(trained / "run"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_one_source_of_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "run", "--prompt", "x", "--interactive"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err
