"""Robust accuracy one can believe: attacks over shards of examples, every claim re-verified, resumable."""

from raysweep.evaluation.evaluator import evaluate
from raysweep.evaluation.processes import Processes
from raysweep.evaluation.progress import Progress, bar
from raysweep.evaluation.report import RobustnessReport
from raysweep.evaluation.shards import AttackShards, Outcome, Shard

__all__ = ["AttackShards", "Outcome", "Processes", "Progress", "RobustnessReport", "Shard", "bar", "evaluate"]
