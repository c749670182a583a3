"""What a run was and came to, as facts with names: its state, its figures, and what it has cost."""

from __future__ import annotations

import time
from typing import Any

from megatron_md.report.cost import device_hours, training_flops
from megatron_md.report.recorded import Recorded
from megatron_md.run.epochs import told_passes
from megatron_md.run.estimate import parameter_count, trained_count
from megatron_md.train.records import has_overfitted, is_number, lowest

Facts = dict[str, str]


def facts(run: Recorded) -> Facts:
    """State, progress and figures, in the same order for every run; empty where the run's files do not tell."""
    newest = run.records[-1] if run.records else {}
    rate, mfu, memory = run.found.status.get("tokens_per_second"), newest.get("mfu"), newest.get("memory_gib")
    objective = parameters = ""
    if run.config is not None:
        objective, parameters = run.config.objective.name, f"{parameter_count(run.config.model):,}"
        if run.config.lora is not None:
            parameters += f" frozen, {trained_count(run.config):,} in adapters"
    return {
        "state": _state(run),
        "progress": _progress(run, newest),
        "last step logged": moment(newest.get("time")),
        **_validation(run),
        "tokens per second": f"{number(rate)} on average"
        if is_number(rate)
        else number(newest.get("tokens_per_second")),
        "MFU": f"{mfu:.1%}" if is_number(mfu) else "",
        "peak memory": f"{number(memory)} GiB" if is_number(memory) else "",
        "skipped steps": number(newest.get("skipped_total")),
        "objective": objective,
        "parameters": parameters,
        "corpus": "\n".join(told_passes(run.found.status.get("corpora"))),
    }


def cost(run: Recorded, price: float | None) -> Facts:
    """FLOPs, device-hours, and their price where one is given."""
    flops, hours = training_flops(run), device_hours(run)
    found = {
        "training FLOPs": "not known" if flops is None else f"{flops:.3e}",
        "device-hours": "not known" if hours is None else number(hours),
    }
    if price is not None:
        money = "not known" if hours is None else f"{number(hours * price)}, at {price:g} per device-hour"
        found["price"] = money
    return found


def number(value: Any) -> str:
    """A figure in few digits; nothing where it is none."""
    if not is_number(value):
        return ""
    is_whole = abs(value) >= 1e4 or value == round(value)
    return f"{value:,.0f}" if is_whole and abs(value) < 1e15 else f"{value:.4g}"


def moment(seconds: Any) -> str:
    """A time since 1970 in words; nothing where it is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _state(run: Recorded) -> str:
    status = run.found.status
    if run.is_killed:
        return "killed, unless it runs on another machine"
    parts = [status.get("status", "unknown: no summary.json")]
    parts += [f"by {status['stopped_by']}"] if status.get("stopped_by") else []
    parts += [f": {status['error']}"] if status.get("error") else []
    return " ".join(map(str, parts)).replace(" :", ":")


def _progress(run: Recorded, newest: dict[str, Any]) -> str:
    step, total = newest.get("step", run.found.status.get("step")), run.found.total_steps
    if not is_number(step):
        return "no step logged yet"
    steps = f"step {number(step)}" + (f" of {number(total)}" if total else "")
    return steps + (f", {number(newest['tokens'])} tokens" if is_number(newest.get("tokens")) else "")


def _validation(run: Recorded) -> Facts:
    scored = [record for record in run.records if is_number(record.get("val_nelbo"))]
    if not scored:
        return {"validation NELBO": "none yet", "perplexity at most": "", "lowest NELBO": ""}
    last, best = scored[-1], lowest(scored)
    error = f" ± {last['val_nelbo_stderr']:.4f}" if is_number(last.get("val_nelbo_stderr")) else ""
    lowest_text = ""
    if best is not None and best is not last:
        overfitted = ": overfitted from there" if has_overfitted(scored) else ""
        lowest_text = f"{best['val_nelbo']:.4f}, at step {best['step']:,}{overfitted}"
    return {
        "validation NELBO": f"{last['val_nelbo']:.4f}{error} nats per token, at step {last['step']:,}",
        "perplexity at most": number(last.get("val_ppl_bound")),
        "lowest NELBO": lowest_text,
    }
