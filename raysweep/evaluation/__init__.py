"""Robustness evaluation: run attacks on shards of examples, verify each adversarial example in
float32, and resume an interrupted evaluation.
"""

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
