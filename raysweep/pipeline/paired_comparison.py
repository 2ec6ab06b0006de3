"""Comparison of two models on the same test examples, from the files of their evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.bounded_files import read_parquet_table
from raysweep.lazy_modules import np
from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.statistics import McNemarResult, mcnemar_test

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Results can be compared only if the threat model, the attack and the data set are the same.
_PROTOCOL_FIELDS = ("attack", "standard", "eps", "norm", "data", "fingerprint")


def extract_comparison_protocol(evaluation: EvaluationResult) -> dict[str, Any]:
    """Return the settings that two evaluations must share to be compared.

    The keys are part of reports and of tags in MLflow; version 0.1 wrote the same keys.

    Args:
        evaluation: Result of one attack on one candidate.
    """
    protocol = evaluation.protocol
    return {
        "attack": evaluation.attack,
        "standard": evaluation.is_autoattack,
        "eps": f"{evaluation.eps:.6g}",
        "norm": evaluation.norm,
        "data": protocol["data"],
        "fingerprint": protocol["fingerprint"],
    }


def find_protocol_differences(
    new_protocol: Mapping[str, Any], old_protocol: Mapping[str, Any]
) -> list[str]:
    """Find the reasons why two evaluations cannot be compared.

    Args:
        new_protocol: Result of `extract_comparison_protocol`.
        old_protocol: The same of an earlier evaluation; its values may be strings, as in MLflow.

    Returns:
        One line for each difference; empty if the evaluations can be compared.
    """
    return [
        f"{key} {old_protocol.get(key)!r} then, {new_protocol[key]!r} now"
        for key in _PROTOCOL_FIELDS
        if str(new_protocol[key]) != str(old_protocol.get(key))
    ]


def compare_shared_examples(new_file: Path, old_file: Path) -> McNemarResult | None:
    """Run McNemar's test on the examples that two evaluations share.

    Args:
        new_file: Parquet file with the results of each example for the new model.
        old_file: The same for the old model.

    Returns:
        The result of the test, or None if the files have no example in common.
    """
    new, old = _read_robust_flags(new_file), _read_robust_flags(old_file)
    shared = sorted(new.keys() & old.keys())
    if not shared:
        return None
    return mcnemar_test([new[i] for i in shared], [old[i] for i in shared])


def _read_robust_flags(path: Path) -> dict[int, bool]:
    """Read for each example, by its number in the test set, whether no attack broke it."""
    table = read_parquet_table(path, ["index", "broken_by"])
    index: NDArray[np.int64] = table["index"].to_numpy()
    return dict(zip(index.tolist(), table["broken_by"].is_null().to_pylist(), strict=True))
