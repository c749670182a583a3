from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.diffusion.schedule import PRESETS, FloatArray, MaskSchedule, parse_schedule, register_schedule

DOCS = Path(__file__).parents[2] / "docs"
MIXTURE: dict[str, Any] = {
    "name": "mixture",
    "components": [
        {"weight": 0.8, "schedule": "uniform:0.45,0.55"},
        {"weight": 0.2, "schedule": "uniform:0,1"},
    ],
}
KNOTS: dict[str, Any] = {"name": "knots", "points": [[0.1, 0.0], [0.3, 2.0], [0.6, 0.5], [0.9, 1.0]]}
CURRICULUM: dict[str, Any] = {
    "name": "curriculum",
    "stages": [{"until": 0.3, "schedule": "uniform:0.2,0.4"}, {"until": 1.0, "schedule": MIXTURE}],
}
ANNEAL: dict[str, Any] = {"name": "anneal", "from": "uniform:0.2,0.4", "to": "uniform:0,1", "over": [0.5, 1.0]}
NORMAL = ["truncated_normal:0.5,0.1", "truncated_normal:0.05,0.3", "truncated_normal:1,40"]
LOGIT_NORMAL = ["logit_normal:0,1", "logit_normal:-1,0.4", "logit_normal:0.5,2"]
CONTINUOUS = ["uniform:0,1", "uniform:0.45,0.55", "beta:2,5", "beta:0.5,0.7", "beta:1,1", MIXTURE, KNOTS, CURRICULUM,
              ANNEAL, *NORMAL, *LOGIT_NORMAL]  # fmt: skip
U = (np.arange(4000) + 0.5) / 4000


@pytest.mark.parametrize("spec", CONTINUOUS, ids=str)
def test_inverse_cdf_and_cdf_undo_each_other(spec: Any) -> None:
    schedule = parse_schedule(spec)
    t = schedule.inverse_cdf(U)
    assert t.dtype == np.float64
    assert np.all(np.diff(t) >= 0.0)
    np.testing.assert_allclose(schedule.cdf(t), U, atol=2e-14)


@pytest.mark.parametrize("spec", CONTINUOUS, ids=str)
def test_cdf_is_the_integral_of_the_density(spec: Any) -> None:
    schedule = parse_schedule(spec)
    # Midpoints of cells that are fine near the ends, where a beta density may diverge, and cut at every window edge.
    edges = np.unique(np.concatenate([np.sin(0.5 * np.pi * np.linspace(0, 1, 40001)) ** 2, [0.45, 0.55, 0.2, 0.4]]))
    mass = schedule.density(0.5 * (edges[1:] + edges[:-1])) * np.diff(edges)
    np.testing.assert_allclose(np.cumsum(mass), schedule.cdf(edges[1:]), atol=5e-5)


@pytest.mark.parametrize("spec", [*CONTINUOUS, "point:0.15"], ids=str)
def test_mean_and_expectation_agree_with_the_strata(spec: Any) -> None:
    schedule = parse_schedule(spec)
    t = schedule.sample((np.arange(20000) + 0.5) / 20000)
    assert schedule.mean() == pytest.approx(np.mean(t), abs=1e-6)
    assert schedule.expectation(lambda t: t**2) == pytest.approx(np.mean(t**2), abs=1e-6)


def test_beta_inverts_its_closed_forms() -> None:
    u = np.concatenate([[0.0, 1e-12, 1e-5], U, [1.0]])
    for shape in (0.25, 1.0, 2.0, 7.5):
        one_minus = -np.expm1(np.log1p(-u[:-1]) / shape)
        np.testing.assert_allclose(parse_schedule(f"beta:1,{shape}").inverse_cdf(u[:-1]), one_minus, rtol=2e-12)
        np.testing.assert_allclose(
            parse_schedule(f"beta:{shape},1").inverse_cdf(u), u ** (1 / shape), rtol=2e-13, atol=1e-30
        )
    t = np.linspace(0, 1, 1001)
    beta = parse_schedule("beta:2,2")
    np.testing.assert_allclose(beta.cdf(t), t * t * (3 - 2 * t), atol=1e-15)
    # The CDF is flat at both ends, where rounding of its value moves t most.
    np.testing.assert_allclose(beta.inverse_cdf(t * t * (3 - 2 * t)), t, atol=1e-12)
    np.testing.assert_allclose(beta.density(t), 6 * t * (1 - t), atol=1e-14)


