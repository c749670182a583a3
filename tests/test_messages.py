"""What people read: nothing that a terminal obeys, nothing of a URL that is secret, whatever writes it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_md import cli, messages
from megatron_md.config import config_from_mapping, load_config, to_yaml
from megatron_md.messages import Formatter, printable, progress, redacted, shown

HOSTILE = "a\x1b]0;b\x07\r\x7f\x9b31m\u202e\u2066\u2028\ud800"
ESCAPED = r"a\x1b]0;b\x07\r\x7f\x9b31m\u202e\u2066\u2028\ud800"
SECRETS = [
    ("https://user:word@host/x?sig=1: refused", "https://***@host/x?***: refused"),
    ("s3://key:word@bucket/a/b#word", "s3://***@bucket/a/b#***"),
    ("https://word@host", "https://***@host"),
    ("HTTPS://u:wo'rd@host:80/@me, 'http://host/?word'", "HTTPS://***@host:80/@me, 'http://host/?***'"),
    ("a=https://u:word@host/x,b=https://v:word@other/y", "a=https://***@host/x,b=https://***@other/y"),
    ("https:/u:word@host/x", "https:/***@host/x"),  # through pathlib
    ("simplecache::https://u:word@host", "simplecache::https://***@host"),
    ('"https://user:word...', '"https://***...'),  # cut off
]
KEPT = [
    "hf://datasets/org/name@main/file",
    "http://127.0.0.1:8000: refused",
    "http://[::1]:80/x",
    "knots:/a#b?c",
    "host:29500",
    "a@b.c",
]


def test_what_could_command_a_terminal_is_an_escape() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("naïve 你好 🙂\u200d\u200f") == "naïve 你好 🙂\u200d\u200f"
    assert printable("a\n\tb") == r"a\n\tb"
    assert printable("a\n\tb\r", multiline=True) == "a\n\tb\\r"


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_no_secret_of_a_url_is_left(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected
    assert redacted({"a": [text, 1, None]}) == {"a": [expected, 1, None]}
    # Also within JSON, which stays JSON.
    assert json.loads(redacted(json.dumps({"a": f'"{text}"'}))) == {"a": f'"{expected}"'}


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_long_texts_take_no_longer_than_their_length() -> None:
    for text in ("ab://" * 100_000, "a" * 1_000_000, ":/" * 500_000, "ab:/?" * 100_000):
        redacted(text)  # the test's own time limit is the bound


def test_a_log_is_shown_too() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "left out: %s", (HOSTILE,), None)
    assert Formatter("%(message)s").format(record) == f"left out: {ESCAPED}"


def test_a_config_is_recorded_without_secrets_and_otherwise_as_it_is(tmp_path: Path) -> None:
    mapping: dict[str, Any] = {
        "data": {"train": "https://user:word@host/a", "valid": "s3://bucket/b?versionId=word"},
        "objective": {"options": {"api_key": "word", "sharpness": 0.5, "mask_token": "<m>"}},
    }
    config = config_from_mapping(mapping)
    text = to_yaml(config)
    assert "word" not in text
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(tmp_path / "config.yaml")
    assert again.data.train == "https://***@host/a" and again.objective.options["sharpness"] == 0.5
    assert again.objective.options["mask_token"] == "<m>"
    assert to_yaml(again) == text


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What is said on stderr."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    return capsys.readouterr().err


def yaml_key(text: str) -> str:
    return json.dumps(text).replace("\\ud800", "")


def test_a_config_s_keys_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a\x1b[2Jb.yaml"
    forged = "x\nmegatron-md: all is well\x85"
    file.write_text(f"{yaml_key(forged + HOSTILE)}: 1\n")
    said = refused(capsys, "train", file)
    assert said.count("\n") == 1 and said == shown(said, multiline=True)
    assert r"a\x1b[2Jb.yaml: unknown key x\nmegatron-md: all is well\x85a\x1b]0;b" in said
    file.write_text(
        "seed: https://user:word@host/" + "x" * 100 + "\ntrain: https://" + "u" * 60 + ":wordwordword@host\n"
    )
    said = refused(capsys, "train", file)
    assert said.count("\n") == 2 and "word" not in said and "https://***" in said


@pytest.mark.parametrize(
    "words", [["train", "--un\x1bknown"], ["\x1b[2J"], ["plot", "no\x1bne"], ["train", "no\x9bne"]]
)
def test_words_of_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *words)
    assert said.count("\n") == 1 and said == shown(said, multiline=True)


def test_a_dry_run_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{preset: tiny, vocab: 300}}\nrun_dir: {tmp_path}/run\nobjective: {{options: {{secret: word}}}}"
    )
    assert cli.main(["train", str(file), "--dry-run"]) == 0
    output = capsys.readouterr()
    assert "secret: '***'" in output.out and "word" not in output.out + output.err


def test_tracebacks_and_logs_of_a_process() -> None:
    script = (
        "import logging, sys\nfrom megatron_md import cli\nsys.argv = ['megatron-md', 'plot', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        f"logging.getLogger('megatron_md').warning({HOSTILE!r})\nraise RuntimeError({HOSTILE!r} + 'https://u:word@host/')"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert f"{ESCAPED}\n" in done.stderr and f"RuntimeError: {ESCAPED}https://***@host/\n" in done.stderr
    assert done.stderr == shown(done.stderr, multiline=True)


def test_lines_are_apart_in_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 10.0, 19.0, 21.0, 21.0])
    monkeypatch.setattr(messages, "time", SimpleNamespace(perf_counter=clock.__next__))
    with progress("here", lines=True) as move:
        for done in range(1, 5):
            move(text=f"{done} done")
    assert capsys.readouterr().err == "2 done\n4 done\n"


@pytest.mark.parametrize("total", [None, 4])
def test_a_terminal_has_a_bar(
    total: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    with progress("starting", total) as move:
        move(completed=2, text="[2] done\x1b[2J")
        move()
    shown = capsys.readouterr().err
    assert "[2] done\\x1b[2J" in shown and ("75%" in shown) == (total is not None)
    with progress("starting", total, visible=False, lines=True) as move:
        move(completed=2, text="2 done")
    assert capsys.readouterr().err == ""
