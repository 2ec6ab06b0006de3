"""What a trial measures of its process, beside what the kernel says."""

from pathlib import Path

import pytest

from raysweep.training.resource_use import measure_resource_use

STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux has it")
def test_memory_is_in_megabytes() -> None:
    use = measure_resource_use()
    lines = STATUS.read_text().splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    assert use["system/process_memory_megabytes"] == pytest.approx(1024 * kibibytes / 1e6, rel=0.05)
