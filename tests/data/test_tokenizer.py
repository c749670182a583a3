"""The tokenizer: text survives, special tokens stay apart, training is repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_md.data.entries import Document
from megatron_md.data.tokenizer import Tokenizer, train_tokenizer

HARD_TEXTS = [
    "def f():\n\t\treturn  1   \n\n\n",
    " leading and trailing blanks   ",
    "\t" * 11 + "x\r\ny\r",
    "naïve – 中文 \U0001f600 \u00a0\u2003 e\u0301 ﬁ ½",
    "control \x00\x01\x7f \ufeff",
    "\u2581 SentencePiece's own space \u2581\u2581 \u2581",
    "<mask> <eos> <pad> <unk> <0x41>",
    "",
    " ",
    "\n",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]).any()


def test_corpus_survives(tokenizer: Tokenizer, code: list[Document]) -> None:
    assert all(tokenizer.decode(tokenizer.encode(document.text)) == document.text for document in code)


def test_whitespace_of_code_is_cheap(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\t\t\t\t")) == 1
    assert len(tokenizer.encode("        ")) <= 2


def test_special_tokens_are_distinct_and_shown_on_request(tokenizer: Tokenizer) -> None:
    special = [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(special)) == 3 and max(special) < tokenizer.vocab_size == 330
    ids = np.concatenate([tokenizer.encode("a b"), special, tokenizer.encode(" c")])
    assert tokenizer.decode(ids) == "a b c"
    assert tokenizer.decode(ids, show_special=True) == "a b<mask><eos><pad> c"


def test_ids_that_only_a_larger_model_has_are_no_text(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size
    ids = [*tokenizer.encode("a b").tolist(), beyond, beyond + 99, *tokenizer.encode(" c").tolist()]
    assert tokenizer.decode(ids) == "a b c"
    assert tokenizer.decode(ids, show_special=True) == f"a b<{beyond}><{beyond + 99}> c"


def test_training_is_repeatable(tokenizer: Tokenizer, code: list[Document], tmp_path: Path) -> None:
    again = train_tokenizer(iter(code), 330, tmp_path / "new" / "again.model")
    assert again.sha256 == tokenizer.sha256
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["again.model"]


def test_sample_bounds_the_training_text(code: list[Document], tmp_path: Path) -> None:
    small = train_tokenizer(code, 320, tmp_path / "small.model", training_bytes=20_000)
    unseen = Document("unseen", "Ωμέγα\n")
    small.check_round_trip(unseen)
    assert len(small.encode(code[0].text)) < len(code[0].text)


def test_lossy_tokenizer_is_named(tmp_path: Path, code: list[Document]) -> None:
    import sentencepiece

    sentences = [line for document in code for line in document.text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=200,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    lossy = Tokenizer(tmp_path / "lossy.model")
    with pytest.raises(
        ValueError, match=r"lossy\.model: the tokenizer does not keep the text of x\.py: at character 2"
    ):
        lossy.check_round_trip(Document("x.py", "a  b"))


def test_bad_input_is_one_clear_line(tmp_path: Path, tokenizer: Tokenizer, code: list[Document]) -> None:
    with pytest.raises(ValueError, match=r"absent\.model: no such tokenizer file"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "junk.model")
    with pytest.raises(ValueError, match=r"cannot train 100000 pieces on this text: it yields \d+ at most"):
        train_tokenizer(code[:2], 100_000, tmp_path / "large.model")
    with pytest.raises(ValueError, match=r"cannot train 270 pieces on this text: .* alone take \d+; ask for more"):
        train_tokenizer(code, 270, tmp_path / "small.model")
    with pytest.raises(ValueError, match=r"no text to train"):
        train_tokenizer([], 330, tmp_path / "none.model")
    with pytest.raises(ValueError, match=r"lone surrogates"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("size", [-5, 0, 264])
def test_sizes_out_of_range_are_refused_by_name(size: int, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^--vocab {size}: must be at least 265: bytes and special tokens take the rest$"
    ):
        train_tokenizer([Document("a", "text")], size, tmp_path / "t.model")
    with pytest.raises(ValueError, match=r"^--sample-bytes 0: must be at least 1$"):
        train_tokenizer([Document("a", "text")], 300, tmp_path / "t.model", training_bytes=0)
    assert list(tmp_path.iterdir()) == []
