"""Two models on the same test examples, from what their evaluations left per example."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.statistics import McNemarResult, mcnemar_test

EXAMPLES_FILE = "examples.parquet"
# Verdicts under another threat model, attack or data set are about something else.
_PROTOCOL_FIELDS = ("attack", "standard", "eps", "norm", "data", "fingerprint")


def extract_comparison_protocol(evaluation: EvaluationResult) -> dict[str, Any]:
    """What two judgements must share to be compared."""
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
    """Why two judgements cannot be compared; empty if they can."""
    return [
        f"{key} {old_protocol.get(key)!r} then, {new_protocol[key]!r} now"
        for key in _PROTOCOL_FIELDS
        if str(new_protocol[key]) != str(old_protocol.get(key))
    ]


def compare_shared_examples(new_file: Path, old_file: Path) -> McNemarResult | None:
    """McNemar's test over the examples that both parquet files have; None if they share none."""
    ours, theirs = _read_robust_flags(new_file), _read_robust_flags(old_file)
    shared = sorted(ours.keys() & theirs.keys())
    return mcnemar_test([ours[i] for i in shared], [theirs[i] for i in shared]) if shared else None


def _read_robust_flags(path: Path) -> dict[int, bool]:
    """Example's number -> whether it held out."""
    table = pq.read_table(path, columns=["index", "broken_by"])
    index: NDArray[np.int64] = table["index"].to_numpy()
    return dict(zip(index.tolist(), table["broken_by"].is_null().to_pylist(), strict=True))
