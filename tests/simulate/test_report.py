"""What is printed says every figure, and JSON holds the same."""

from __future__ import annotations

import json
from dataclasses import replace

from megatron_md.simulate.report import as_json, assumed, report, table
from megatron_md.simulate.roofline import Assumptions, forecast
from megatron_md.simulate.stage import FORWARD
from tests.simulate.made_up import DEVICE, collective, kernel, run, stage

CONFIG, LAYOUT = run(2, parallel={"tensor": 2})
STAGE = stage(
    [kernel(FORWARD, 3e12, count=2)],
    [
        collective(FORWARD, "_allgather_base", "tensor", 2, 2**21, count=3),
        collective(FORWARD, "allreduce", "data", 1, 9),
    ],
    peak=3 * 2**30,
    memory={"weights": 2**30, "gradients": 2**30, "optimizer": 0, "activations": 2**29, "head": 2**29},
)


def test_a_report_says_everything() -> None:
    text = report(CONFIG, LAYOUT, [STAGE], DEVICE, forecast([STAGE], CONFIG, LAYOUT, DEVICE))
    for expected in (
        "2 x round: tensor 2 x pipeline 1 x context 1 x data 1, 1 micro-batches of 8 rows x 256 tokens, bf16",
        "peak 3.00 GiB = weights 1.00, gradients 1.00, optimizer 0.00, activations 0.50, head 0.50",
        "6.0000e+12 a step = layers 6.000e+12",
        "all-gather   tensor (2 ranks): 3 calls, 2.00 MiB a step",
        "3.00 GiB on the fullest rank, 5 GiB kept free: DOES NOT FIT in 0.9 GiB",
        "for 10 steps",
        "matrix products reach 70% of the peak",
    ):
        assert expected in text
    assert "data (1 ranks)" not in text, "a group of one sends nothing"


def test_what_the_simulation_leaves_out_of_the_config_is_told() -> None:
    within = replace(CONFIG, data=replace(CONFIG.data, document_attention="within_document"))
    annealed = replace(CONFIG, objective=replace(CONFIG.objective, attention_annealing=0.5))
    plain = assumed(CONFIG, DEVICE, Assumptions())
    assert next(line for line in assumed(within, DEVICE, Assumptions()) if line not in plain).startswith(
        "attention over"
    )
    assert next(line for line in assumed(annealed, DEVICE, Assumptions()) if line not in plain).startswith(
        "attention with"
    )


def test_json_holds_the_same_figures() -> None:
    found = forecast([STAGE], CONFIG, LAYOUT, DEVICE)
    content = json.loads(json.dumps(as_json(CONFIG, LAYOUT, [STAGE], DEVICE, found)))
    assert content["forecast"]["step"]["total"] == found.step.total
    assert content["stages"][0]["peak"] == sum(content["stages"][0]["memory"].values())
    assert content["stages"][0]["flops"]["total"] == 6e12
    assert content["layout"]["tensor"] == 2


def test_a_table_has_the_fastest_that_fit_first() -> None:
    fast = forecast([STAGE], CONFIG, LAYOUT, replace(DEVICE, memory_bytes=1e12))
    slow = forecast([STAGE], CONFIG, LAYOUT, replace(DEVICE, memory_bytes=1e12, peak_flops=1e11))
    large = forecast([STAGE], CONFIG, LAYOUT, replace(DEVICE, peak_flops=1e13))
    lines = table([(CONFIG, LAYOUT, found) for found in (large, slow, fast)]).splitlines()
    assert [line.split()[6] for line in lines[1:]] == ["yes", "yes", "no"]
    assert float(lines[1].split()[7]) < float(lines[2].split()[7])
