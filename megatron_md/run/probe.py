"""What `megatron-md doctor` runs in processes of their own, as each of it may fail, hang or die: `python -m … WHAT`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_md.messages import say
from megatron_md.processes import end_with_launcher

if TYPE_CHECKING:
    import torch

ROW_LENGTH = 64
VOCAB, MASK, EOS, PAD = 256, 3, 1, 2


def describe_torch() -> str:
    """What torch says of itself and of the devices, as JSON."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        is_available = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else ()
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)),
        "devices": devices if is_available else [],
        "problem": next((str(warning.message) for warning in told), ""),
    }
    return json.dumps(found)


def collectives() -> str:
    """Each kind of collective that training makes, on numbers whose outcome is known.

    Raises:
        RuntimeError: one of them gave something else.
    """
    import torch
    import torch.distributed as dist

    from megatron_md.parallel import select_device

    device = select_device("auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(size, device=device, dtype=torch.float32) + rank
    every = torch.arange(size, device=device)[:, None] + torch.arange(size, device=device).float()

    def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(found, expected):
            raise RuntimeError(f"{name} over {size} ranks gave {found.tolist()} instead of {expected.tolist()}")

    total = mine.clone()
    dist.all_reduce(total)
    check("all_reduce", total, every.sum(0))
    sent = mine.clone()
    dist.broadcast(sent, src=0)
    check("broadcast", sent, every[0])
    gathered = mine.new_empty(size * size)
    dist.all_gather_into_tensor(gathered, mine)
    check("all_gather", gathered.view(size, size), every)
    part = mine.new_empty(1)
    dist.reduce_scatter_tensor(part, mine)
    check("reduce_scatter", part, every.sum(0)[rank : rank + 1])
    if size > 1:
        received = torch.empty_like(mine)
        turns = [
            dist.P2POp(dist.isend, mine, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for request in dist.batch_isend_irecv(turns):
            request.wait()
        check("send and receive", received, every[rank - 1])
    dist.destroy_process_group()
    return ""


def step(folder: str) -> str:
    """One step of the preset `tiny` on made-up rows, with corpus, config, optimizer and checkpoint as in any run.

    Args:
        folder: an empty one, the same on all ranks; the run becomes its `run`.
    """
    import numpy as np
    import torch

    from megatron_md.config import config_from_mapping
    from megatron_md.data.writer import Batch, Tokenised, Vocabulary, write_corpus
    from megatron_md.run.check import check_config
    from megatron_md.run.pretrain import pretrain

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    random = np.random.default_rng(0)
    documents: Batch = [Tokenised(random.integers(4, VOCAB, ROW_LENGTH), ROW_LENGTH) for _ in range(4 * size)]
    corpus = Path(folder) / f"corpus-{rank}"  # the same on every rank, and none has to wait for another
    write_corpus([documents], Vocabulary(VOCAB, EOS, MASK, PAD, "0" * 64), corpus)
    config = config_from_mapping(
        {
            "run_dir": str(Path(folder) / "run"),
            "model": {"preset": "tiny"},
            "data": {"train": str(corpus), "seq_length": ROW_LENGTH},
            "train": {
                "steps": 1,
                "global_batch_size": 2 * size,
                "micro_batch_size": 2,
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
            },
            "validation": {"sequences": 0},
            "log": {"tensorboard": False},
        }
    )
    check_config(config, size)
    pretrain(config)
    return ""


def main(words: list[str]) -> None:
    """Run one of them and print what it gives; whatever it raises is the answer too."""
    end_with_launcher()
    name, *rest = words
    if name == "import":
        importlib.import_module(*rest)
        return
    parts: dict[str, Callable[..., str]] = {"torch": describe_torch, "collectives": collectives, "step": step}
    say(parts[name](*rest))


if __name__ == "__main__":
    main(sys.argv[1:])
