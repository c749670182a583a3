"""Contradictions between a config and its corpora and tokenizer, as far as those exist; without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_md.config import Config
from megatron_md.data.cache import Cache
from megatron_md.data.remote import is_url
from megatron_md.data.shards import MANIFEST_NAME, Manifest, load_manifest
from megatron_md.data.subset import choose
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.run.check_chat import chat_problems


def missing_files(config: Config) -> list[str]:
    """One line for each corpus that is not set, and each corpus, tokenizer or checkpoint that does not exist."""
    lines = []
    if not config.data.corpora():
        lines.append("data.train is not set: give the manifest.json of the training shards")
    if config.data.valid is None and config.validation.sequences:
        lines.append("data.valid is not set, and validation needs it (or set validation.sequences=0)")
    for key, value in _manifest_paths(config):
        if is_url(value):
            continue  # fetched, or refused, when it is opened
        path = Path(value)
        path = path / MANIFEST_NAME if path.is_dir() else path
        if not path.exists():
            lines.append(f"{key}: {path}: no such file; make it with `megatron-md data build`")
    if config.data.tokenizer is not None and not Path(config.data.tokenizer).exists():
        tokenizer = config.data.tokenizer
        lines.append(f"data.tokenizer: {tokenizer}: no such file; make it with `megatron-md tokenizer train`")
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        lines.append(f"checkpoint.load: {config.checkpoint.load}: no such run or checkpoint")
    return lines


def _manifest_paths(config: Config) -> list[tuple[str, str]]:
    """(key, path) of every corpus: `data.train` (of a mixture `data.train[NAME]`) and `data.valid`."""
    single = isinstance(config.data.train, str)
    corpora = config.data.corpora()
    paths = [("data.train" if single else f"data.train[{corpus.label}]", corpus.manifest) for corpus in corpora]
    return [*paths, ("data.valid", config.data.valid)] if config.data.valid is not None else paths


def corpus_problems(config: Config) -> Iterator[str]:
    """Contradictions between the tokenizer, the model and the shards, as far as they exist."""
    tokenizer: Tokenizer | None = None
    manifests: dict[str, Manifest] = {}
    paths = dict(_manifest_paths(config))
    missing = " ".join(missing_files(config))
    try:
        if config.data.tokenizer is not None and "data.tokenizer:" not in missing:
            tokenizer = Tokenizer(config.data.tokenizer)
    except ValueError as error:
        yield f"data.tokenizer: {error}"
    for key, path in paths.items():
        try:
            if f"{key}:" not in missing:
                manifests[key] = load_manifest(path, cache=Cache.of(config.data))
        except ValueError as error:
            yield f"{key}: {error}"
    length = config.data.seq_length
    for key, manifest in manifests.items():
        if manifest.kind == "text" and manifest.tokens < length:
            yield f"{key}: {paths[key]} holds {manifest.tokens} tokens, less than data.seq_length {length}"
    yield from _check_subsets(config, manifests)
    yield from chat_problems(config, manifests)
    yield from _check_distinct({key: manifest for key, manifest in manifests.items() if key != "data.valid"})
    yield from _check_same_tokenizer(config, tokenizer, manifests)
    yield from _check_vocabulary(config, tokenizer, manifests)


def _check_subsets(config: Config, manifests: dict[str, Manifest]) -> Iterator[str]:
    """What `max_tokens` leaves must be there, and fill a row."""
    length = config.data.seq_length
    for (key, _), corpus in zip(_manifest_paths(config), config.data.corpora(), strict=False):
        manifest, most = manifests.get(key), corpus.max_tokens
        if manifest is None or most is None:
            continue
        if manifest.remote is not None and most <= manifest.tokens:
            continue  # its documents are read when the run starts
        try:
            tokens = choose(manifest, most).tokens
            if manifest.kind == "text" and tokens < length:
                yield f"{key}: max_tokens {most} leaves {tokens} tokens, less than data.seq_length {length}: raise it"
        except ValueError as error:
            yield f"{key}: {error}"


def _check_same_tokenizer(config: Config, tokenizer: Tokenizer | None, manifests: dict[str, Manifest]) -> Iterator[str]:
    """Everything must have been made with one tokenizer: the one that is set, else that of the training shards."""
    paths = dict(_manifest_paths(config))
    source, sha256, size = "", "", 0
    if tokenizer is not None:
        source, sha256, size = f"data.tokenizer {tokenizer.path}", tokenizer.sha256, tokenizer.vocab_size
    elif manifests and next(iter(manifests)) != "data.valid":
        key, first = next(iter(manifests.items()))
        source, sha256, size = f"{key} {paths[key]}", first.tokenizer_sha256, first.vocab_size
    for key, manifest in manifests.items() if source else ():
        path = paths[key]
        if manifest.vocab_size != size:
            yield f"{key}: {path} was made with a vocabulary of {manifest.vocab_size}, but {source} has {size}"
        elif manifest.tokenizer_sha256 != sha256:
            yield f"{key}: {path} was made with another tokenizer than {source}; build it again"


def _check_distinct(manifests: dict[str, Manifest]) -> Iterator[str]:
    """A corpus given twice would serve the same rows twice, in the same order."""
    seen: dict[str, str] = {}
    for key, manifest in manifests.items():
        if manifest.sha256 in seen:
            yield f"{key}: the same corpus as {seen[manifest.sha256]}; give it once, with the sum of the weights"
        seen.setdefault(manifest.sha256, key)


def _check_vocabulary(config: Config, tokenizer: Tokenizer | None, manifests: dict[str, Manifest]) -> Iterator[str]:
    """The model must know every token, the mask token included; the first file that contradicts is named."""
    vocab = config.model.vocab
    if vocab is None:
        return
    paths = dict(_manifest_paths(config))
    sizes = {f"{key} {paths[key]}": (m.mask_id, m.vocab_size) for key, m in manifests.items()}
    if tokenizer is not None:
        own = {f"data.tokenizer {tokenizer.path}": (tokenizer.mask_token_id, tokenizer.vocab_size)}
        sizes = {**own, **sizes}
    for source, (mask_token_id, size) in sizes.items():
        if mask_token_id >= vocab:
            yield f"the mask token id {mask_token_id} of {source} is outside the vocabulary: model.vocab is {vocab}"
            return
        if size > vocab:
            yield f"model.vocab {vocab} is smaller than the vocabulary of {source}, {size}"
            return
