"""Mask schedules against each other at equal FLOPs, each at its own best learning rate: docs/studies.md has the result.

    python examples/studies/rivals.py runs/studies/rivals [--workers 2] [--budgets 1 2 4] [section.key=value ...]

Model, rows and the tokens of a budget are those of windows.yaml. The learning rate of each arm is the best of three on
the smallest budget with seed 0, which nothing else uses. Arms get as many steps as cost the FLOPs of U[0, 1], as the
head sees masked tokens alone; those that are fitted (`megatron-md schedule fit`) pay for the pilot and the fit as well.
What is done already is not done again: kill it and start it anew.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_md.config import config_from_mapping
from megatron_md.config.loader import read_yaml
from megatron_md.diffusion.fit import BINS
from megatron_md.sweep.study import flops

BASE = Path(__file__).parent / "windows.yaml"
UNIFORM, WINDOW = "uniform:0,1", "uniform:0.45,0.55"
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
PILOT, FITTED_ROWS = 0.25, 128  # budgets of U[0, 1] for the pilot, and held-out rows, each masked at 16 rates


def schedule(value: Any) -> str:
    """The word that sets a mask schedule."""
    return f"objective.mask_schedule={yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"


def arms(fitted: Path) -> dict[str, list[str]]:
    """Name and words of each arm; those of the fit have files like `fitted`."""
    aligned = {"name": "anneal", "from": f"knots:{fitted}", "to": UNIFORM, "over": [0.7, 1.0]}
    return {
        "U[0, 1]": [],
        "U[0, 1], no weights": ["objective.weight=none"],
        "[0.45, 0.55]": [schedule(WINDOW)],
        "window + 20 % uniform": [
            schedule(
                {
                    "name": "mixture",
                    "components": [{"weight": 0.8, "schedule": WINDOW}, {"weight": 0.2, "schedule": UNIFORM}],
                }
            )
        ],
        "window -> uniform": [schedule({"name": "anneal", "from": WINDOW, "to": UNIFORM, "over": [0.5, 1.0]})],
        "bell": [schedule("logit_normal:0,1")],
        "beta(2, 2)": [schedule("beta:2,2")],
        "antithetic": ["objective.pairs=antithetic"],
        "complementary": ["objective.pairs=complementary"],
        "P-POTS": [schedule(f"knots:{fitted.with_suffix('.variance.knots')}"), "objective.importance=true"],
        "signal-aligned": [schedule(aligned)],
    }


def command(*words: str | Path) -> None:
    """`megatron-md WORDS`; ends where it fails."""
    code = subprocess.run([sys.executable, "-m", "megatron_md", *map(str, words)], check=False).returncode
    if code:
        sys.exit(code)


class Rivals:
    """The study in a folder."""

    def __init__(self, folder: Path, words: list[str], workers: int) -> None:
        self.folder, self.words, self.workers = folder.absolute(), words, workers
        self.base = read_yaml(BASE)
        self.base.pop("sweep")
        self.fitted = self.folder / "fitted.knots"
        self.arms = arms(self.fitted)
        self.folder.mkdir(parents=True, exist_ok=True)

    def cost(self, words: list[str], steps: int) -> float:
        """FLOPs of a run."""
        warm = [f"train.steps={steps}"]
        return flops(config_from_mapping(self.base, [*self.words, *words, *warm], source=str(BASE)))

    def steps(self, arm: str, budget: float) -> int:
        """Steps of an arm that cost as much as so many budgets of U[0, 1], less what its fit has cost."""
        unit = self.base["train"]["steps"]
        if str(self.fitted.with_suffix("")) in " ".join(self.arms[arm]):
            budget -= PILOT + BINS * FITTED_ROWS / (unit * self.base["train"]["global_batch_size"])
        return round(budget * unit * self.cost([], unit) / self.cost(self.arms[arm], unit))

    def fit(self) -> None:
        """Train the pilot, and fit schedules to it."""
        words = [f"train.steps={round(PILOT * self.base['train']['steps'])}", "validation.every_steps=0"]
        self.sweep("pilot", {"pilot": words}, seeds=[0])
        if not self.fitted.exists():
            run, record = self.folder / "pilot/pilot/seed_0", self.folder / "fit.json"
            shape = ["--rows", str(FITTED_ROWS), "--json", record, "--output", self.fitted]
            command("schedule", "fit", run, *shape)

    def sweep(self, name: str, sections: dict[str, list[str]], **sweep: Any) -> None:
        """Run a study file of these arms."""
        study = {**self.base, "run_dir": str(self.folder / name), "sweep": {"arms": sections, **sweep}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False, width=1000))
        command("sweep", path, *self.words, "--workers", str(self.workers))

    def best_rates(self) -> dict[str, float]:
        """Each arm's learning rate with the lowest NELBO on the smallest budget."""
        sections = {
            arm: [*words, f"train.steps={self.steps(arm, 1)}", "validation.every_steps=0"]
            for arm, words in self.arms.items()
        }
        self.sweep("rates", sections, seeds=[0], grid={"optimizer.lr": list(RATES)})
        best: dict[str, tuple[float, float]] = {}
        with (self.folder / "rates/results.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                found = float(row["val_nelbo"]), float(row["point"].removeprefix("lr "))
                best[row["arm"]] = min(found, best.get(row["arm"], found))
        return {arm: rate for arm, (_, rate) in best.items()}

    def run(self, budgets: list[int]) -> None:
        """All of it."""
        self.fit()
        rates = self.best_rates()
        for budget in budgets:
            sections = {}
            for arm, words in self.arms.items():
                steps = self.steps(arm, budget)
                sections[arm] = [*words, f"train.steps={steps}", f"optimizer.lr={rates[arm]}",
                                 f"validation.every_steps={round(steps / 8)}"]  # fmt: skip
            self.sweep(f"{budget}x", sections, seeds=list(SEEDS))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    Rivals(arguments.folder, arguments.words, arguments.workers).run(arguments.budgets)


if __name__ == "__main__":
    main()
