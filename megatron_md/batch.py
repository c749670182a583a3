"""The two forms of a micro-batch: rows as the data layer serves them, and rows as the model sees them.

Shape letters: B rows of the micro-batch, L positions of a row, M predicted positions of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, order=True)
class DamagedDocument:
    """A document whose stored bytes do not match their checksum.

    Attributes:
        corpus: hash of its corpus' manifest.
        shard: name of its shard, relative to the manifest.
        document: its number in the shard.
        tokens: its length, without `<eos>`.
    """

    corpus: str
    shard: str
    document: int
    tokens: int


@dataclass(frozen=True)
class BatchPosition:
    """Where in the run a global batch lies: all that corruption may depend on besides the rows.

    Attributes:
        first_sample_index: `sample_index` of the global batch's first row.
        global_batch_size: rows of the global batch, over all data-parallel ranks and micro-batches.
        progress: tokens seen before this batch / tokens of the whole run, in [0, 1].
    """

    first_sample_index: int
    global_batch_size: int
    progress: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Rows before corruption, on the host.

    Attributes:
        tokens_BL: token ids.
        is_maskable_BL: True where a token may be masked and scored; False on padding and quarantined tokens.
        sample_index_B: global number g of each row, which alone (with the seed) decides its corruption.
        cu_seqlens: per row the boundaries of its documents, from 0 to L ascending, where the source knows them;
            padding counts as a last document.
        damaged: documents that left a gap in these rows: padding that is not maskable.
        counts_documents: each document of a row is a sequence of its own for weights that count sequences (packed
            dialogues); False: the row is, however documents were cut for it.
        content_B: where in each row the padding begins that no token may attend to, as it would tell where an answer
            ends; None: attention sees it.
    """

    tokens_BL: Int64Array
    is_maskable_BL: BoolArray
    sample_index_B: Int64Array
    cu_seqlens: list[Int32Array] | None = field(default=None, kw_only=True)
    damaged: frozenset[DamagedDocument] = field(default=frozenset(), kw_only=True)
    counts_documents: bool = field(default=False, kw_only=True)
    content_B: Int64Array | None = field(default=None, kw_only=True)

    def seen_apart(self) -> list[Int32Array] | None:
        """`cu_seqlens` of rows whose documents see each other, but not the padding; None where there is none."""
        length = self.tokens_BL.shape[1]
        if self.content_B is None or (self.content_B == length).all():
            return None
        return [np.unique([0, content, length]).astype(np.int32) for content in self.content_B.tolist()]


@dataclass(frozen=True)
class CleanBatch(Rows):
    """Rows of one micro-batch before corruption.

    Attributes:
        position: the global batch that the rows belong to.
    """

    position: BatchPosition


@dataclass(frozen=True)
class RowNoise:
    """What the noise on a micro-batch's masked embeddings is drawn from.

    Attributes:
        std: of each element.
        seeds: of each row.
    """

    std: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class CorruptedBatch:
    """What an objective hands to the model, on the host: inputs, and where to predict what at which weight.

    The training loss is `sum_m weights_M[m] * nll_M[m] / sum of denominator over the global batch`.

    Attributes:
        tokens_BL: model input.
        positions_M: flat positions `b * L + l` to predict at, ascending.
        targets_M: the token to predict at each of them.
        weights_M: weight of each one's cross-entropy; fp32.
        denominator: this micro-batch's share of the global count that the loss is divided by; an integer.
        mask_rate_B: the mask rate t drawn for each row (realised l/n for exact-count corruption).
        cu_seqlens: boundaries of the documents that attention keeps apart, as in `CleanBatch`; None: whole rows. The
            trainer fills it in, whatever the objective does.
        is_hidden_LL: pairs of a query and a key that attention does not see, the same in all rows of the global batch;
            None: it sees all. The trainer fills it in as well.
        block_size: None, or the rows are [masked, clean] with 2L positions, and attention sees blocks of so many
            tokens: a masked position its own block and the clean ones before it, a clean one those up to its own.
            `cu_seqlens` are those of the L tokens.
        noise: on the embeddings of masked tokens; None: none. The trainer fills it in.
    """

    tokens_BL: Int64Array
    positions_M: Int64Array
    targets_M: Int64Array
    weights_M: Float32Array
    denominator: int
    mask_rate_B: Float32Array
    cu_seqlens: list[Int32Array] | None = None
    is_hidden_LL: BoolArray | None = None
    block_size: int | None = None
    noise: RowNoise | None = None


@dataclass(frozen=True)
class RightShift:
    """At which position a token is predicted: at its own, or (with `enabled`) at the one to its left, as in AR models.

    Nothing lies to the left of a row's first token, so that it cannot be scored then.
    """

    enabled: bool

    def scorable(self, is_maskable_BL: BoolArray) -> BoolArray:
        """The tokens that can be scored."""
        if not self.enabled:
            return is_maskable_BL
        is_scorable_BL = is_maskable_BL.copy()
        is_scorable_BL[:, 0] = False
        return is_scorable_BL

    def outputs(self, positions: Int64Array) -> Int64Array:
        """The positions whose output predicts the tokens at these."""
        return positions - int(self.enabled)
