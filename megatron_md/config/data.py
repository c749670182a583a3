"""Where the tokens come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import NonNegativeFloat

from megatron_md.config.keys import STRICT, Doc, Fraction, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config.run import Config


MOST_RANDOM_STEPS = 10_000_000  # each of them is drawn before a run starts: seconds for a million


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    __pydantic_config__ = STRICT

    manifest: Annotated[str, Doc("manifest of its shards")]
    weight: Annotated[
        NonNegativeFloat | list[tuple[NonNegativeInt, NonNegativeFloat]],
        Doc("its share of the rows next to the others' weights; [[g, weight], ...] from row g of the run on"),
    ]
    name: Annotated[str | None, Doc("what messages call it; the manifest's path if null")] = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or self.manifest

    def points(self) -> list[tuple[int, float]]:
        """From which row of the run on it has which weight."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    __pydantic_config__ = STRICT

    train: Annotated[
        str | list[CorpusConfig] | None,
        Doc("manifest of the training shards; or a mixture: [{manifest: ..., weight: ..., name: ...}, ...]"),
    ] = None
    valid: Annotated[str | None, Doc("manifest of the validation shards")] = None
    tokenizer: Annotated[str | None, Doc("SentencePiece model, or tokenizer.json of Hugging Face")] = None
    seq_length: Annotated[PositiveInt, Doc("tokens per row (L)")] = 256
    document_attention: Annotated[
        Literal["full", "within_document"],
        Doc("what a token attends to: the whole row, or its own document in the row only"),
    ] = "full"
    window_shards: Annotated[PositiveInt, Doc("shards that are shuffled together (W)")] = 8
    prefetch: Annotated[NonNegativeInt, Doc("global batches prepared ahead by a background thread")] = 2
    cache_dir: Annotated[
        str | None, Doc("folder on a disk of the node for shards at URLs; megatron-md in the user's cache if null")
    ] = None
    cache_bytes: Annotated[PositiveInt, Doc("most bytes that the cache may hold")] = 20_000_000_000
    random_length_fraction: Annotated[
        Fraction, Doc("share of global batches whose rows are cut to one random length (LLaDA: 0.01)")
    ] = 0.0
    max_quarantined: Annotated[
        NonNegativeInt, Doc("damaged documents that a run goes on without; it stops when there are more")
    ] = 100

    def corpora(self) -> list[CorpusConfig]:
        """The training corpora; a single manifest is a mixture of one."""
        if self.train is None:
            return []
        return [CorpusConfig(self.train, 1.0)] if isinstance(self.train, str) else self.train

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        names = [corpus.label for corpus in self.corpora()]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"data.train: two corpora are called {name!r}; give each of them its own name"
        if self.random_length_fraction and run.train.steps > MOST_RANDOM_STEPS:
            yield (
                f"train.steps {run.train.steps} is above {MOST_RANDOM_STEPS}, the most of which "
                "data.random_length_fraction counts the tokens; set one of them back"
            )
        if self.random_length_fraction and self.seq_length < run.parallel.row_unit:
            yield (
                f"data.random_length_fraction needs data.seq_length of at least {run.parallel.row_unit}, of which "
                "parallel.tensor and 2 x parallel.context are divisors"
            )
        if self.document_attention == "within_document" and run.train.may_use_transformer_engine():
            yield (
                "data.document_attention within_document: Transformer Engine is installed, and its attention does not "
                "take document boundaries here; uninstall it, or set data.document_attention=full or train.device=cpu"
            )
