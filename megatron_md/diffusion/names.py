"""What can be named in a config or on the command line and needs torch: its names are known here before it is imported.

The modules that hold the things register them here (`objective.py`, `unmasking.py`, third parties' under `imports`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_md.diffusion.registry import Registry

if TYPE_CHECKING:
    import torch

    from megatron_md.diffusion.objective import Objective
    from megatron_md.diffusion.unmasking import Choice

objectives: Registry[Callable[..., Objective]] = Registry(
    "objective", ("masked_diffusion", "masked_diffusion_sft", "block_diffusion", "autoregressive")
)
strategies: Registry[Callable[[Choice], torch.Tensor]] = Registry(
    "sampling strategy",
    ("low_confidence", "random", "margin", "entropy", "ancestral", "first_hitting", "threshold", "factor"),
)
