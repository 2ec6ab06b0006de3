"""What computes nothing answers at once, because it does not import what computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each of these takes a tenth of a second to several seconds.
LARGE_LIBRARIES = ["torch", "ray", "mlflow", "optuna", "scipy", "pandas", "pyarrow", "numpy"]
COMMANDS = {
    "--help": 0,
    "tune --help": 0,
    "--print-completion bash": 0,
    "list": 0,
    "list --json": 0,
    "show lrat": 0,
    "show preset:gairat-fig10": 0,
    "show nothing-of-this-name": 2,
    "tune lrat --set epoch=3": 2,
    "tune lrat --plan --set epoch=3": 2,
    "tune lrat --plan --set optim.lr=fast": 2,
    "train gairat --set method.attacks.pgd.eps=8": 2,
    "eval nothing-of-this-name": 2,
    "show pipeline:digits": 0,
    "run nothing-of-this-name": 2,
    "run digits --set epoch=3": 2,
}
# The goal is 0.4 processor seconds. A machine that is slow or whose cores are shared needs more for
# the same work, so the limit is a multiple of what the imports of `YARDSTICK` take beside it:
# the commands need up to six times as much, and importing PyTorch alone twenty times.
LIMIT = 9
YARDSTICK = """
import asyncio, email.mime.multipart, http.client, tarfile, time, unittest.mock, xml.dom.minidom
print(time.process_time())
"""
PROGRAM = """
import json, sys, time
from raysweep.cli import main
try:
    code = main(sys.argv[1].split())
except SystemExit as ending:
    code = ending.code
facts = {"code": code, "seconds": time.process_time(), "modules": list(sys.modules)}
print(json.dumps(facts), file=sys.stderr)
"""


def answer(command: str, folder: Path) -> dict:
    """Run a command in a fresh interpreter: its exit code, processor seconds and modules."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stderr.splitlines()[-1])


def measure_yardstick() -> float:
    """Return the processor seconds of the yardstick."""
    yardstick = subprocess.run([sys.executable, "-c", YARDSTICK], capture_output=True, check=True)
    return float(yardstick.stdout)


@pytest.fixture(scope="module")
def yardstick() -> float:
    return measure_yardstick()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_compute_nothing(command: str, yardstick: float, tmp_path: Path) -> None:
    facts = answer(command, tmp_path)
    assert facts["code"] == COMMANDS[command]
    assert [name for name in LARGE_LIBRARIES if name in facts["modules"]] == []
    # A machine that got slower since the yardstick was measured makes it slower, too.
    ratios = [facts["seconds"] / yardstick]
    while min(ratios) > LIMIT and len(ratios) < 4:
        ratios.append(answer(command, tmp_path)["seconds"] / measure_yardstick())
    assert min(ratios) <= LIMIT
