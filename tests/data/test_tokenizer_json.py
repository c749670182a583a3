"""Tokenizers of Hugging Face: special tokens are found, texts survive, ids of LLaDA's size fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.cli import main
from megatron_md.data.builder import build_shards
from megatron_md.data.entries import Document
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import all_documents

tokenizers = pytest.importorskip("tokenizers")

LLADA = {"<|startoftext|>": 126080, "<|endoftext|>": 126081, "<|mdm_mask|>": 126336, "<|reserved|>": 126348}
HARD_TEXTS = [
    "def f():\n\t\treturn  1   \n\n\n",
    " leading and trailing blanks   ",
    "naïve – 中文 \U0001f600 \u00a0\u2003 e\u0301 ﬁ ½",
    "control \x00\x01\x7f \ufeff",
    "<|endoftext|> and <|mdm_mask|> in a text",
    "",
]


def make(
    folder: Path,
    code: list[Document],
    special: dict[str, int] = LLADA,
    config: dict[str, Any] | None = None,
    normalizer: str | None = None,
) -> Path:
    """A byte-level BPE of 400 pieces with special tokens at given ids."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator((document.text for document in code), trainer)
    content = json.loads(bpe.to_str())
    content["normalizer"] = None if normalizer is None else {"type": normalizer}
    content["model"]["vocab"].update(special)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # Not marked as special, as in some models: text that spells them must not become them all the same.
    content["added_tokens"] = [{"id": id, "content": name, "special": False, **flags} for name, id in special.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_ids_of_llada(tmp_path: Path, code: list[Document]) -> None:
    tokenizer = Tokenizer(make(tmp_path / "llada", code, config={"eos_token": "<|endoftext|>", "auto_map": "x.Y"}))
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (126336, 126081, 126081)
    assert tokenizer.vocab_size == 126349
    assert tokenizer.path == tmp_path / "llada" / "tokenizer.json"
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int64 and not np.isin(ids, [126336, 126081]).any()
    assert tokenizer.decode([126336, *tokenizer.encode("a"), 126081], show_special=True) == "<|mdm_mask|>a<|endoftext|>"
    assert tokenizer.decode([126336, *tokenizer.encode("a"), 126081]) == "a"
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode("\ud800")


def test_shards_of_llada_take_four_bytes(tmp_path: Path, code: list[Document]) -> None:
    folder = make(tmp_path / "llada", code)
    manifest = build_shards(code, folder / "tokenizer.json", tmp_path / "out", workers=2)
    assert (manifest.dtype, manifest.mask_id, manifest.eos_id) == ("uint32", 126336, 126081)
    tokenizer = Tokenizer(folder)
    assert [tokenizer.decode(tokens) for tokens in all_documents(manifest)] == [document.text for document in code]
    assert manifest.tokenizer_sha256 == tokenizer.sha256


def test_special_tokens_by_argument_config_and_custom(tmp_path: Path, code: list[Document]) -> None:
    special = {"<odd>": 500, "<stop>": 501, "<fill>": 502, "<|mask|>": 503, "<|endoftext|>": 504}
    config = {"mask_token": {"content": "<odd>"}, "eos_token": "<stop>", "pad_token": None}
    tokenizer = Tokenizer(make(tmp_path / "a", code, special, config))
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (500, 501, 501)
    tokenizer = Tokenizer(tmp_path / "a", mask_token="<|mask|>", pad_token="<fill>")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (503, 501, 502)
    tokenizer = Tokenizer(make(tmp_path / "b", code, special))
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (503, 504, 504)
    with pytest.raises(ValueError, match=r"its mask_token '<no>' is not among its added tokens"):
        Tokenizer(tmp_path / "b", mask_token="<no>")
    with pytest.raises(ValueError, match=r"the mask token '<stop>' must differ from eos and pad"):
        Tokenizer(tmp_path / "a", mask_token="<stop>")
    make(tmp_path / "c", code, {"<stop>": 501})
    with pytest.raises(ValueError, match=r"no mask_token known; name .* tokenizer import --mask-token"):
        Tokenizer(tmp_path / "c")


def test_import_settles_the_special_tokens(
    tmp_path: Path, code: list[Document], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source", code, {"<odd>": 500, "<stop>": 501})
    words = ["--mask-token", "<odd>", "--eos-token", "<stop>", "--output", str(tmp_path / "taken")]
    assert main(["tokenizer", "import", str(source), *words]) == 0
    assert "502 tokens, mask 500, eos 501, pad 501" in capsys.readouterr().out
    assert (tmp_path / "taken" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    taken = Tokenizer(tmp_path / "taken")
    # A run keeps its copy under the name of a SentencePiece model.
    taken.save(tmp_path / "run" / "tokenizer.model")
    copy = Tokenizer(tmp_path / "run" / "tokenizer.model")
    assert (copy.mask_token_id, copy.eos_token_id, copy.sha256) == (500, 501, taken.sha256)
    copy.save(copy.path)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]


def test_composing_normalizers_pass_and_lossy_ones_are_named(tmp_path: Path, code: list[Document]) -> None:
    document = Document("x", "e\u0301 A")
    Tokenizer(make(tmp_path / "nfc", code, normalizer="NFC")).check_round_trip(document)
    with pytest.raises(ValueError, match=r"does not keep the text of x: at character 2 'A' becomes 'a'"):
        Tokenizer(make(tmp_path / "lower", code, normalizer="Lowercase")).check_round_trip(Document("x", "b A"))


def test_bad_files_are_one_clear_line(tmp_path: Path, code: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(tmp_path / "x", code) / "tokenizer.json"
    content = json.loads(file.read_text())
    for bad in ("{", "{}", '{"added_tokens": [1]}'):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"not a tokenizer\.json of the tokenizers library"):
            Tokenizer(file)
    file.write_text(json.dumps({**content, "model": {"type": "none"}}))
    with pytest.raises(ValueError, match="the tokenizers library cannot read it"):
        Tokenizer(file)
    content["added_tokens"][1]["id"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the added token '<\|endoftext\|>' should have id 7, but has another one"):
        Tokenizer(file)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs tokenizers: pip install 'megatron-md\[data\]'"):
        Tokenizer(file)
