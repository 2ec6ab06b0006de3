"""What an evaluation found: accuracies with intervals, per attack, per class and per example."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysweep.atomic_files import atomic_open, atomic_write_text
from raysweep.attacks.autoattack import autoattack

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AttackCost:
    """What one attack took: rows it saw, forward passes over them, seconds of wall time (0 where it
    was resumed).
    """

    rows: int
    queries: int
    seconds: float


@dataclass(frozen=True, repr=False)
class RobustnessReport:
    """Arrays have a row for each example in the order given; `robust_after` maps each attack to the
    rows still right.

    attack: settings of what was run; not what was asked for where the model did not allow that.
    broken_by: the attack that broke the row, `clean` if none was needed, "" if it held out.
    margin_before: of logits at x; margin_after, perturbation: at the adversarial example or else
    the worst point found, in logits and in `norm`. x_adv: adversarial examples, x where there is
    none.
    """

    attack: Mapping[str, Any]
    eps: float
    norm: str
    seed: int
    index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    robust_after: Mapping[str, BoolArray]
    broken_by: npt.NDArray[np.str_]
    margin_before: npt.NDArray[np.float32]
    margin_after: npt.NDArray[np.float32]
    perturbation: npt.NDArray[np.float32]
    queries: npt.NDArray[np.int64]
    cost: Mapping[str, AttackCost]
    warnings: tuple[str, ...] = ()
    masking_gap: float | None = None
    x_adv: npt.NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        """A line for notebooks; `summary()` has the numbers, the attributes the rows."""
        low, high = self.intervals["robust"]
        return (
            f"RobustnessReport({len(self.labels)} examples, {self.norm} eps {self.eps:.6g}: "
            f"clean {self.clean_accuracy:.2%}, robust {self.robust_accuracy:.2%} (95%: {low:.2%} to {high:.2%}), "
            f"after {', '.join(self.robust_after)}; {len(self.warnings)} warnings)"
        )

    @property
    def clean(self) -> BoolArray:
        clean: BoolArray = self.broken_by != "clean"
        return clean

    @property
    def robust(self) -> BoolArray:
        robust: BoolArray = self.broken_by == ""
        return robust

    @property
    def clean_accuracy(self) -> float:
        return float(self.clean.mean())

    @property
    def robust_accuracy(self) -> float:
        return float(self.robust.mean())

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals of clean and robust accuracy and of the accuracy after each attack."""
        flags = {"clean": self.clean, **self.robust_after, "robust": self.robust}
        return {
            name: compute_wilson_interval(int(rows.sum()), len(rows))
            for name, rows in flags.items()
        }

    @property
    def is_autoattack(self) -> bool:
        """Whether this was AutoAttack's standard version, no more and no less."""
        norm: Any = self.norm
        return bool(dict(self.attack) == autoattack(self.eps, norm).to_json_dict())

    def per_class(self) -> dict[int, dict[str, float]]:
        """Class -> number of examples, clean and robust accuracy."""
        return {
            int(label): {
                "count": int((rows := self.labels == label).sum()),
                "clean_accuracy": float(self.clean[rows].mean()),
                "robust_accuracy": float(self.robust[rows].mean()),
            }
            for label in np.unique(self.labels)
        }

    def card(self, **card_fields: object) -> dict[str, object]:
        """The model's entry in RobustBench's field names; `about` fills in name, authors, link,
        dataset, ...
        """
        return {
            "link": None,
            "name": None,
            "authors": None,
            "additional_data": None,
            "number_forward_passes": 1,
            "dataset": None,
            "venue": None,
            "architecture": None,
            "eps": _format_eps_fraction(self.eps) if self.norm == "Linf" else f"{self.eps:g}",
            "threat_model": self.norm,
            "clean_acc": f"{100 * self.clean_accuracy:.2f}",
            "reported": f"{100 * self.robust_accuracy:.2f}",
            "autoattack_acc": f"{100 * self.robust_accuracy:.2f}" if self.is_autoattack else None,
            "unreliable": bool(self.warnings),
            **card_fields,
        }

    def summary(self) -> dict[str, object]:
        """Plain data for logs and `--json`: everything but the rows."""
        return {
            "examples": len(self.labels),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_after": {name: float(rows.mean()) for name, rows in self.robust_after.items()},
            "intervals": self.intervals,
            "masking_gap": self.masking_gap,
            "eps": self.eps,
            "norm": self.norm,
            "seed": self.seed,
            "attack": self.attack,
            "queries": int(self.queries.sum()),
            "cost": {name: vars(cost) for name, cost in self.cost.items()},
            "per_class": self.per_class(),
            "warnings": list(self.warnings),
        }

    def save_card(self, path: Path, **card_fields: object) -> None:
        atomic_write_text(path, json.dumps(self.card(**card_fields), indent=2) + "\n")

    def columns(self) -> dict[str, Any]:
        """One row an example, by column: what the Parquet file holds, and
        `pandas.DataFrame(report.columns())`.
        """
        return {
            "index": self.index,
            "label": self.labels,
            "clean_prediction": self.predicted,
            "broken_by": [str(name) or None for name in self.broken_by],
            "margin_before": self.margin_before,
            "margin_after": self.margin_after,
            "perturbation": self.perturbation,
            "queries": self.queries,
        }

    def save_parquet(self, path: Path) -> None:
        """One row an example."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(self.columns())
        summary = json.dumps(self.summary(), default=str)
        table = table.replace_schema_metadata({"raysweep.evaluation": summary})
        with atomic_open(path) as stream:
            pq.write_table(table, stream)

    def save_adversarial(self, path: Path) -> None:
        """x_adv, labels and index as a NumPy archive."""
        if self.x_adv is None:
            raise ValueError(
                "adversarial examples were not kept: evaluate(..., keep_adversarial=True)"
            )
        arrays: dict[str, Any] = {
            "x_adv": self.x_adv,
            "labels": self.labels,
            "index": self.index,
            "robust": self.robust,
        }
        with atomic_open(path) as stream:
            np.savez(stream, **arrays)


def compute_wilson_interval(
    n_successes: int, n_samples: int, z: float = 1.959964
) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    if n_samples == 0:
        return 0.0, 1.0
    share = n_successes / n_samples
    middle = (share + z * z / (2 * n_samples)) / (1 + z * z / n_samples)
    half = (
        z
        / (1 + z * z / n_samples)
        * math.sqrt(share * (1 - share) / n_samples + z * z / (4 * n_samples * n_samples))
    )
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _format_eps_fraction(eps: float) -> str:
    """8/255 as RobustBench writes it, if that is what it is."""
    pixels = eps * 255
    return (
        f"{round(pixels)}/255" if pixels >= 1 and abs(pixels - round(pixels)) < 1e-6 else f"{eps:g}"
    )
