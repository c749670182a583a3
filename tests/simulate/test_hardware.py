"""Device files: complete, sourced, and of one mind with the peaks that training measures its MFU against."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.errors import UserError
from megatron_md.parallel import _PEAK_BF16
from megatron_md.simulate import hardware
from megatron_md.simulate.hardware import hardware_names, load_hardware


def test_devices_have_the_peaks_of_training() -> None:
    assert hardware_names() == ["b200", "h100", "h200"]
    for name in hardware_names():
        assert load_hardware(name.upper()).peak("bf16") == _PEAK_BF16[name.upper()]
        assert load_hardware(name).peak("fp32") < load_hardware(name).peak("bf16")


@pytest.mark.parametrize("name", hardware_names())
def test_every_device_names_its_source(name: str) -> None:
    text = (Path(hardware.__file__).parent / "devices" / f"{name}.yaml").read_text()
    assert "Source: " in text and "data sheet" in text


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((Path(hardware.__file__).parent / "devices/h100.yaml").read_text().replace("SXM", "mine", 1))
    assert load_hardware(str(own)).memory_bytes == load_hardware("h100").memory_bytes


def test_bad_devices_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--hardware h10: unknown; did you mean 'h100'\? \(known: b200, h100, h200"):
        load_hardware("h10")
    with pytest.raises(UserError, match="no such file"):
        load_hardware(str(tmp_path / "none.yaml"))
    (tmp_path / "half.yaml").write_text("name: half\npeak_flops: -1.0\n")
    with pytest.raises(UserError) as found:
        load_hardware(str(tmp_path / "half.yaml"))
    assert "peak_flops" in str(found.value) and "memory_bytes" in str(found.value)
