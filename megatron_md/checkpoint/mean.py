"""The mean of checkpoints of a run as a checkpoint, a part of a tensor at a time, without a model.

theta = (theta_1 + .. + theta_n) / n, summed in fp64 from the weights that the optimizer keeps in fp32 where there are
such, and rounded once, to the data type of the model ("model soups", arXiv 2203.05482, of one training's checkpoints).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_md.checkpoint.directory import (
    AVERAGE,
    CONFIG_NAME,
    FP32_WEIGHTS,
    Weights,
    check_weights,
    read_progress,
    read_record,
)
from megatron_md.checkpoint.integrity import verify, weights_digest
from megatron_md.checkpoint.merged import open_reader
from megatron_md.checkpoint.new_run import Advance, write_successor
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import Reader, Slice, TensorReader
from megatron_md.config import ResolvedConfig, load_resolved
from megatron_md.errors import UserError

_LARGEST = 2**26  # numbers that are summed at a time
_LAYERS = "decoder.layers."  # stacked along the first axis


def write_mean(
    checkpoints: Sequence[Path],
    target: Path,
    *,
    weights: Weights = "model",
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda parts: nullcontext(lambda: None),
) -> None:
    """Write a run with one checkpoint: the mean of these, at the step of the newest, which names all with their hashes.

    Adapters are merged with their base first, so that the mean is that of whole weights.

    Args:
        checkpoints: of one run, oldest first.
        target: the run directory; new.
        weights: `ema` takes, in place of those that were trained, their average in each checkpoint.
        progress: given the number of parts, a context that yields what is called for each of them.

    Raises:
        UserError: they have not the same model, or no average; the target exists, or the disk is full. Nothing has been
            written then.
        CheckpointError: one of them is damaged.
    """
    newest = checkpoints[-1]
    for checkpoint in checkpoints:
        check_weights(checkpoint, weights)
        _refuse_another_model(newest, checkpoint)
    for checkpoint in checkpoints:
        verify(checkpoint)
    config = load_resolved(newest / CONFIG_NAME)
    merged = [
        {"path": str(path), "sha256": weights_digest(path), "val_nelbo": read_record(path)["val_nelbo"]}
        for path in checkpoints
    ]
    with _opened(checkpoints, config, weights) as readers:
        with guarded(newest):
            dtypes = {name: dtype for name, (_, dtype) in open_reader(newest, config).tensors.items()}
        slices = list(_slices(checkpoints, readers, dtypes, config.model.vocab))
        with progress(len(slices)) as advance:
            record: dict[str, Any] = {"merged": {"weights": weights, "checkpoints": merged}}
            write_successor(target, newest, config, slices, advance, progress=read_progress(newest), **record)


def _refuse_another_model(newest: Path, other: Path) -> None:
    there, here = (
        {key: value for key, value in read_record(path)["identity"].items() if key.startswith(("model.", "tokenizer"))}
        for path in (other, newest)
    )
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise UserError(
                f"{other}: has another model than {newest} ({key}: {there.get(key)} there, {here.get(key)} here): "
                "only checkpoints of one run are merged"
            )


@contextmanager
def _opened(checkpoints: Sequence[Path], config: ResolvedConfig, weights: Weights) -> Iterator[list[Reader]]:
    """Each checkpoint's whole weights in fp32."""
    instead = AVERAGE if weights == "ema" else FP32_WEIGHTS
    with ExitStack() as stack:
        readers: list[Reader] = []
        for checkpoint in checkpoints:
            stack.enter_context(guarded(checkpoint))
            if config.lora is None:
                readers.append(TensorReader(checkpoint, instead=instead, dtype=torch.float32))
            else:
                readers.append(open_reader(checkpoint, config, dtype=torch.float32, weights=weights))
        yield readers


def _slices(
    checkpoints: Sequence[Path], readers: Sequence[Reader], dtypes: dict[str, torch.dtype], vocab: int
) -> Iterator[Slice]:
    shapes = [
        {name: shape for name, (shape, _) in reader.tensors.items() if not name.startswith("optimizer.")}
        for reader in readers
    ]
    for name, newest in shapes[-1].items():
        for checkpoint, there in zip(checkpoints, shapes, strict=True):
            if there.keys() != shapes[-1].keys() or not _compare(there[name], newest, vocab):
                raise UserError(f"{checkpoint}: has other tensors than {checkpoints[-1]}: they cannot be merged")
        # Rows beyond the vocabulary are the padding of a layout, which may have changed.
        shape = (min(there[name][0] for there in shapes), *newest[1:])
        for offset, size in parts(shape, _LARGEST, by_layer=name.startswith(_LAYERS)):
            make = partial(_mean, readers, name, offset, size, dtypes[name])
            yield Slice(name, shape, offset, size, dtypes[name], make)


def _compare(a: tuple[int, ...], b: tuple[int, ...], vocab: int) -> bool:
    return a == b or (a[1:] == b[1:] and min(a[0], b[0]) >= vocab)


def parts(
    shape: tuple[int, ...], largest: int, *, by_layer: bool = False
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into blocks along its first axes.

    Args:
        shape: of the tensor.
        largest: most numbers of a block, if an index of the last axis that is cut has no more.
        by_layer: no block goes over several indices of the first axis.

    Yields:
        (offset, size) of each block, in the order of their numbers.
    """
    axis = next((axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= largest), len(shape) - 1)
    step = max(1, largest // math.prod(shape[axis + 1 :]))
    if by_layer and axis == 0:
        step = 1
    for before in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            rest = shape[axis + 1 :]
            size = min(step, shape[axis] - start)
            yield (*before, start, *(0 for _ in rest)), (*(1 for _ in before), size, *rest)


def _mean(
    readers: Sequence[Reader], name: str, offset: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for reader in readers:
        total += reader.read(name, offset, size)
    return (total / len(readers)).to(dtype)
