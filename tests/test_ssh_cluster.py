"""`ray up` over real ssh, on machines made of namespaces, where this machine can make them (see
tests/cluster).
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent / "cluster"


def missing_requirement() -> str:
    """What this machine lacks to be several."""
    if not os.environ.get("RAYSWEEP_LAB"):
        return "takes minutes: set RAYSWEEP_LAB=1"
    tools = [
        tool
        for tool in ("sshd", "ssh", "rsync", "ip", "unshare")
        if not shutil.which(tool, path=_PATH)
    ]
    if tools:
        return f"needs {', '.join(tools)}"
    if os.geteuid() != 0:
        return "needs root"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return "" if made.returncode == 0 else "needs the right to make namespaces"


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())
def test_up_doctor_sweep_down(tmp_path: Path) -> None:
    command = [CLUSTER / "lab.sh", tmp_path / "lab", "1", CLUSTER / "prove.sh", "small"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "PYTHON": sys.executable,
        "HOME": str(tmp_path),
    }
    # Whatever happens to this test, nothing of the lab outlives it.
    die_with_me = ctypes.CDLL(None).prctl
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        preexec_fn=lambda: die_with_me(1, 9),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (
        "ok     storage" in done.stdout and "trial 0001" in done.stdout and "# done" in done.stdout
    )
