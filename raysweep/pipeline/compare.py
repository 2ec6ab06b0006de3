"""Two models on the same test examples, from what their evaluations left per example."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysweep.pipeline.artifact import Judgement
from raysweep.pipeline.statistics import Paired, mcnemar

EXAMPLES = "examples.parquet"
# Verdicts under another threat model, attack or data set are about something else.
_SAME = ("attack", "standard", "eps", "norm", "data", "fingerprint")


def facts_of(judgement: Judgement) -> dict[str, Any]:
    """What two judgements must share to be compared."""
    protocol = judgement.protocol
    return {
        "attack": judgement.attack,
        "standard": judgement.standard,
        "eps": f"{judgement.eps:.6g}",
        "norm": judgement.norm,
        "data": protocol["data"],
        "fingerprint": protocol["fingerprint"],
    }


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Why two judgements cannot be compared; empty if they can."""
    return [f"{key} {old.get(key)!r} then, {new[key]!r} now" for key in _SAME if str(new[key]) != str(old.get(key))]


def paired(new: Path, old: Path) -> Paired | None:
    """McNemar's test over the examples that both parquet files have; None if they share none."""
    ours, theirs = _robust(new), _robust(old)
    shared = sorted(ours.keys() & theirs.keys())
    return mcnemar([ours[i] for i in shared], [theirs[i] for i in shared]) if shared else None


def _robust(path: Path) -> dict[int, bool]:
    """Example's number -> whether it held out."""
    table = pq.read_table(path, columns=["index", "broken_by"])
    index: NDArray[np.int64] = table["index"].to_numpy()
    return dict(zip(index.tolist(), table["broken_by"].is_null().to_pylist(), strict=True))
