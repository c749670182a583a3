"""Megatron-MD: pretraining of masked-diffusion language models on megatron-core."""

import warnings

__version__ = "0.1.0"

# megatron-core warns on import about every optional package that is absent; a run's output is ours.
warnings.filterwarnings("ignore", module=r"megatron\.core\b")
