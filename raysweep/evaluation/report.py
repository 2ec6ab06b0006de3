"""Result of an evaluation: accuracies with intervals, per attack, per class and per example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raysweep.atomic_files import atomic_open, atomic_write_text
from raysweep.attacks.named_attacks import autoattack
from raysweep.evaluation.paired_statistics import compute_normal_quantile
from raysweep.lazy_modules import np

if TYPE_CHECKING:
    import numpy.typing as npt

    BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AttackCost:
    """Cost of one attack.

    Attributes:
        rows: Examples it ran on.
        queries: Forward passes, summed over these examples.
        seconds: Wall time in seconds, without the time that an earlier, interrupted run spent.
    """

    rows: int
    queries: int
    seconds: float


@dataclass(frozen=True, repr=False)
class RobustnessReport:
    """Result of an evaluation on N examples. Arrays have one row per example, in input order.

    Attributes:
        attack: Settings of the attacks that ran, as plain data. If an attack was replaced or
            skipped because of the model, `warnings` has the reason.
        eps: Radius of the attacks, in pixels of [0, 1].
        norm: Norm of the attacks, "Linf" or "L2".
        seed: Seed of the attacks.
        index: Ids of the examples, (N,).
        labels: Labels, (N,).
        predicted: Predicted classes of the clean images, (N,).
        robust_after: Attack name -> (N,) bool, whether the example is correct after this and all
            earlier attacks.
        broken_by: Name of the attack that broke the example, "clean" if the clean image is
            misclassified, "" if the example is robust, (N,).
        margin_before: z_y - max_{i != y} z_i of the logits at the clean image, (N,).
        margin_after: The same margin at the adversarial example; for a robust example at the image
            of smallest margin that an attack returned, (N,).
        perturbation: Distance of that image from the original, in `norm`, (N,).
        queries: Number of forward passes on the example, (N,).
        cost: Attack name -> cost, for attacks that ran.
        warnings: Reasons why the result may be unreliable, one line each.
        masking_gap: Accuracy under the first attack minus accuracy after all attacks, if the first
            is PGD or APGD on the cross-entropy and others follow; else None. A large gap suggests
            that gradients are masked.
        subset: How the examples were chosen from the test set: "balanced", "proportional" or
            "first" (see `choose_subset_rows`); None for a whole set, or if it is not known.
        x_adv: Adversarial examples, (N, C, H, W) float32; the original image of an example that no
            attack broke. None unless `evaluate(..., keep_adversarial=True)`.
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
    subset: str | None = None
    x_adv: npt.NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        """Return one line for notebooks."""
        low, high = self.intervals["robust"]
        return (
            f"RobustnessReport({len(self.labels)} examples, {self.norm} eps {self.eps:.6g}: "
            f"clean {self.clean_accuracy:.2%}, robust {self.robust_accuracy:.2%} "
            f"(95%: {low:.2%} to {high:.2%}), "
            f"after {', '.join(self.robust_after)}; {len(self.warnings)} warnings)"
        )

    @property
    def clean(self) -> BoolArray:
        """Whether the clean image is classified correctly, (N,)."""
        clean: BoolArray = self.broken_by != "clean"
        return clean

    @property
    def robust(self) -> BoolArray:
        """Whether no attack broke the example, (N,)."""
        robust: BoolArray = self.broken_by == ""
        return robust

    @property
    def clean_accuracy(self) -> float:
        """Fraction of clean images that are classified correctly, in [0, 1]."""
        return float(self.clean.mean())

    @property
    def robust_accuracy(self) -> float:
        """Fraction of examples that no attack broke, in [0, 1]."""
        return float(self.robust.mean())

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals (low, high) of the accuracies "clean", after each attack, and "robust"."""
        flags = {"clean": self.clean, **self.robust_after, "robust": self.robust}
        return {
            name: compute_wilson_interval(int(is_correct.sum()), len(is_correct))
            for name, is_correct in flags.items()
        }

    @property
    def is_autoattack(self) -> bool:
        """Whether the attacks were those of AutoAttack's standard version, with its settings."""
        norm: Any = self.norm
        return bool(dict(self.attack) == autoattack(self.eps, norm).to_json_dict())

    def per_class(self) -> dict[int, dict[str, float]]:
        """Compute accuracies by class.

        Returns:
            Label -> {"count": number of examples, "clean_accuracy", "robust_accuracy"}.
        """
        metrics = {}
        for label in np.unique(self.labels):
            is_member = self.labels == label
            metrics[int(label)] = {
                "count": int(is_member.sum()),
                "clean_accuracy": float(self.clean[is_member].mean()),
                "robust_accuracy": float(self.robust[is_member].mean()),
            }
        return metrics

    def card(self, **card_fields: object) -> dict[str, object]:
        """Build a model entry with the field names of RobustBench.

        Args:
            **card_fields: Fields that the report cannot fill (name, authors, link, dataset, ...),
                or that replace the report's values.

        Returns:
            The entry, plain data for JSON. Accuracies are percentages with two decimals.
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
            **format_card_numbers(self.norm, self.eps, self.clean_accuracy, self.robust_accuracy),
            "autoattack_acc": f"{100 * self.robust_accuracy:.2f}" if self.is_autoattack else None,
            "unreliable": bool(self.warnings),
            **self._describe_subset(),
            **card_fields,
        }

    def summary(self) -> dict[str, object]:
        """Summarize the report without the arrays.

        Returns:
            Plain data for logs and `raysweep eval --json`.
        """
        return {
            "examples": len(self.labels),
            **self._describe_subset(),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_after": {
                name: float(is_correct.mean()) for name, is_correct in self.robust_after.items()
            },
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

    def _describe_subset(self) -> dict[str, object]:
        """Return the fields of cards and summaries of a part of the test set."""
        if self.subset is None:
            return {}
        return {"examples": len(self.labels), "subset": self.subset}

    def save_card(self, path: Path, **card_fields: object) -> None:
        """Write `card(**card_fields)` into a JSON file, atomically.

        Args:
            path: The file to write.
            **card_fields: As for `card`.

        Raises:
            OSError: If the file cannot be written.
        """
        atomic_write_text(path, json.dumps(self.card(**card_fields), indent=2) + "\n")

    def columns(self) -> dict[str, Any]:
        """Return the per-example results by column, as for `pandas.DataFrame`.

        Returns:
            Column name -> N values. `broken_by` is None where the example is robust.
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
        """Write `columns()` into a Parquet file, atomically, with `summary()` as metadata.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(self.columns())
        summary = json.dumps(self.summary(), default=str)
        table = table.replace_schema_metadata({"raysweep.evaluation": summary})
        with atomic_open(path) as stream:
            pq.write_table(table, stream)

    def save_adversarial(self, path: Path) -> None:
        """Write `x_adv`, `labels`, `index` and `robust` into an .npz file, atomically.

        Args:
            path: The file to write.

        Raises:
            ValueError: If the report has no adversarial examples.
            OSError: If the file cannot be written.
        """
        if self.x_adv is None:
            raise ValueError(
                "the report has no adversarial examples: evaluate(..., keep_adversarial=True)"
            )
        arrays: dict[str, Any] = {
            "x_adv": self.x_adv,
            "labels": self.labels,
            "index": self.index,
            "robust": self.robust,
        }
        with atomic_open(path) as stream:
            np.savez(stream, **arrays)


def format_card_numbers(
    norm: str, eps: float, clean_accuracy: float, robust_accuracy: float
) -> dict[str, str]:
    """Write the numbers of an evaluation as RobustBench does.

    Args:
        norm: "Linf" or "L2".
        eps: Radius of the attacks, in pixels of [0, 1].
        clean_accuracy: Fraction in [0, 1].
        robust_accuracy: Fraction in [0, 1].

    Returns:
        The fields `eps`, `threat_model`, `clean_acc` and `reported` of a card.
    """
    return {
        "eps": _format_eps_fraction(eps) if norm == "Linf" else f"{eps:g}",
        "threat_model": norm,
        "clean_acc": f"{100 * clean_accuracy:.2f}",
        "reported": f"{100 * robust_accuracy:.2f}",
    }


def compute_wilson_interval(n_successes: int, n_samples: int) -> tuple[float, float]:
    """Compute the 95% score interval of a proportion (Wilson 1927).

    Args:
        n_successes: Number of successes, in 0..n_samples.
        n_samples: Number of samples. With 0 samples the interval is (0, 1).

    Returns:
        Lower and upper end, in [0, 1].
    """
    if n_samples == 0:
        return 0.0, 1.0
    # scipy.stats takes a second to import.
    z, share = compute_normal_quantile(0.95), n_successes / n_samples
    scale = 1 + z**2 / n_samples
    center = (share + z**2 / (2 * n_samples)) / scale
    variance = share * (1 - share) / n_samples + z**2 / (4 * n_samples**2)
    half_width = z * math.sqrt(variance) / scale
    low = 0.0 if n_successes == 0 else center - half_width
    high = 1.0 if n_successes == n_samples else center + half_width
    return low, high


def _format_eps_fraction(eps: float) -> str:
    """Format eps as k/255, as RobustBench does, if it is a whole number of pixel values."""
    pixels = eps * 255
    if pixels >= 1 and abs(pixels - round(pixels)) < 1e-6:
        return f"{round(pixels)}/255"
    return f"{eps:g}"
