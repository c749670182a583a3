"""`report`: where the page goes, how it is kept up to date, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_md.cli import main
from tests.report.recorded_run import write_recorded_run

REFRESH = '<meta http-equiv="refresh" content="5">'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recorded_run(tmp_path / "run")


def test_the_page_goes_into_the_run_or_where_it_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    assert (run / "report.html").read_text().endswith("</html>\n")
    write_recorded_run(run.parent / "other", optimizer={"lr": 0.5})
    assert main(["report", "run", "other", "--price", "2"]) == 0
    assert "per device-hour" in Path("report.html").read_text()
    assert main(["report", "run", "--output", "new/page.html"]) == 0
    assert Path("new/page.html").is_file() and not list(Path("new").glob(".*"))


def test_watch_writes_the_page_until_the_run_has_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "summary.json").write_text('{"status": "running"}')
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert REFRESH in (run / "report.html").read_text()
        if len(waits) == 2:
            (run / "summary.json").write_text(json.dumps({"status": "finished"}))

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", "run", "--watch", "5"]) == 0
    assert waits == [5.0, 5.0] and "refresh" not in (run / "report.html").read_text()


def test_watch_that_is_interrupted_leaves_a_page_that_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "summary.json").write_text('{"status": "running"}')

    def sleep(seconds: float) -> None:
        assert seconds == 60.0
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", "run", "--watch"]) == 0
    assert "refresh" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["."], "neither a run (no config.yaml, no checkpoints/)"),
        (["run", "--output", "run"], "--output run: a directory; name the page to write, such as run/report.html"),
        (["run", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_refusals(words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1
    assert not list(run.parent.glob("**/report.html"))


@pytest.mark.parametrize("words", [["--price", "free", "run"], ["--watch", "run"], ["run", "--price", "-1"]])
def test_no_numbers(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["report", *words])
    assert exit_.value.code == 2
    assert "must be a number above 0" in capsys.readouterr().err


def test_a_checkpoint_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    assert main(["report", str(checkpoint)]) == 2
    assert "a checkpoint; give the directory of its run" in capsys.readouterr().err


def test_neither_torch_nor_the_run_s_imports_are_loaded(run: Path) -> None:
    (run.parent / "evil.py").write_text("open('planted', 'w')\n")
    with (run / "config.yaml").open("a") as file:
        file.write("imports: [evil]\n")
    text = (run / "config.yaml").read_text().replace("imports: []\n", "")
    (run / "config.yaml").write_text(text)
    script = (
        "import sys; from megatron_md.cli import main; assert main(['report', 'run']) == 0; "
        "assert not {'torch', 'megatron', 'evil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=run.parent, check=True, timeout=120)
    assert not (run.parent / "planted").exists() and "evil" in (run / "report.html").read_text()
