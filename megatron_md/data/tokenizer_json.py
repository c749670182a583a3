"""Tokenizers of the Hugging Face `tokenizers` library: a `tokenizer.json`, with its special tokens.

The mask, end-of-text and padding tokens are those that are asked for, else those of a `tokenizer_config.json` beside
the file, else added tokens with a customary name (LLaDA and Dream name theirs so). Only JSON is read, no code.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from megatron_md.data.optional import optional_package
from megatron_md.data.shards import LARGEST_VOCABULARY
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.json_file import parse_json, read_json, read_regular

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
CUSTOMARY = {
    "mask_token": ("<mask>", "<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[MASK]"),
    "eos_token": ("<eos>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    "pad_token": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
}


class JsonTokenizer:
    """The model of a `tokenizer.json`, as `megatron_md.data.tokenizer.Tokenizer` uses it.

    Attributes:
        vocab_size: largest token id + 1, added tokens included.
        mask_token_id, eos_token_id, pad_token_id: ids of the special tokens.
        special_names: every special token by its id.
        token_names: the tokens that a chat template may name, by `eos_token`, `bos_token` and the like.
        chat_template: Jinja of the chat template beside the file, None where there is none.
    """

    def __init__(self, path: Path, data: bytes, tokens: dict[str, str | None]) -> None:
        """Load a model.

        Args:
            path: where it lies.
            data: its content.
            tokens: names of the special tokens by `mask_token`, `eos_token`, `pad_token`; None: to be found.

        Raises:
            UserError: it is malformed, `tokenizers` is not installed, or a special token is missing.
        """
        library = optional_package("tokenizers", str(path))
        content = parse_json(data, path, "not a tokenizer.json of the tokenizers library")
        added, normalizer = _added_tokens(path, content), content.get("normalizer")
        configured = _configured(path.with_name(CONFIG_NAME))
        names = _special_names(path, {**configured, **{kind: name for kind, name in tokens.items() if name}}, added)
        for name in names.values():
            # Otherwise a text that spells the token would be encoded as the token itself.
            added[name]["special"] = True
        try:
            self._tokenizer = library.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path}: the tokenizers library cannot read it ({str(error)[:200]})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._is_nfc = isinstance(normalizer, dict) and normalizer.get("type") == "NFC"
        for name, token in added.items():
            if self._tokenizer.token_to_id(name) != token["id"]:
                raise UserError(f"{path}: the added token {name!r} should have id {token['id']}, but has another one")
        self.mask_token_id, self.eos_token_id, self.pad_token_id = (
            int(added[names[kind]]["id"]) for kind in ("mask_token", "eos_token", "pad_token")
        )
        if self.mask_token_id in (self.eos_token_id, self.pad_token_id):
            raise UserError(f"{path}: the mask token {names['mask_token']!r} must differ from eos and pad")
        self.special_names = {int(token["id"]): name for name, token in added.items() if token.get("special")}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(
                f"{path}: a token has the id {self.vocab_size - 1}; {LARGEST_VOCABULARY - 1} is the largest"
            )
        self.token_names = {**configured, **names}
        self.chat_template = _chat_template(path)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; under `special` what spells a special token becomes it."""
        self._tokenizer.encode_special_tokens = not special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, none of them special."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def kept(self, text: str) -> str:
        """What of a text must survive: Unicode's composed form where the model's normalizer is NFC, else all of it."""
        return unicodedata.normalize("NFC", text) if self._is_nfc else text

    def save_config(self, folder: Path) -> None:
        """Write special tokens and chat template into the `tokenizer_config.json` of a folder."""
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        replace_file(folder / CONFIG_NAME, json.dumps({**self.token_names, **template}, indent=1) + "\n")


def _added_tokens(path: Path, content: Any) -> dict[str, dict[str, Any]]:
    """The added tokens of a `tokenizer.json`, by what they stand for."""
    added = content.get("added_tokens") if isinstance(content, dict) else None
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library: it has no list of added_tokens")
    if not all(isinstance(token.get("content"), str) and type(token.get("id")) is int for token in added):
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library: an added token lacks content or id")
    return {token["content"]: token for token in added}


def _special_names(path: Path, wanted_names: dict[str, str], added: dict[str, Any]) -> dict[str, str]:
    """Name of the special token of each kind: the wanted one, else one with a customary name."""
    names: dict[str, str] = {}
    for kind, customary in CUSTOMARY.items():
        found = wanted_names.get(kind) or next((name for name in customary if name in added), None)
        if found is None and kind == "pad_token":
            found = names["eos_token"]
        if found is None:
            raise UserError(
                f"{path}: no {kind} known; name one of its added tokens by `megatron-md tokenizer import "
                f"--{kind.replace('_', '-')}`"
            )
        if found not in added:
            raise UserError(f"{path}: its {kind} {found[:80]!r} is not among its added tokens")
        names[kind] = found
    return names


def _configured(file: Path) -> dict[str, str]:
    """Special tokens of a `tokenizer_config.json`, each a string or a mapping with its `content`."""
    if not file.exists():
        return {}
    content = read_json(file, "restore it, or remove it")
    values = {kind: content.get(kind) for kind in (*CUSTOMARY, "bos_token", "unk_token")}
    names = {kind: value.get("content") if isinstance(value, dict) else value for kind, value in values.items()}
    return {kind: name for kind, name in names.items() if isinstance(name, str) and name}


def _chat_template(path: Path) -> str | None:
    """The chat template beside a tokenizer, in a file of its own or in the configuration."""
    file, config = path.with_name(TEMPLATE_NAME), path.with_name(CONFIG_NAME)
    if file.exists():
        return read_regular(file, "restore it, or remove it").decode("utf-8", "replace")
    template = read_json(config, "restore it, or remove it").get("chat_template") if config.exists() else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
