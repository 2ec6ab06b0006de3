"""Robustness evaluation: run attacks on shards of examples, verify each adversarial example in
float32, and resume an interrupted evaluation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysweep.evaluation.evaluator import evaluate
    from raysweep.evaluation.process_pool import ProcessPoolMap
    from raysweep.evaluation.progress import EvaluationProgress, show_evaluation_progress
    from raysweep.evaluation.report import RobustnessReport
    from raysweep.evaluation.shards import Shard, ShardMapper, ShardResult, ShardRunner

__all__ = [
    "EvaluationProgress",
    "ProcessPoolMap",
    "RobustnessReport",
    "Shard",
    "ShardMapper",
    "ShardResult",
    "ShardRunner",
    "evaluate",
    "show_evaluation_progress",
]

_LAZY_EXPORTS = {
    "EvaluationProgress": "progress",
    "ProcessPoolMap": "process_pool",
    "RobustnessReport": "report",
    "Shard": "shards",
    "ShardMapper": "shards",
    "ShardResult": "shards",
    "ShardRunner": "shards",
    "evaluate": "evaluator",
    "show_evaluation_progress": "progress",
}


def __getattr__(name: str) -> Any:
    """Import a name at first use: statistics and settings need no torch."""
    if name in _LAZY_EXPORTS:
        return getattr(import_module(f"{__name__}.{_LAZY_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all names, also those that are imported at first use, for tab completion."""
    return sorted([*globals(), *_LAZY_EXPORTS])
