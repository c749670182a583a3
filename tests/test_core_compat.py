"""Releases of megatron-core: what one has written, the other goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_md.core_compat import storage_formats

ROOT = Path(__file__).parents[1]
OTHER = os.environ.get("OTHER_PYTHON")  # of an environment with another megatron-core; `make test-core` sets it

LEG = """
import json, sys
from pathlib import Path
from tests.checkpoint.legs import SHARDED, leg, legs_config
first, stop = int(sys.argv[2]), int(sys.argv[3])
config = legs_config(SHARDED, tied=True, precision=sys.argv[4])
print(json.dumps(leg(config, Path(sys.argv[1]), first, stop, True)))
"""


def curve(python: str, run: Path, first: int, stop: int, precision: str) -> list[list[float]]:
    """Steps of a run in an environment, which goes on from the newest checkpoint and saves."""
    words = [python, "-c", LEG, str(run), str(first), str(stop), precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(OTHER is None, reason="needs OTHER_PYTHON, an environment with another megatron-core")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_from_release_to_release(precision: str, tmp_path: Path) -> None:
    assert OTHER is not None
    whole = curve(sys.executable, tmp_path / "whole", 0, 6, precision)
    for name, pythons in {"there": (sys.executable, OTHER), "back": (OTHER, sys.executable)}.items():
        parts = [curve(python, tmp_path / name, 3 * n, 3 * n + 3, precision) for n, python in enumerate(pythons)]
        np.testing.assert_allclose([*parts[0], *parts[1]], whole, rtol=1e-5)


def test_a_checkpoint_may_leave_out_the_format_of_the_common_state() -> None:
    assert storage_formats({"sharded_backend": "a", "common_backend": "b"}) == ("a", "b")
    assert storage_formats({"sharded_backend": "torch_dist"}) == ("torch_dist", "torch")
    with pytest.raises(KeyError):
        storage_formats({"common_backend": "torch"})