def test_beta_with_large_shapes_is_a_narrow_bell() -> None:
    beta = parse_schedule("beta:500,500")
    t = beta.inverse_cdf(U)
    np.testing.assert_allclose(beta.cdf(t), U, atol=1e-12)
    assert np.std(t) == pytest.approx(0.5 / np.sqrt(1001), rel=2e-3)


def test_strata_of_a_mixture_are_strata_of_its_components() -> None:
    t = parse_schedule(MIXTURE).sample((np.arange(1000) + 0.5) / 1000)
    inside = np.count_nonzero((t >= 0.45) & (t <= 0.55))
    assert inside == 820  # 80 % of the window and a tenth of the other 20 %


def test_atoms_of_a_mixture_are_hit_exactly() -> None:
    spec = [{"weight": 3, "schedule": "point:0.3"}, {"weight": 1, "schedule": "uniform:0,1"}]
    mixture = parse_schedule({"name": "mixture", "components": spec})
    t = mixture.sample(U)
    assert np.count_nonzero(t == 0.3) == 3000
    assert np.all(np.isinf(mixture.density(t[t == 0.3])))
    np.testing.assert_allclose(mixture.density(t[t != 0.3]), 0.25)


def test_mixture_jumps_over_gaps() -> None:
    spec = [{"weight": 1, "schedule": "uniform:0.1,0.2"}, {"weight": 1, "schedule": "uniform:0.8,0.9"}]
    mixture = parse_schedule({"name": "mixture", "components": spec})
    np.testing.assert_allclose(mixture.inverse_cdf(np.array([0.0, 0.25, 0.5, 0.75, 1.0])), [0.1, 0.15, 0.2, 0.85, 0.9])


def test_a_bell_has_its_closed_forms() -> None:
    normal, z = parse_schedule("truncated_normal:0.5,0.1"), (U - 0.5) / 0.1
    share = math.erf(5 / math.sqrt(2))  # of a normal distribution within five standard deviations
    np.testing.assert_allclose(
        normal.density(U), np.exp(-z * z / 2) / (0.1 * math.sqrt(2 * math.pi) * share), rtol=1e-12
    )
    assert normal.mean() == pytest.approx(0.5, abs=1e-12)
    # A normal distribution that is wide beside [0, 1] is uniform on it.
    np.testing.assert_allclose(parse_schedule("truncated_normal:0.3,1000").inverse_cdf(U), U, atol=1e-6)
    # The mean of a normal distribution cut at its mode is sqrt(2 / pi) standard deviations from it.
    tail = parse_schedule("truncated_normal:0,0.01").expectation(lambda t: t)
    assert tail == pytest.approx(0.01 * math.sqrt(2 / math.pi), rel=1e-5)
    logit = parse_schedule("logit_normal:-1,0.4")
    t = logit.inverse_cdf(np.array([0.5, 0.8413447460685429]))
    np.testing.assert_allclose(np.log(t / (1 - t)), [-1.0, -0.6], atol=1e-12)
    assert parse_schedule("logit_normal:0,2").mean() == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_array_equal(logit.density(np.array([0.0, 1.0])), 0.0)
    for spec in (*NORMAL, *LOGIT_NORMAL):
        ends = parse_schedule(spec).sample(np.array([0.0, np.nextafter(1.0, 0.0)]))
        assert 0.0 <= ends[0] < ends[1] <= 1.0


def test_an_anneal_is_a_mixture_whose_weights_move() -> None:
    anneal, first, last = (parse_schedule(spec) for spec in (ANNEAL, ANNEAL["from"], ANNEAL["to"]))
    for progress in (0.0, 0.3, 0.5):
        np.testing.assert_array_equal(anneal.sample(U, progress), first.sample(U))
    np.testing.assert_array_equal(anneal.sample(U, 1.0), last.sample(U))
    np.testing.assert_allclose(anneal.density(U, 0.6), 0.8 * first.density(U) + 0.2 * last.density(U))
    assert [anneal.mean(progress) for progress in (0.5, 0.75, 1.0)] == pytest.approx([0.3, 0.4, 0.5])
    whole = parse_schedule({**ANNEAL, "over": 1})
    assert whole.mean(0.5) == pytest.approx(0.4) and not whole.has_full_support()
    assert parse_schedule({**ANNEAL, "from": "beta:1,1"}).has_full_support()


