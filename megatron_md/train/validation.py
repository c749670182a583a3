"""Full-range validation NELBO during training, the same rows and masks every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_md.config import Config
from megatron_md.train.callback import Callback, Record
from megatron_md.train.trainer import Trainer
