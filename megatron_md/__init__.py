"""Megatron-MD: pretraining of masked-diffusion language models on megatron-core."""

import warnings

__version__ = "0.1.0"

# What megatron-core warns about on import (absent optional packages) and what torch warns about in megatron-core's
# calls (older names of collectives, `.grad` of its flat shards): none of it is the user's to mend.
warnings.filterwarnings("ignore", module=r"megatron\.core\b")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
