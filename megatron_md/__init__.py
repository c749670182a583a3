"""Megatron-MD: pretraining of masked-diffusion language models on megatron-core."""

import types
import warnings
from typing import TYPE_CHECKING, Any

from megatron_md import api
from megatron_md.api import build_data, compare, convert, generate, load, plot, train_tokenizer

if TYPE_CHECKING:
    from megatron_md.api import evaluate, train
else:
    from megatron_md import evaluate, train  # packages, which are called as well: see below

__version__ = "0.2.0"
__all__ = [
    "build_data", "compare", "convert", "evaluate", "generate", "load", "plot", "train", "train_tokenizer"
]  # fmt: skip


class _CallablePackage(types.ModuleType):
    """A package of ours that has the name of a function of the API, and can be called as that."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self.__wrapped__(*args, **keys)


_package: Any
for _package, _function in ((evaluate, api.evaluate), (train, api.train)):
    _package.__class__ = _CallablePackage
    _package.__wrapped__ = _function
    _package.__doc__ = _function.__doc__

# What megatron-core warns about on import (absent optional packages) and what torch warns about in megatron-core's
# calls (older names of collectives, `.grad` of its flat shards): none of it is the user's to mend.
warnings.filterwarnings("ignore", module=r"megatron\.core\b")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"The argument order of load has been changed")
warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
