"""Real, sealed checkpoints of a tiny run, and pickles that try to run something."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.config import to_yaml
from megatron_md.train.progress import Progress
from tests.small_run import CONFIG, small_run, variant

SMALL = variant(CONFIG, model={"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 16})


def save_checkpoint(run_dir: Path) -> Path:
    """On each rank: a sealed checkpoint after one step."""
    with small_run(SMALL) as run:
        run.train(0, 1)
        manager = CheckpointManager(run_dir, keep_last=2, resolved_config=to_yaml(SMALL))
        return manager.save(run.chunks, run.optimizer, Progress(1, 8, 256, 10_000)).path


def write_index(directory: Path, *files: Any) -> None:
    """A `.metadata` that takes a byte of data from each of the files."""
    storage = {MetadataIndex(f"tensor {number}"): _StorageInfo(file, 0, 1) for number, file in enumerate(files)}
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=storage), protocol=4))


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def hostile_pickles(planted: Path) -> dict[str, bytes]:
    """Pickles by how they call `open(planted, "w")` or the like when a plain unpickler reads them."""
    import os

    text = str(planted)
    command = f"touch {text}"
    plain = Call(os.system, command)
    return {
        "REDUCE by STACK_GLOBAL": pickle.dumps(plain, protocol=4),
        "protocol 2, GLOBAL": pickle.dumps(plain, protocol=2),
        "protocol 0": pickle.dumps(plain, protocol=0),
        "eval": pickle.dumps(Call(eval, f"open({text!r}, 'w')"), protocol=4),
        "nested": pickle.dumps({"a": [1, {"b": (Call(eval, Call(str, f"open({text!r}, 'w')")),)}]}, protocol=4),
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "BUILD with __setstate__": b"\x80\x04cargparse\nNamespace\n)\x81}\x8c\x0c__setstate__cos\nsystem\nsb"
        + b"\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"b.",
        "after a first pickle": pickle.dumps({}, protocol=4)[:-1] + b"0" + pickle.dumps(plain, protocol=4),
        "dotted name": b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
    }
