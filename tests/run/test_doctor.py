"""What `doctor` finds: states of packages, tools and devices, and what ranks of their own say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md.run import doctor
from megatron_md.run.doctor import Trial, attempt, attempt_ranks
from tests.test_installed import BROKEN, write_package


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of this process and of those that it starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_broken_transformer_engine_is_survived_and_told(stubs: Path) -> None:
    write_package(stubs, "transformer_engine", BROKEN["RuntimeError"])
    failures = {name: attempt("import", name).failure for name in (doctor.IMPORTED[0], doctor.CORE_MODULE)}
    found = doctor.transformer_engine(failures)
    assert (found.state, found.needed) == ("broken", False)
    assert "RuntimeError: no libcudart" in found.found
    assert f"take {stubs}/transformer_engine/__init__.py off PYTHONPATH" in found.way_out
    core = doctor.core(failures[doctor.CORE_MODULE])
    assert (core.state, core.needed) == ("broken", True)
    assert "RuntimeError: no libcudart" in core.found


def test_a_foreign_apex_is_recognised(stubs: Path) -> None:
    write_package(stubs, "apex")
    found = doctor.apex({doctor.IMPORTED[1]: attempt("import", doctor.IMPORTED[1]).failure})
    assert found.state == "broken"
    assert "is not NVIDIA's" in found.found
    assert f"{stubs}/apex" in found.way_out


def test_what_is_not_there_is_missing_and_no_obstacle() -> None:
    for find in (doctor.transformer_engine, doctor.apex):
        assert (find({}).state, find({}).needed) == ("missing", False)
    assert not doctor.triton({}, []).needed
    assert doctor.triton({}, ["H100"]).way_out == "pip install triton"
    absent = doctor.core("ModuleNotFoundError: No module named 'triton'")
    assert absent.way_out == "pip install triton"


def test_no_compiler_is_an_obstacle_on_cuda_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    here, there = doctor.compiler([]), doctor.compiler(["H100"])
    assert (here.state, here.needed, here.way_out) == ("missing", False, "")
    assert (there.state, there.needed) == ("missing", True)
    assert "install gcc" in there.way_out
    compiler = tmp_path / "clang"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert doctor.compiler(["H100"]).state == "ok"
    monkeypatch.setenv("CC", "none-such -O2")
    assert doctor.compiler(["H100"]).state == "missing"


def test_torch_says_what_it_has() -> None:
    trial = attempt("torch")
    assert trial.failure is None
    said = json.loads(trial.output)
    assert doctor.torch_finding(trial).found == said["version"]
    states = {finding.name: finding.state for finding in doctor.cuda(said)}
    assert (states["cuda"] == "ok") == bool(said["devices"])


def test_a_torch_that_cannot_be_imported_is_told() -> None:
    found = doctor.torch_finding(Trial("", "OSError: libcudnn.so.9: cannot open shared object file"))
    assert (found.state, found.needed) == ("broken", True)
    assert "libcudnn" in found.found


def test_cuda_lists_its_devices_and_wants_nccl_between_them() -> None:
    said = {"version": "2.13.0", "cuda": "13.0", "nccl": "", "devices": ["H100", "H100"], "problem": ""}
    cuda, nccl = doctor.cuda(said)
    assert (cuda.state, cuda.found) == ("ok", "13.0, 2x H100")
    assert (nccl.state, nccl.needed) == ("missing", True)


@pytest.mark.distributed
def test_ranks_exchange_data() -> None:
    assert attempt_ranks(2, "collectives") is None


@pytest.mark.distributed
def test_the_rank_that_fails_is_named_and_a_hang_ends() -> None:
    said = attempt_ranks(2, "import", "none_such")
    assert said is not None
    assert said.startswith("rank ") and said.endswith("ModuleNotFoundError: No module named 'none_such'")
    assert attempt_ranks(2, "collectives", seconds=0.1) == "no answer within 0 s"
    assert attempt("torch", seconds=0.01).failure == "no answer within 0 s"


def test_a_port_that_another_process_took_costs_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["rank 0: DistNetworkError: EADDRINUSE", None, "rank 1: killed"]
    monkeypatch.setattr(doctor, "_attempt_ranks_once", lambda *words, seconds: answers.pop(0))
    assert attempt_ranks(2, "collectives") is None
    assert attempt_ranks(2, "collectives") == "rank 1: killed" and not answers
