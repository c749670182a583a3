"""The command: the bound of training validation, alike on two ranks, compared in pairs, resumed, refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from tests.ranks import RankError, run_ranks
from tests.trained_run import run_config


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
def test_it_is_the_bound_of_training_validation_on_every_layout(run: Path) -> None:
    summary = json.loads((run / "run" / "summary.json").read_text())
    same = ("--estimator", "exact", "--passes", "1", "--seed", "4321")
    one = figures(run, *same)
    assert one["nelbo"] == pytest.approx(summary["val_nelbo"], rel=1e-5)
    assert one["tokens"] > 100 and one["forward_passes"] == 12 and one["bits_per_byte"] > 1.0
    for split in ((), ("--tensor", "1"), ("--pipeline", "2")):  # tensor-, data- and pipeline-parallel
        two = figures(run, *same, *split, ranks=2)
        for key in ("nelbo", "stderr", "bits_per_byte", "ppl_bound", "tokens", "forward_passes"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (split, key)
    # The same seed gives the same figures to the bit, another one others.
    assert figures(run, *same) == one
    assert figures(run, *same[:-1], "4322")["nelbo"] != one["nelbo"]


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


def killed_at_once(state: str, *words: str) -> None:
    """On a rank: an evaluation whose process dies as soon as its state holds a part of the first pass."""
    from megatron_md.diffusion import nelbo
    from megatron_md.evaluate import likelihood

    write = likelihood.replace_file

    def write_and_die(path: Path, content: str) -> None:
        write(path, content)
        os.kill(os.getpid(), signal.SIGKILL)

    likelihood.replace_file = write_and_die  # type: ignore[assignment]
    nelbo._MICRO_BATCHES_AT_ONCE = 1
    evaluate(*words, "--state", state)


@pytest.mark.distributed
def test_an_evaluation_survives_kill_9(run: Path) -> None:
    state = run / "killed.json"
    words = ("--passes", "2", "--micro-batch-size", "5")
    whole = figures(run, *words)
    with pytest.raises(RankError, match="died without a word"):
        data = ("--nelbo", str(run / "valid"), "--rows", "12")
        run_ranks(killed_at_once, 1, str(state), str(run / "run"), *data, *words)
    (first,) = json.loads(state.read_text())["passes"]
    assert sum(value is not None for value in first[0]) == 5
    assert figures(run, *words, "--state", str(state)) == whole


@pytest.mark.distributed
def test_perplexity_per_word_counts_the_words_of_the_file(run: Path) -> None:
    text = "\n A value @-@ of x , and y . \n = Title = \n\n return 2 @,@ 500 \n"
    file = run / "wiki.tokens"
    file.write_text(text)
    output = run / "words.json"
    words = ["--nelbo", str(file), "--words", "--passes", "1", "--seed", "3", "--json", str(output)]
    lines = [*words, "--detokenizer", "wikitext", "--lines"]
    found = []
    for arguments in (words, lines):
        assert run_ranks(evaluate, 1, str(run / "run"), *arguments) == [0]
        found.append(json.loads(output.read_text()))
    for figures_ in found:
        assert figures_["words"] == len(text.split()) == 16
        nats = figures_["nelbo"] * figures_["tokens"]
        assert figures_["word_ppl"] == pytest.approx(math.exp(nats / 16), rel=1e-9)
        assert figures_["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures_["bytes"], rel=1e-9)
    whole, apart = found
    plain = ["A value-of x, and y.", "= Title =", "return 2,500"]
    assert (whole["bytes"], apart["bytes"]) == (len(text), sum(map(len, plain)))


def refusal(folder: Path, text: str, *words: str) -> None:
    """On a rank: the command refuses, saying so."""
    import contextlib
    import io

    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        data = [] if {"--nelbo", "--generative"} & set(words) else ["--nelbo", str(folder / "valid")]
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
    (run / "blank.txt").write_text("\n\n")
    text_file = str(run / "text" / "1.py")
    other = run / "other"
    shutil.copytree(run / "run", other)
    words = ["--input", str(run / "text"), "--output", str(other / "tokenizer.model"), "--vocab", "330"]
    assert main(["tokenizer", "train", *words]) == 0
    for text, *words in (
        ("passes must be at least 1 and at most max_passes 1", "--max-passes", "1"),
        ("is a corpus; give it alone", "--nelbo", str(run / "valid"), str(run / "text" / "1.py")),
        ("nowhere.txt: cannot be read as text", "--nelbo", str(run / "nowhere.txt")),
        ("no picture format 'txt'", "--plot", str(run / "a.txt")),
        ("leave out --against", "--state", str(run / "s.json"), "--against", str(run / "run")),
        ("does not exist", "--json", str(run / "no" / "a.json")),
        ("stderr must be positive, got 0.0", "--stderr", "0"),
        ("blank.txt: is empty", "--nelbo", str(run / "blank.txt")),
        ("--words needs all of the text", "--nelbo", text_file, "--words", "--rows", "1"),
        ("are for text files", "--words"),
        ("has another tokenizer than", "--against", str(other)),
    ):
        refusal(run, text, *words)


def test_layouts_that_do_not_fit_are_refused(run: Path) -> None:
    from megatron_md.run.saved import Placement, open_run

    for placement, message in (
        (Placement(), "parallel.tensor 3 does not divide model.heads"),
        (Placement(pipeline=3), "parallel.pipeline 3 does not divide model.layers"),
        (Placement(tensor=2), "--tensor 2 x --pipeline 1 does not divide the 3 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            open_run(run / "run", placement, world_size=3)
