"""The picture of a run: what is drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_md.cli import main
from megatron_md.evaluate.plot import plot_run, read_metrics
from megatron_md.run.inspection import inspect
from tests.train.damaged_lines import DAMAGED


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    records = [{"step": n, "tokens": 1000 * n, "loss": 9 - n, "masked_ce": 8.5 - n} for n in range(1, 5)]
    records[3] |= {"val_nelbo": 4.2, "val_nelbo_stderr": 0.05}
    records[1]["loss"] = None  # it was not finite
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def texts(svg: Path) -> str:
    """All labels of a picture: matplotlib draws glyphs as paths and keeps the text in comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return "\n".join(node.text or "" for node in ElementTree.parse(svg, parser).iter())


def test_picture_holds_losses_and_entropy(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"unigram_entropy": 6.1234}')
    plot_run(run_dir, run_dir / "loss.svg")
    text = texts(run_dir / "loss.svg")
    for label in ("training objective", "cross-entropy at masked tokens", "4.200 ± 0.050", "unigram entropy 6.123"):
        assert label in text


def test_picture_of_a_run_that_has_not_validated(run_dir: Path) -> None:
    kept = (run_dir / "metrics.jsonl").read_text().splitlines()[:3]
    (run_dir / "metrics.jsonl").write_text("\n".join(kept))
    plot_run(run_dir, run_dir / "loss.svg")
    text = texts(run_dir / "loss.svg")
    assert "training objective" in text and "NELBO" not in text and "entropy" not in text.replace("cross-entropy", "")


def test_a_title_is_no_formula_and_holds_no_control_character(run_dir: Path) -> None:
    foreign = run_dir / "$\\frac$ \x1b[2J"
    foreign.mkdir()
    (run_dir / "metrics.jsonl").rename(foreign / "metrics.jsonl")
    plot_run(foreign, run_dir / "loss.svg")
    assert r"$\frac$ \x1b[2J" in texts(run_dir / "loss.svg")


def test_png_is_written_whole(run_dir: Path) -> None:
    plot_run(run_dir, run_dir / "loss.png")
    data = (run_dir / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    assert not list(run_dir.glob(".*"))


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_told_and_left_out(damaged: bytes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_bytes(damaged + b"\n" + path.read_bytes())
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert capsys.readouterr().err == f"megatron-md: {path}: line 1 is damaged and left out\n"
    assert main(["compare", str(run_dir), str(run_dir)]) == 0
    (run_dir / "checkpoints").mkdir()
    assert f"{path}: line 1 is damaged" in inspect(run_dir).notes


def test_a_record_that_lacks_figures_is_drawn_where_it_has_them(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n{"step": 6, "loss": 1.0, "val_nelbo": 1.0}\n{"step": 7, "tokens": "x", "loss": []}\n')
    plot_run(run_dir, run_dir / "loss.svg")
    assert "4.200 ± 0.050" in texts(run_dir / "loss.svg")
    assert main(["compare", str(run_dir), str(run_dir)]) == 0


def test_refusals(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no picture format 'xyz'"):
        plot_run(run_dir, run_dir / "loss.xyz")
    with pytest.raises(ValueError, match="no such file"):
        read_metrics(tmp_path / "none")
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step has been logged"):
        read_metrics(run_dir)
