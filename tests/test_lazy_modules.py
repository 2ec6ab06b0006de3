"""Large libraries are imported at first use, and cost nothing from then on."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from raysweep import attacks, lazy_modules, models
from raysweep.attacks import fab
lazy = fab.torch
assert type(lazy) is lazy_modules.LazyModule and "torch" not in sys.modules
zeros = lazy.zeros
import torch
assert zeros is torch.zeros
users = [name for name, module in sys.modules.items()
         if name.startswith("raysweep.") and lazy in vars(module).values()]
assert users == [], users
assert fab.torch is models.torch is lazy_modules.torch is torch
from raysweep.attacks import square
assert square.torch is torch
torch.zeros = "changed"
assert lazy.zeros == fab.torch.zeros == "changed"
assert type(lazy_modules.np) is lazy_modules.LazyModule, "each by itself"
assert lazy_modules.F.relu is torch.nn.functional.relu
"""


@pytest.mark.slow
def test_modules_have_the_library_itself_once_it_is_imported() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
