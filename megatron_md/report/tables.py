"""The page's tables and lists. Whatever a run's files say is text here, and cut where it is long."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_md.checkpoint.contract import flat
from megatron_md.config import Config, as_dict
from megatron_md.html_page import escaped
from megatron_md.messages import printable, redacted
from megatron_md.report.charts import spread
from megatron_md.report.facts import moment
from megatron_md.report.recorded import Recorded

MOST_ROWS = 400
MOST_EVENTS = 100  # the newest ones
MOST_PROMPTS, MOST_SAMPLES = 8, 6
LONGEST_VALUE, LONGEST_TEXT = 300, 1000  # characters


def facts_table(runs: Sequence[Recorded], found: Sequence[Mapping[str, str]]) -> str:
    """Facts by name, a column for each run, without those that are empty everywhere."""
    names = [name for name in found[0] if any(facts[name] for facts in found)]
    return _table(_columns(runs), [[name, *(_cut(facts[name], LONGEST_VALUE) for facts in found)] for name in names])


def config_table(runs: Sequence[Recorded]) -> str:
    """What a run's config has set, beside the defaults; of several runs the keys in which they differ."""
    read = [run.settings for run in runs]
    if not any(read):
        return _absent("no config.yaml that can be read")
    if len(runs) == 1:
        columns, settings = ["key", "default", "here"], [flat(as_dict(Config())), *read]
    else:
        columns, settings = _columns(runs), read
    keys = dict.fromkeys(key for own in settings for key in own)
    rows = [[key, *(_value(own, key) for own in settings)] for key in keys if key != "run_dir"]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return _table(columns, differing) if differing else _absent("no key differs")


def environment_table(runs: Sequence[Recorded]) -> str:
    """Versions and hardware."""
    found = [flat(run.found.environment) for run in runs]
    keys = dict.fromkeys(key for own in found for key in own)
    if not keys:
        return _absent("no env.json")
    return _table(_columns(runs), [[key, *(_value(own, key) for own in found)] for key in keys])


def events_table(runs: Sequence[Recorded]) -> str:
    """The newest events, folded away where there are several runs or many events."""
    return "".join(_heading(run, runs) + _events(run) for run in runs)


def _events(run: Recorded) -> str:
    if not run.events:
        return _absent("no events.jsonl")
    rows = []
    for event in reversed(run.events[-MOST_EVENTS:]):
        details = {key: _short(value) for key, value in event.items() if key not in ("time", "event", "step")}
        said = ", ".join(f"{key} {_value(details, key)}" for key in details)
        rows.append(
            [moment(event.get("time")).removesuffix(" UTC"), _value(event, "event"), _value(event, "step"), said]
        )
    count = f"{len(run.events):,} events" if len(rows) == len(run.events) else f"the last of {len(run.events):,} events"
    table = _table(["time (UTC)", "event", "step", "details"], rows)
    return f"<details{' open' if len(rows) <= 12 else ''}><summary>{count}</summary>{table}</details>"


def samples_list(runs: Sequence[Recorded]) -> str:
    """What the model wrote after each prompt, over the run."""
    return "".join(_heading(run, runs) + _samples(run) for run in runs)


def _samples(run: Recorded) -> str:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        if isinstance(sample.get("prompt"), str) and isinstance(sample.get("text"), str):
            by_prompt.setdefault(sample["prompt"], []).append(sample)
    if not by_prompt:
        return _absent("none: sampling.every_steps asks for them")
    parts = []
    for prompt, samples in list(by_prompt.items())[:MOST_PROMPTS]:
        parts.append(f"<h4>{_text(prompt) if prompt else 'from nothing'}</h4>")
        for sample in spread(samples, MOST_SAMPLES):
            parts.append(f'<p class="faint">step {sample["step"]:,}</p><pre>{_text(sample["text"])}</pre>')
    left = len(by_prompt) - MOST_PROMPTS
    return "\n".join(parts) + (_absent(f"and {left} more prompts") if left > 0 else "")


def _text(text: str) -> str:
    """What a model wrote: not a message of ours, so that nothing is redacted."""
    from html import escape

    return escape(printable(_cut(text, LONGEST_TEXT), multiline=True))


def _heading(run: Recorded, runs: Sequence[Recorded]) -> str:
    return f"<h3>{escaped(run.name)}</h3>\n" if len(runs) > 1 else ""


def _columns(runs: Sequence[Recorded]) -> list[str]:
    """A column for names and one for each run; no heads where there is one run alone."""
    return ["", *(run.name for run in runs)] if len(runs) > 1 else []


def _value(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return ""
    (value,) = redacted({key.rpartition(".")[2]: values[key]}).values()
    text = value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
    return _cut(text, LONGEST_VALUE)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _absent(text: str) -> str:
    return f'<p class="absent">{escaped(text)}</p>'


def _breakable(name: str) -> str:
    """A dotted name that a narrow page may break at its dots and underscores."""
    return escaped(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows that begin with their name; beyond `MOST_ROWS` their number is told."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    lines = [
        f'<tr><th scope="row">{_breakable(name)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows[:MOST_ROWS]
    ]
    body = "\n".join([f"<thead><tr>{head}</tr></thead>" if head else "", "<tbody>", *lines, "</tbody>"])
    more = _absent(f"and {len(rows) - MOST_ROWS} more") if len(rows) > MOST_ROWS else ""
    return f'<div class="wide"><table>{body}</table></div>{more}'