def test_presets_are_the_schedules_that_they_name() -> None:
    for name, preset in PRESETS.items():
        found = parse_schedule(name)
        assert str(found) == str(parse_schedule({"name": name})) == str(parse_schedule(preset.schedule))
        assert isinstance(preset.schedule, dict) or str(found) == preset.schedule
        assert f"| `{name}` | `{found}` | {preset.source} |" in (DOCS / "objective.md").read_text()
    finish = parse_schedule({"name": "anneal", "from": "paper", "to": "llada", "over": [0.7, 1]})
    assert str(finish) == "anneal(uniform:0.45,0.55 to uniform:0,1 over 0.7 to 1)"


def test_curriculum_changes_at_its_edges() -> None:
    curriculum = parse_schedule(CURRICULUM)
    assert curriculum.mean(0.0) == curriculum.mean(0.2999) == pytest.approx(0.3)
    assert curriculum.mean(0.3) == curriculum.mean(1.0) == pytest.approx(0.5)
    np.testing.assert_array_equal(curriculum.sample(U, 0.1), parse_schedule("uniform:0.2,0.4").sample(U))
    np.testing.assert_array_equal(curriculum.sample(U, 0.5), parse_schedule(MIXTURE).sample(U))


def test_knots_of_a_triangle_have_its_closed_form() -> None:
    triangle = parse_schedule({"name": "knots", "points": [[0, 0], [0.5, 7], [1, 0]]})
    low = U[U < 0.5]
    np.testing.assert_allclose(triangle.inverse_cdf(low), np.sqrt(low / 2), rtol=1e-13)
    assert triangle.density(np.array([0.5]))[0] == pytest.approx(2.0)
    gap = parse_schedule({"name": "knots", "points": [[0.1, 1], [0.2, 0], [0.7, 0], [0.8, 1]]})
    assert not np.any((gap.sample(U) > 0.2) & (gap.sample(U) < 0.7))


def test_knots_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# t density\n0 1\n0.5, 3\n\n1 1  # end\n")
    (tmp_path / "a.json").write_text(json.dumps([[0, 1], [0.5, 3], [1, 1]]))
    inline = parse_schedule({"name": "knots", "points": [[0, 1], [0.5, 3], [1, 1]]})
    for spec in (f"knots:{tmp_path}/a.txt", {"name": "knots", "file": f"{tmp_path}/a.json"}):
        np.testing.assert_array_equal(parse_schedule(spec).sample(U), inline.sample(U))
    (tmp_path / "bad.txt").write_text("0 1\n0.5\n")
    with pytest.raises(ValueError, match=r"bad.txt must be \[t, density\]"):
        parse_schedule(f"knots:{tmp_path}/bad.txt")
    with pytest.raises(ValueError, match=r"none.txt: cannot be read \(No such file"):
        parse_schedule(f"knots:{tmp_path}/none.txt")


