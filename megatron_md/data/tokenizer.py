"""Tokenizers: encoding and decoding, and training of SentencePiece models that keep every character of code."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_md.data.entries import Document
from megatron_md.data.tokenizer_json import JsonTokenizer
from megatron_md.errors import UserError
from megatron_md.files import replacing
from megatron_md.json_file import LARGE, read_regular

JSON_NAME = "tokenizer.json"
MASK, EOS, PAD, UNKNOWN = "<mask>", "<eos>", "<pad>", "<unk>"
SPACE_PIECE = "\u2581"  # how SentencePiece spells a space; a literal one is encoded through its bytes
TABS = ["\t" * count for count in range(1, 5)]  # SentencePiece cannot learn pieces with tabs: it reserves the character
FEWEST_PIECES = 256 + len((MASK, EOS, PAD, UNKNOWN)) + len(TABS) + 1  # the bytes, what else is always there, one more
TRAINING_BYTES = 3_000_000
EXCERPT_CHARACTERS = 4_000
TRAINING_THREADS = 4  # fixed, whatever the machine: the model file depends on it


class TokenizerModel(Protocol):
    """What a `Tokenizer` needs of a model file."""

    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    special_names: dict[int, str]
    token_names: dict[str, str]
    chat_template: str | None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; under `special` what spells a special token becomes it."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, none of them special."""

    def kept(self, text: str) -> str:
        """What of a text must survive encoding."""


class Tokenizer:
    """A SentencePiece model or a `tokenizer.json` of Hugging Face, with mask, end-of-text and padding tokens.

    Attributes:
        path: the model file.
        sha256: hash of the model file; it travels into shards, runs and checkpoints.
        vocab_size: number of pieces (largest id + 1).
        mask_token_id, eos_token_id, pad_token_id: ids of the special tokens (no pad piece: `<eos>` pads).
        special_names: every special token by its id.
        token_names: the tokens that a chat template may name, by `eos_token`, `bos_token` and the like.
        chat_template: Jinja of the chat template beside the file, None where there is none.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mask_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        """Load a model file.

        Args:
            path: a SentencePiece model, a `tokenizer.json`, or a folder that holds the latter.
            mask_token: name of the token that stands for a masked one. Where it is not given: `<mask>` in a
                SentencePiece model; as `megatron_md.data.tokenizer_json` says in a `tokenizer.json`.
            eos_token: name of the token that ends a document; else the model's own, as above.
            pad_token: name of the token that fills rows; else the model's own, or `eos_token`.

        Raises:
            UserError: the file is missing, not a tokenizer, or lacks a mask or an end-of-text token.
        """
        self.path = Path(path)
        if (self.path / JSON_NAME).is_file():
            self.path /= JSON_NAME
        if not self.path.exists():
            raise UserError(f"{path}: no such tokenizer file; train one with `megatron-md tokenizer train`")
        data = read_regular(self.path, "train one with `megatron-md tokenizer train`", most_bytes=LARGE)
        if not data.strip():
            raise UserError(f"{self.path}: is empty; train one with `megatron-md tokenizer train`")
        tokens = {"mask_token": mask_token, "eos_token": eos_token, "pad_token": pad_token}
        self._model: TokenizerModel
        # By content, since a run keeps its copy under one name, whatever the kind.
        if data.lstrip().startswith(b"{"):
            self._model = JsonTokenizer(self.path, data, tokens)
        else:
            self._model = _SentencePiece(self.path, data, tokens)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._model.vocab_size
        self.mask_token_id = self._model.mask_token_id
        self.eos_token_id = self._model.eos_token_id
        self.pad_token_id = self._model.pad_token_id
        self.special_names = self._model.special_names
        self.token_names = self._model.token_names
        self.chat_template = self._model.chat_template

    def encode(self, text: str, *, special: bool = False) -> npt.NDArray[np.int64]:
        """Token ids [n] of a text, without any special token: `<mask>` in a text is six characters like any other.

        Args:
            text: the text.
            special: what spells a special token becomes it, as in the text that a chat template writes.

        Raises:
            UserError: the text holds lone surrogates, which have no UTF-8 form.
        """
        try:
            ids = self._model.encode(text, special=special)
        except (RuntimeError, UnicodeEncodeError, TypeError) as error:
            raise UserError("cannot encode a text with lone surrogates: it has no UTF-8 form") from error
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer], *, show_special: bool = False) -> str:
        """Text of token ids [n]; special tokens are left out, or spelt like `<mask>` under `show_special`.

        So are ids that the tokenizer lacks (`<340>`): a model may have more rows than it, and writes them untrained.
        """
        text: list[str] = []
        run: list[int] = []
        special_names = self.special_names
        for id in np.asarray(ids, dtype=np.int64).tolist():
            if id in special_names or not 0 <= id < self.vocab_size:
                text.append(self._model.decode(run))
                text.append(special_names.get(id, f"<{id}>") if show_special else "")
                run = []
            else:
                run.append(id)
        text.append(self._model.decode(run))
        return "".join(text)

    def check_round_trip(self, document: Document) -> None:
        """Check that a document survives encoding.

        Raises:
            UserError: it does not; names the document and the first place that differs.
        """
        decoded, expected = self.decode(self.encode(document.text)), self._model.kept(document.text)
        if decoded != expected:
            pairs = zip(decoded, expected, strict=False)
            shorter = min(len(decoded), len(expected))
            at = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
            raise UserError(
                f"{self.path}: the tokenizer does not keep the text of {document.name}: at character {at} "
                f"{expected[at : at + 20]!r} becomes {decoded[at : at + 20]!r}; train it without normalisation"
            )

    def save(self, path: str | Path) -> None:
        """Copy the model file; for a `tokenizer.json` a `tokenizer_config.json` beside it names the special tokens."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(self._model, JsonTokenizer):
            self._model.save_config(path.parent)
        if not path.exists() or not path.samefile(self.path):
            with replacing(path) as temporary:
                shutil.copyfile(self.path, temporary)


