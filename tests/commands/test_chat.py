"""The command: through a pipe, on two processes, on a terminal; its own commands, interruptions, refusals by name."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from tests.commands.test_generate import generate, on_terminal, texts
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config

WORDS = ["--template", "plain", "--length", "6", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def talker(trained: Path) -> Path:
    """A run with room for some turns, and about the weights that were drawn, so that answers differ."""
    keys: dict[str, Any] = {"model": {"tied": False, "init_std": 0.1, "max_length": 128}, "optimizer": {"lr": 1e-9}}
    run_ranks(pretrain, 1, run_config(trained, "talker", **keys))
    return trained / "talker"


def chat(words: list[str], typed: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a chat in which this was typed."""
    sys.stdin = io.StringIO(typed)
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        code = main(["chat", *words])
    return code, output.getvalue(), errors.getvalue()


def answer_to(run: Path, folder: Path, messages: list[dict[str, str]]) -> str:
    """On a rank: what `generate --chat` answers."""
    prompts, output = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text(json.dumps({"messages": messages}) + "\n")
    words = [str(run), "--chat", "--prompts-file", str(prompts), "--output", str(output), *WORDS]
    assert generate(words) == [0]
    (text,) = texts(output)
    assert text["prompt"] == messages[-1]["content"]
    return str(text["text"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answers(run: Path, folder: Path) -> list[str]:
    """On a rank: to a question, to a second one after it, and to the first one under a system text."""
    first = answer_to(run, folder, [user("def f(")])
    history = [user("def f("), {"role": "assistant", "content": first}]
    second = answer_to(run, folder, [*history, user("value = ")])
    return [first, second, answer_to(run, folder, [{"role": "system", "content": "be brief"}, user("def f(")])]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pipe_gets_plain_answers_to_what_was_said_so_far(talker: Path, tmp_path: Path) -> None:
    ((first, second, third),) = run_ranks(answers, 1, talker, tmp_path)
    assert len({first, second, third}) == 3
    typed = "def f(\nvalue = \n/reset\n\ndef f(\n/nope\n/system be brief\ndef f(\n/quit\nnever\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    words = [sys.executable, "-m", "megatron_md", "chat", str(talker), *WORDS]
    done = subprocess.run(words, input=typed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n{first}\n{third}\n"
    # Libraries may have told things as well.
    told = [line for line in done.stderr.splitlines() if line.startswith("/")]
    assert len(told) == 1 and told[0].startswith("/nope: no such command; /reset forgets the conversation")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_answers(talker: Path) -> None:
    words = [str(talker), *WORDS, "--system", "be brief"]
    # Up to the end of the input instead of /quit.
    (one,) = run_ranks(chat, 1, words, "def f(\nvalue = ")
    assert one[0] == 0 and one[1]
    for layout in ([], ["--pipeline", "2"], ["--tensor", "1"]):
        main_rank, other = run_ranks(chat, 2, [*words, *layout], "def f(\nvalue = ")
        assert main_rank[:2] == one[:2] and other == (0, "", "")


@pytest.mark.distributed
def test_the_oldest_turns_are_forgotten_and_too_long_a_message_is_refused(talker: Path) -> None:
    typed = "x = 1\n" * 4 + "long " * 99 + "\nx = 1\n"
    ((code, output, errors),) = run_ranks(chat, 1, [str(talker), *WORDS], typed)
    assert code == 0 and output
    told = errors.splitlines()
    assert "[the oldest 1 exchange(s) do not fit any more and are forgotten]" in told
    (refused,) = [line for line in told if "tokens exceed the 122 that are left beside the answer" in line]
    assert told.index(refused) > 0


def interrupted(words: list[str]) -> tuple[int, str, str]:
    """A chat whose first answer is interrupted by Ctrl-C, and one with its second question alone."""
    from megatron_md.evaluate import chat as module

    real, calls = module.fill, []

    def fill(*args: Any, **keys: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **keys)

    module.fill = fill
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it
    return chat(words, "value = \ndef f(\n/reset\ndef f(\n")


@pytest.mark.distributed
def test_an_interrupted_answer_ends_no_chat_and_leaves_nothing_in_it(talker: Path) -> None:
    ((code, output, errors),) = run_ranks(interrupted, 1, [str(talker), *WORDS])
    assert code == 0 and errors == "[stopped: the question is forgotten]\n"
    half = len(output) // 2
    assert output[:half] == output[half:] != ""


@pytest.mark.distributed
def test_a_terminal_sees_the_answer_fill_and_nothing_commands_it(talker: Path) -> None:
    (shown,) = run_ranks(on_terminal, 1, [str(talker), *WORDS], {}, "chat", "a\x1b]0;b\x07\n/quit\n")
    assert "step 3 of 3" in shown and "User:" not in shown  # the canvas begins with the answer
    assert "\x1b]0;b" not in shown
    (plain,) = run_ranks(on_terminal, 1, [str(talker), *WORDS, "--no-stream"], {}, "chat", "a\n")
    assert "step" not in plain and "\x1b[" not in plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no chat template; choose one by --template"),
        (["--template", "nope"], "no template 'nope': give a .jinja file or one of llada"),
        (["--template", "plain", "--length", "40"], "--length 40 leaves no room for a message in the model's 32"),
        (
            ["--template", "plain", "--length", "4", "--system", "x " * 99],
            "that are left beside the answer; shorten it",
        ),
        (["--length", "8", "--block", "16"], "block 16 is longer than length 8"),
        (["--threshold", "0.5"], "--threshold belongs to --strategy threshold"),
        (["--top-p", "0.5"], "top_p 0.5 changes nothing at temperature 0"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    words: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_md.parallel.initialize", lambda config: pytest.fail("too late"))
    assert main(["chat", str(trained / "run"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
