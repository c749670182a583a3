"""The page of a run: what it holds, that it loads nothing and runs nothing, and that foreign files are text in it."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_md.report.page import report_page
from megatron_md.report.recorded import read_run, read_runs
from tests.hostile import changed_bytes, changed_json, changed_yaml, fuzz
from tests.report.recorded_run import EVENTS, SAMPLES, SUMMARY, lines, records, write_recorded_run

EVIL = '<script>alert(1)</script><img src=x onerror="x">{{BODY}}"\'\x1b[2J'


class Parsed(HTMLParser):
    """The page's elements, attributes, and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*runs: Path, **options: float) -> Parsed:
    page = report_page(read_runs(runs), **options)
    assert not re.search(r"https?://|url\((?!#)|@import", page), "the page loads something"
    parsed = Parsed(page)
    assert not parsed.tags & {"script", "img", "iframe", "object", "link", "a", "form", "foreignobject"}
    assert not [name for name in parsed.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"\x1b", "\u202e"} & set(page)
    return parsed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_recorded_run(tmp_path / "run")


def test_a_finished_run_is_told(run: Path) -> None:
    text = page_of(run, price=2.5).text
    for expected in (
        "finished", "step 8 of 8, 8,000 tokens", "4.9200 ± 0.0200 nats per token, at step 8", "512.5 on average",
        "NELBO, last 4.920 ± 0.020", "unigram entropy 5.100", "step 4", "upon a time", "from nothing",
        "reason loss spike", "start", "middle", "end", "anneal(uniform:0.45,0.55 to uniform:0,1 over 0.5 to 1)",
        "optimizer.lr", "0.0003", "0.004", "versions.torch", "0.25, at 2.5 per device-hour",
        "Model FLOPs utilisation: not logged",
    ):  # fmt: skip
        assert expected in text, expected
    assert "seq_length" not in text, "a key at its default"


def test_several_runs_share_the_charts_and_show_the_keys_in_which_they_differ(run: Path, tmp_path: Path) -> None:
    other = write_recorded_run(tmp_path / "other", objective={"name": "autoregressive"}, optimizer={"lr": 0.5})
    text = page_of(run, other).text
    assert "0.5" in text and "optimizer.lr" in text and "train.steps" not in text
    assert "■ run" in text and "■ other" in text and "none, autoregressive: not drawn" in text


def test_many_runs_have_a_colour_each(run: Path, tmp_path: Path) -> None:
    runs = [run, *(write_recorded_run(tmp_path / f"run_{number}") for number in range(9))]
    page = report_page(read_runs(runs))
    assert len(set(re.findall(r'<b style="color: (#[0-9a-f]{6})">■</b>', page))) == 10
    assert "NELBO, last" not in page and len(page) < 1_000_000


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "samples.jsonl", "summary.json", "env.json"])
def test_a_run_that_lacks_a_file_gets_a_page_that_says_so(name: str, run: Path) -> None:
    (run / name).unlink()
    said = {
        "metrics.jsonl": "no validation yet: validation.every_steps",
        "events.jsonl": "no events.jsonl",
        "samples.jsonl": "none: sampling.every_steps",
        "summary.json": "unknown: no summary.json",
        "env.json": "no env.json",
    }
    assert said[name] in page_of(run).text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {vocab: 9}\n")
    text = page_of(tmp_path).text
    assert "no step logged yet" in text and "Loss: the training objective, nats per token: not logged" in text


def test_a_config_that_cannot_be_read_is_noted(run: Path) -> None:
    (run / "config.yaml").write_text("model: {vocab: 9, surprise: 1}\nobjective: [")
    text = page_of(run).text
    assert "config.yaml, line 2" in text and "no config.yaml that can be read" in text
    (run / "config.yaml").write_text("model: {vocab: 9, surprise: 1}\n")
    text = page_of(run).text
    assert "unknown key model.surprise" in text and "model.surprise" in text.split("Config")[1]