class _SentencePiece:
    """A SentencePiece model."""

    chat_template: str | None = None

    def __init__(self, path: Path, data: bytes, tokens: dict[str, str | None]) -> None:
        import sentencepiece

        self._path = path
        sentencepiece.set_min_log_level(2)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [self._processor.id_to_piece(id) for id in range(self._processor.vocab_size())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a SentencePiece model, or one whose pieces are not UTF-8") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.mask_token_id = self._special(tokens["mask_token"] or MASK)
        own_eos, own_pad = self._processor.eos_id(), self._processor.pad_id()
        self.eos_token_id: int = self._special(tokens["eos_token"]) if tokens["eos_token"] else own_eos
        if self.eos_token_id < 0:
            raise UserError(f"{path}: the tokenizer has no end-of-text piece, which separates documents")
        self.pad_token_id: int = own_pad if own_pad >= 0 else self.eos_token_id
        if tokens["pad_token"]:
            self.pad_token_id = self._special(tokens["pad_token"])
        self.special_names: dict[int, str] = {
            id: piece for id, piece in enumerate(pieces) if self._processor.is_control(id)
        }
        self.token_names = {
            "eos_token": pieces[self.eos_token_id],
            "pad_token": pieces[self.pad_token_id],
            "mask_token": pieces[self.mask_token_id],
        }
        self._special_ids = {piece: id for id, piece in self.special_names.items()}
        self._special_text = re.compile(f"({'|'.join(map(re.escape, self._special_ids))})")
        self._space_piece_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_PIECE.encode()]

    def encode(self, text: str, *, special: bool) -> list[int]:
        if special:
            parts = self._special_text.split(text)
            found = (
                [self._special_ids[part]] if number % 2 else self._encode(part) for number, part in enumerate(parts)
            )
            return list(itertools.chain.from_iterable(found))
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_PIECE)):
            if number:
                ids += self._space_piece_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def kept(self, text: str) -> str:
        return text

    def _special(self, piece: str) -> int:
        id: int = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(id) != piece:
            raise UserError(
                f"{self._path}: the tokenizer has no {piece} piece; train one with `megatron-md tokenizer train`"
            )
        return id


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int, output: str | Path, *, training_bytes: int = TRAINING_BYTES
) -> Tokenizer:
    """Train a unigram SentencePiece model that keeps text exactly, and write it.

    Identity normalisation, byte fallback, no dummy prefix; runs of spaces and pieces that end in newlines are
    learned, since they carry the structure of code. The same documents give the same file.

    Args:
        documents: the corpus; a sample spread evenly over it is trained on.
        vocab_size: number of pieces, the special tokens and the 256 byte pieces included.
        output: model file to write.
        training_bytes: size of the sample.

    Returns:
        The tokenizer, loaded from `output` and checked: 200 excerpts survive a round trip.

    Raises:
        UserError: a size is out of range, there is no text or too little for `vocab_size`, or the round trip fails.
    """
    if vocab_size < FEWEST_PIECES:
        raise UserError(
            f"--vocab {vocab_size}: must be at least {FEWEST_PIECES}: bytes and special tokens take the rest"
        )
    if training_bytes < 1:
        raise UserError(f"--sample-bytes {training_bytes}: must be at least 1")
    sample = _sample(documents, training_bytes)
    if not sample:
        raise UserError("no text to train a tokenizer on; give text files, folders of them, or 'embedded'")
    model = _trained_model(sample, vocab_size)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_bytes(model)
        tokenizer = Tokenizer(temporary)
        for excerpt in sample[:: max(1, len(sample) // 200)]:
            tokenizer.check_round_trip(excerpt)
    return Tokenizer(output)


def _trained_model(sample: list[Document], vocab_size: int) -> bytes:
    """The file of a SentencePiece model that is trained on these excerpts."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            unk_id=0,
            pad_id=1,
            eos_id=2,
            bos_id=-1,
            unk_piece=UNKNOWN,
            pad_piece=PAD,
            eos_piece=EOS,
            control_symbols=[MASK],
            user_defined_symbols=TABS,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"cannot train {vocab_size} pieces on this text: {_advice(error)}") from error
    return model.getvalue()


def _advice(error: RuntimeError) -> str:
    """SentencePiece's complaint without its source location, with the way out."""
    most = re.search(r"size too high .*<= (\d+)", str(error))
    least = re.search(r"smaller than required_chars.* vs (\d+)", str(error))
    if most is not None:
        return f"it yields {most[1]} at most; ask for fewer or give more text"
    if least is not None:
        return f"its characters and the byte pieces alone take {least[1]}; ask for more"
    return " ".join(str(error).split())


def _sample(documents: Iterable[Document], size: int) -> list[Document]:
    """Excerpts of about `size` characters in all, spread evenly over the corpus, in bounded memory."""
    sample: list[Document] = []
    stride, held = 1, 0
    for number, excerpt in enumerate(_excerpts(documents)):
        if number % stride == 0:
            sample.append(excerpt)
            held += len(excerpt.text)
        if held > 2 * size and len(sample) > 1:
            sample, stride = sample[::2], stride * 2
            held = sum(len(kept.text) for kept in sample)
    count = max(1, round(len(sample) * min(1.0, size / max(1, held))))
    return [sample[i * len(sample) // count] for i in range(count)] if sample else []


def _excerpts(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents cut before line starts into excerpts of bounded length."""
    for document in documents:
        start = 0
        while start < len(document.text):
            end = start + EXCERPT_CHARACTERS
            if end < len(document.text):
                line_start = document.text.rfind("\n", start + 1, end)
                end = line_start if line_start > start else end
            yield Document(document.name, document.text[start:end])
            start = end


def _sentences(sample: Iterable[Document]) -> Iterator[str]:
    """What SentencePiece trains on: it skips sentences that hold a tab."""
    for excerpt in sample:
        yield from (part for part in excerpt.text.split("\t") if part)
