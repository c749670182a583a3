"""What a device and the links between devices can do, from a file of `devices/` or of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_md.config import ConfigError
from megatron_md.config.loader import read_yaml, validate
from megatron_md.config.schema import STRICT, Doc
from megatron_md.messages import nearest

_FOLDER = Path(__file__).with_name("devices")
_Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device, and how devices are joined; bandwidths are those of one device in one direction."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Doc("what reports call it")]
    peak_flops: Annotated[_Positive, Doc("dense bf16 peak, FLOP/s")]
    peak_flops_fp32: Annotated[_Positive, Doc("fp32 peak without tensor cores, FLOP/s")]
    memory_bytes: Annotated[_Positive, Doc("device memory")]
    memory_bandwidth: Annotated[_Positive, Doc("to the device's memory, bytes/s")]
    link_bandwidth: Annotated[_Positive, Doc("to the other devices of a node, bytes/s")]
    network_bandwidth: Annotated[_Positive, Doc("to other nodes, bytes/s")]
    devices_per_node: Annotated[int, Field(gt=0), Doc("devices of a node")]

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in a run of this `train.precision`."""
        return self.peak_flops if precision == "bf16" else self.peak_flops_fp32


def hardware_names() -> list[str]:
    """Devices that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """The device of a name, or of a YAML file.

    Raises:
        ConfigError: neither is there, or the file lacks something.
    """
    known = hardware_names()
    path = _FOLDER / f"{name.lower()}.yaml" if name.lower() in known else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--hardware {name}: unknown{nearest(name.lower(), known)} (known: {', '.join(known)}; or give a YAML file)"
        )
    return validate(Hardware, read_yaml(path), str(path))