def test_a_killed_run_is_told(run: Path) -> None:
    (run / "summary.json").write_text('{"status": "running"}')
    assert read_run(run).is_running
    (run / ".lock").touch()
    assert not read_run(run).is_running
    assert "killed, unless it runs on another machine" in page_of(run).text


def test_foreign_texts_are_texts(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / '<img src=x onerror="x">{{BODY}}', sampling={"prompts": [EVIL]})
    (run / "samples.jsonl").write_text(lines([{"step": 1, "prompt": EVIL, "text": EVIL}]))
    (run / "events.jsonl").write_text(lines([{"time": 1, "event": EVIL, "step": 1, EVIL: EVIL}, *EVENTS]))
    (run / "env.json").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    (run / "summary.json").write_text(json.dumps({"status": EVIL, "error": EVIL, "stopped_by": [EVIL]}))
    parsed = page_of(run)
    assert parsed.text.count("<script>alert(1)</script>") >= 8 and r"\x1b[2J" in parsed.text
    assert parsed.text.count("{{BODY}}") >= 8


def test_secrets_of_urls_are_left_out(run: Path) -> None:
    (run / "env.json").write_text(json.dumps({"where": "https://user:hunter2@host/x", "api_key": "abcdef"}))
    page = report_page([read_run(run)])
    assert "https://***@host/x" in page and "hunter2" not in page and "abcdef" not in page


@pytest.mark.slow
def test_a_long_run_makes_a_page_below_a_megabyte(run: Path) -> None:
    generator = random.Random(0)
    made = records(20_000)
    for record in made:
        record |= {key: generator.random() for key in ("loss", "masked_ce", "grad_norm", "tokens_per_second", "mfu")}
    made[7777]["loss"] = 30.0
    (run / "metrics.jsonl").write_text(lines(made))
    (run / "samples.jsonl").write_text(lines([{**SAMPLES[0], "step": n, "text": "x" * 5000} for n in range(2000)]))
    (run / "events.jsonl").write_text(lines([{**EVENTS[1], "step": n} for n in range(20_000)]))
    page = report_page([read_run(run)])
    assert len(page) < 700_000
    assert ">30</text>" in page, "a spike is within the band of its stretch"
    assert "the last of 20,000 events" in page


@pytest.mark.slow
def test_whatever_the_files_hold_there_is_a_page(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    sound = records()[3]
    files = st.fixed_dictionaries(
        {
            "metrics.jsonl": changed_json(sound).map(lambda data: lines([sound]).encode() + data + b"\n"),
            "events.jsonl": st.one_of(changed_json(EVENTS[1]), changed_bytes(lines(EVENTS).encode())),
            "samples.jsonl": st.one_of(changed_json(SAMPLES[1]), changed_bytes(lines(SAMPLES).encode())),
            "summary.json": changed_json(SUMMARY),
            "env.json": changed_json({"versions": {"torch": "2.9"}, "world_size": 2}),
            "config.yaml": changed_yaml(config),
        }
    )

    def check(contents: dict[str, bytes]) -> None:
        for name, data in contents.items():
            (run / name).write_bytes(data)
        page_of(run, price=1.0)

    fuzz(files, check, "quick")


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": 1e300, "val_nelbo": 1e300, "grad_norm": 1e-300, "tokens": 10**30, "time": 1e300, "mfu": 1e300},
        {"loss": "x", "val_nelbo": [], "val_ce_by_rate": ["x"], "tokens": {}, "time": None, "lr": True},
        {"val_ce_by_rate": [1e300, None], "tokens": -5, "time": -1e18, "skipped_total": 1e30},
    ],
)
def test_figures_beyond_all_bounds(changed: dict[str, object], run: Path) -> None:
    (run / "metrics.jsonl").write_text(lines([*records(), {**records()[3], "step": 9, **changed}]))
    assert "step 9 of 8" in page_of(run, price=2.5).text
