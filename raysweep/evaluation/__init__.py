"""Robust accuracy one can believe: attacks over shards of examples, every claim re-verified,
resumable.
"""

from raysweep.evaluation.evaluator import evaluate
from raysweep.evaluation.process_pool import ProcessPoolMap
from raysweep.evaluation.progress import EvaluationProgress, show_evaluation_progress
from raysweep.evaluation.report import RobustnessReport
from raysweep.evaluation.shards import Shard, ShardResult, ShardRunner

__all__ = [
    "EvaluationProgress",
    "ProcessPoolMap",
    "RobustnessReport",
    "Shard",
    "ShardResult",
    "ShardRunner",
    "evaluate",
    "show_evaluation_progress",
]