@pytest.mark.parametrize(
    ("spec", "is_full"),
    [
        ("uniform:0,1", True),
        ("uniform:0.001,1", False),
        ("point:0.5", False),
        ("beta:1,1", True),
        ("beta:0.5,0.9", True),
        ("beta:2,2", False),
        (MIXTURE, True),
        (CURRICULUM, False),
        (KNOTS, False),
        (ANNEAL, False),
        ("truncated_normal:0.5,0.2", True),
        ("logit_normal:0,1", False),
        ({"name": "knots", "points": [[0, 0.1], [1, 2]]}, True),
    ],
    ids=str,
)
def test_full_support(spec: Any, is_full: bool) -> None:
    assert parse_schedule(spec).has_full_support() is is_full


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom:0,1", "unknown mask schedule 'unifrom'; did you mean 'uniform'"),
        ("uniform:0.5,0.5", "lo must be below hi"),
        ("uniform:0.6,0.5", "lo must be below hi"),
        ("uniform:-0.1,0.5", r"must lie in \[0, 1\]"),
        ("uniform:0.5,1.2", r"must lie in \[0, 1\]"),
        ("uniform:0.5", r"takes 2 number\(s\) \(lo,hi\), got 1"),
        ("uniform:0,1,2", "got 3"),
        ("uniform", "got 0"),
        ("uniform:a,1", "lo must be a finite number, got 'a'"),
        ("uniform:nan,1", "lo must be a finite number"),
        ("beta:0,1", "both shapes must be positive"),
        ("point:1.5", r"must lie in \[0, 1\]"),
        ({"lo": 0}, "a mapping needs a `name`"),
        ({"name": "uniform", "lo": 0, "high": 1}, "unknown key 'high'; did you mean 'hi'"),
        ({"name": "uniform", "lo": 0}, "key 'hi' is missing"),
        ({"name": "uniform", "lo": 0, "hi": True}, "hi must be a finite number, got True"),
        ({"name": "mixture", "components": []}, "components must not be empty"),
        ({"name": "mixture", "components": "uniform:0,1"}, "components must be a list of"),
        ({"name": "mixture", "components": [{"weight": 0, "schedule": "point:0.5"}]}, "every weight must be positive"),
        ({"name": "mixture", "components": [{"weigth": 1, "schedule": "point:0.5"}]}, "did you mean 'weight'"),
        ({"name": "mixture", "components": [{"weight": 1, "schedule": "point:2"}]}, "'point:2': the mask rate"),
        ("mixture:1", "is written as a mapping"),
        ({"name": "knots", "points": [[0, 1]]}, "at least two points"),
        ({"name": "knots", "points": [[0, 1], [0.5, -1]]}, "must not be negative"),
        ({"name": "knots", "points": [[0, 0], [0.5, 0]]}, "at least one density must be positive"),
        ({"name": "knots", "points": [[0.5, 1], [0.4, 1]]}, "must increase strictly"),
        ({"name": "knots", "points": [[0, 1], [1.5, 1]]}, r"must lie in \[0, 1\]"),
        ({"name": "knots", "points": [0.1, 0.2]}, r"must be \[t, density\]"),
        ({"name": "curriculum", "stages": [{"until": 0.5, "schedule": "point:0.5"}]}, "last stage must have until: 1"),
        (
            {
                "name": "curriculum",
                "stages": [{"until": 1.0, "schedule": "point:0.5"}, {"until": 0.5, "schedule": "point:0.5"}],
            },
            "must be positive and increase",
        ),
        ({**ANNEAL, "over": [0.8, 0.5]}, r"over must be \[begin, end\] with 0 <= begin < end <= 1"),
        ({**ANNEAL, "over": "0.5,1"}, r"over must be \[begin, end\], got '0.5,1'"),
        ({**ANNEAL, "over": [0.5, "x"]}, "over must be a finite number, got 'x'"),
        ({**ANNEAL, "too": 1}, "unknown key 'too'; did you mean 'to'"),
        ("anneal:0,1", "is written as a mapping"),
        ("truncated_normal:1.5,0.1", r"mode must lie in \[0, 1\], got 1.5"),
        ("truncated_normal:0.5,0", "std must lie in"),
        ("logit_normal:0,-1", "scale must lie in"),
        ("paper:1", "is the name of uniform:0.45,0.55, and takes nothing else"),
        ({"name": "paper", "lo": 0}, "is the name of uniform:0.45,0.55"),
        ("lada", "did you mean 'llada'"),
        (7, "must be text like"),
    ],
    ids=str,
)
def test_bad_specs_are_refused_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_schedule(spec)
    assert "\n" not in str(caught.value) and "mask_schedule" in str(caught.value)


def test_text_of_a_schedule_parses_back() -> None:
    for text in ("uniform:0.45,0.55", "beta:2,3.5", "point:0.25"):
        assert str(parse_schedule(text)) == text
    assert str(parse_schedule(MIXTURE)) == "mixture(0.8*uniform:0.45,0.55 + 0.2*uniform:0,1)"
    assert str(parse_schedule({"name": "uniform", "lo": 0, "hi": "0.5"})) == "uniform:0,0.5"


def test_a_schedule_needs_only_density_and_inverse_cdf() -> None:
    @register_schedule("test_square")
    class Square(MaskSchedule):
        """t = u^2."""

        def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
            with np.errstate(divide="ignore"):
                return 0.5 / np.sqrt(t)

        def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
            return np.asarray(u) ** 2

    square = parse_schedule("test_square")
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(square.cdf(t), np.sqrt(t), atol=1e-15)
    assert square.mean() == pytest.approx(1 / 3, abs=1e-9)
    assert square.has_full_support()
    for name in ("uniform", "bell"):
        with pytest.raises(ValueError, match="registered already"):
            register_schedule(name)(Square)


def test_a_schedule_that_leaves_the_unit_interval_is_refused() -> None:
    class Wrong(MaskSchedule):
        def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
            return np.ones_like(t)

        def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
            return 1.5 * np.asarray(u)

    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        Wrong().sample(U)


def test_schedules_and_corruption_do_not_import_torch() -> None:
    code = (
        "import sys; import megatron_md.diffusion.schedule, megatron_md.diffusion.corruption; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
