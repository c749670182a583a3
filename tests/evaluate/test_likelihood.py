"""The command: the bound of training validation, alike on two ranks, compared in pairs, resumed, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from tests.evaluate.conftest import run_config
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    return trained


def evaluate(*words: str) -> int:
    return main(["evaluate", *words])


def figures(folder: Path, *words: str, ranks: int = 1, run: str = "run") -> dict[str, Any]:
    output = folder / "figures.json"
    data = ["--nelbo", str(folder / "valid"), "--rows", "12"]
    codes = run_ranks(evaluate, ranks, str(folder / run), *data, "--json", str(output), *words)
    assert codes == [0] * ranks
    content: dict[str, Any] = json.loads(output.read_text())
    return content


@pytest.mark.distributed
def test_it_is_the_bound_of_training_validation_on_one_rank_and_two(run: Path) -> None:
    summary = json.loads((run / "run" / "summary.json").read_text())
    same = ("--estimator", "exact", "--passes", "1", "--seed", "4321")
    one = figures(run, *same)
    assert one["nelbo"] == pytest.approx(summary["val_nelbo"], rel=1e-5)
    assert one["tokens"] > 100 and one["forward_passes"] == 12 and one["bits_per_byte"] > 1.0
    two = figures(run, *same, ranks=2)
    assert two["nelbo"] == pytest.approx(one["nelbo"], rel=1e-5)


@pytest.mark.distributed
def test_runs_are_compared_in_pairs_and_drawn(run: Path) -> None:
    picture = run / "ce.svg"
    found = figures(run, "--against", str(run / "causal"), "--plot", str(picture))
    assert found["estimator"]["name"] == "complementary"
    assert found["against"]["estimator"]["name"] == "autoregressive" and found["against"]["mask_stderr"] == 0.0
    difference = found["nelbo"] - found["against"]["nelbo"]
    assert found["difference"]["difference"] == pytest.approx(difference, abs=1e-9)
    assert "mask rate t" in picture.read_text()
    causal = json.loads((run / "causal" / "summary.json").read_text())
    assert found["against"]["nelbo"] == pytest.approx(causal["val_nelbo"], rel=1e-5)


@pytest.mark.distributed
def test_an_evaluation_goes_on_from_its_state(run: Path) -> None:
    state = run / "state.json"
    whole = figures(run, "--passes", "3")
    figures(run, "--passes", "1", "--state", str(state))
    assert figures(run, "--passes", "3", "--state", str(state)) == whole
    state.write_text("{}")
    run_ranks(refusal, 1, run, "not the state of an evaluation", "--state", str(state))


def refusal(folder: Path, text: str, *words: str) -> None:
    """On a rank: the command refuses, saying so."""
    import contextlib
    import io

    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        data = [] if "--nelbo" in words else ["--nelbo", str(folder / "valid")]
        assert main(["evaluate", str(folder / "run"), *data, *words]) == 2
    assert text in error.getvalue() and len(error.getvalue().splitlines()) == 1, error.getvalue()


def test_text_files_are_cut_into_rows(run: Path) -> None:
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.evaluate.rows import evaluation_rows

    tokenizer = Tokenizer(run / "tokenizer.model")
    files = [str(run / "text" / f"{number}.py") for number in range(2)]
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    config = run_config(run, "run", data={"document_attention": "within_document"})
    rows = evaluation_rows(files, [config], tokenizer, count=1000)
    tokens = rows.tokens_RL.ravel()[rows.is_maskable_RL.ravel()]
    assert tokenizer.decode(tokens) == "".join(texts)
    assert rows.bytes == sum(len(text.encode()) for text in texts)
    assert rows.cu_seqlens is not None and all(cuts[0] == 0 and cuts[-1] == 32 for cuts in rows.cu_seqlens)
    first = len(tokenizer.encode(texts[0])) + 1
    assert first % 32 in rows.cu_seqlens[first // 32]
    # What one of several models cannot score, none of them does; rows are as long as the shortest's.
    other = run_config(run, "run", objective={"right_shift": True}, data={"seq_length": 16})
    shifted = evaluation_rows(files, [config, other], tokenizer, count=2)
    assert shifted.tokens_RL.shape == (2, 16) and not shifted.is_maskable_RL[:, 0].any()


def test_bad_input_is_refused_by_name(run: Path) -> None:
    for text, *words in (
        ("passes must be at least 1 and at most max_passes 1", "--max-passes", "1"),
        ("is a corpus; give it alone", "--nelbo", str(run / "valid"), str(run / "text" / "1.py")),
        ("nowhere.txt: cannot be read as text", "--nelbo", str(run / "nowhere.txt")),
        ("no picture format 'txt'", "--plot", str(run / "a.txt")),
        ("leave out --against", "--state", str(run / "s.json"), "--against", str(run / "run")),
        ("does not exist", "--json", str(run / "no" / "a.json")),
    ):
        refusal(run, text, *words)
