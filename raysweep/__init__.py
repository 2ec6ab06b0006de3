"""Distributed sweeps of instance-reweighted adversarial training, verified with AutoAttack."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysweep.errors import RaysweepError
    from raysweep.evaluation import RobustnessReport, evaluate
    from raysweep.python_api import run, train, tune
    from raysweep.result_loading import Sweep, load, load_report, load_sweep
    from raysweep.run_comparison import compare

__all__ = [
    "RaysweepError",
    "RobustnessReport",
    "Sweep",
    "compare",
    "evaluate",
    "load",
    "load_report",
    "load_sweep",
    "run",
    "train",
    "tune",
]

__version__ = "0.2.0"

# Otherwise Python prints the warnings of raysweep in programs that do not configure logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY_EXPORTS = {
    "RaysweepError": "raysweep.errors",
    "RobustnessReport": "raysweep.evaluation",
    "Sweep": "raysweep.result_loading",
    "compare": "raysweep.run_comparison",
    "evaluate": "raysweep.evaluation",
    "load": "raysweep.result_loading",
    "load_report": "raysweep.result_loading",
    "load_sweep": "raysweep.result_loading",
    "run": "raysweep.python_api",
    "train": "raysweep.python_api",
    "tune": "raysweep.python_api",
}


def __getattr__(name: str) -> Any:
    """Import a name at first use, so that `import raysweep` needs no torch."""
    if name in _LAZY_EXPORTS:
        return getattr(import_module(_LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module 'raysweep' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all names, also those that are imported at first use, for tab completion."""
    return sorted([*globals(), *_LAZY_EXPORTS])
