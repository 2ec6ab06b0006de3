"""Diagnostics of a training epoch: accuracies, kappa, instance weights and vulnerability.

They are stored as metrics of the epoch and as histograms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from pydantic import BaseModel

from raysweep.attacks import AttackResult, freeze_model, true_class_confidence
from raysweep.data import Split, choose_covering_rows
from raysweep.lazy_modules import torch
from raysweep.method import NATURAL_INPUT, Method, MethodOutput
from raysweep.stored_data import check_stored_types, parse_stored_json
from raysweep.stores import StorePath
from raysweep.training.metric_history import EpochMetrics
from raysweep.worker_group import WorkerGroup

if TYPE_CHECKING:
    from torch import Tensor, nn

LOW_WEIGHT_THRESHOLD = 0.2
"""Weights below this share of the batch's mean weight count as low (LRAT, figure 1a)."""

_HISTOGRAM_FOLDER = "histograms"


class _StoredHistogram(BaseModel):
    """What a file has of a histogram."""

    edges: list[float]
    counts: list[int]


class Histogram(TypedDict):
    """A histogram: counts[i] values are in edges[i] <= value < edges[i + 1].

    Smaller values are in the first bin, larger ones in the last.
    """

    edges: list[float]
    """Edges of the bins, one more than bins."""

    counts: list[int]
    """Number of values in each bin."""


class EpochDiagnostics:
    """Sums over the batches of an epoch. They stay on the device, so that no step waits for them.

    The metrics are as follows, where NAME is the name of an attack or of a term:

    * `train/loss`: mean loss.
    * `train/clean`, `train/NAME`: accuracy on natural images and under an attack.
    * `train/kappa_NAME`, `train/kappa_median_NAME`: mean and median kappa of an attack that counts
      kappa.
    * `train/V_NAME`: mean V under an attack, small where the model is vulnerable (LRAT, equations 8
      and 9).
    * `train/weight_NAME`: mean weight of a term before normalisation.
    * `train/ess_NAME`: effective sample size as a share, (sum w)^2 / (n sum w^2).
    * `train/active_NAME`: share of examples with a positive weight.
    * `train/low_weight_NAME`: share of examples below `LOW_WEIGHT_THRESHOLD` of the batch's mean.

    Args:
        method: The method with its schedules resolved for the epoch.
        workers: The processes that train together.
    """

    def __init__(self, method: Method, workers: WorkerGroup) -> None:
        self._method = method
        self._workers = workers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._edges: dict[str, list[float]] = {}
        self._inner_edges: dict[str, Tensor] = {}

    def add_batch(self, output: MethodOutput, y: Tensor) -> None:
        """Add one step.

        Args:
            output: Output of the method for this worker's rows.
            y: Labels of these rows, (N,).
        """
        self._accumulate_sum("rows", y.new_full((), len(y)))
        # A worker's loss is its part of the global batch's mean, times the number of workers.
        self._accumulate_sum(
            "loss", output.loss.detach() * output.global_batch_size / self._workers.size
        )
        for name, logits in output.logits.items():
            key = "clean" if name == NATURAL_INPUT else name
            self._accumulate_sum(key, (logits.detach().argmax(1) == y).sum())
        for name, attack_result in output.attack_results.items():
            self._add_attack_result(name, attack_result, output.logits[name].detach(), y)
        for name, weights in output.weights.items():
            self._add_weights(name, weights)

    def _add_attack_result(
        self, name: str, attack_result: AttackResult, logits: Tensor, y: Tensor
    ) -> None:
        """Add kappa and vulnerability under one attack."""
        attack = self._method.attacks[name]
        if attack_result.kappa is not None:
            self._accumulate_sum(f"kappa_{name}", attack_result.kappa.sum())
            edges = [float(k) for k in range(attack.steps + 2)]
            self._accumulate_histogram(f"kappa_{name}", attack_result.kappa, edges)
        vulnerability = true_class_confidence(logits, y, attack.vulnerability_kind)
        self._accumulate_sum(f"V_{name}", vulnerability.sum())
        low = -1.0 if attack.vulnerability_kind == "margin" else 0.0
        self._accumulate_histogram(f"V_{name}", vulnerability, _make_bin_edges(low, 1.0, 40))

    def _add_weights(self, name: str, weights: Tensor) -> None:
        """Add the instance weights of one term."""
        self._accumulate_sum(f"weight_{name}", weights.sum())
        self._accumulate_sum(f"squares_{name}", (weights**2).sum())
        self._accumulate_sum(f"active_{name}", (weights > 0).sum())
        relative = weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
        self._accumulate_sum(f"low_weight_{name}", (relative < LOW_WEIGHT_THRESHOLD).sum())
        self._accumulate_histogram(f"weight_{name}", relative, _make_bin_edges(0.0, 5.0, 50))

    def compute_metrics(self) -> EpochMetrics:
        """Compute the means over the epoch and over all workers. All workers must call this.

        Returns:
            The metrics listed at the class.
        """
        totals = {
            name: self._workers.all_reduce_sum(total).item() for name, total in self._sums.items()
        }
        n_rows = totals.pop("rows")
        # Terms with a `coef` of 0 may be left out of the epoch.
        term_names = [name for name in self._method.terms if f"squares_{name}" in totals]
        squares = {name: totals.pop(f"squares_{name}") for name in term_names}
        metrics = {f"train/{name}": total / n_rows for name, total in totals.items()}
        for name, square in squares.items():
            ess = totals[f"weight_{name}"] ** 2 / (n_rows * square) if square else 0.0
            metrics[f"train/ess_{name}"] = ess
        for name in self._method.attacks:
            if f"kappa_{name}" in self._counts:
                counts = self._workers.all_reduce_sum(self._counts[f"kappa_{name}"]).tolist()
                metrics[f"train/kappa_median_{name}"] = _compute_lower_median(counts)
        return metrics

    def compute_histograms(self) -> dict[str, Histogram]:
        """Compute the histograms over the epoch and over all workers. All workers must call this.

        Returns:
            `kappa_NAME` and `V_NAME` of each attack, and `weight_NAME` of each term. Weights are
            multiples of their batch's mean.
        """
        return {
            name: {
                "edges": self._edges[name],
                "counts": self._workers.all_reduce_sum(counts).tolist(),
            }
            for name, counts in self._counts.items()
        }

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Export the state for `restore_state`.

        Returns:
            Key -> tensor, and histogram name -> bin edges.
        """
        sums = {f"sum {name}": value for name, value in self._sums.items()}
        return sums | {f"count {name}": value for name, value in self._counts.items()}, self._edges

    def restore_state(self, tensors: dict[str, Tensor], edges: dict[str, list[float]]) -> None:
        """Continue from the state that `export_state` returned in another process.

        Args:
            tensors: Key -> tensor, on the device of the model.
            edges: Histogram name -> bin edges.
        """
        for key, value in tensors.items():
            kind, _, name = key.partition(" ")
            (self._sums if kind == "sum" else self._counts)[name] = value
        self._edges = edges

    def _accumulate_sum(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor to a named sum."""
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def _accumulate_histogram(self, name: str, values: Tensor, edges: list[float]) -> None:
        """Add values, (N,), to a named histogram."""
        if name not in self._inner_edges:
            self._edges[name] = edges
            self._inner_edges[name] = torch.tensor(
                edges[1:-1], device=values.device, dtype=torch.float64
            )
            empty = torch.zeros(len(edges) - 1, dtype=torch.int64, device=values.device)
            self._counts.setdefault(name, empty)
        bins = torch.bucketize(values.double(), self._inner_edges[name], right=True)
        self._counts[name].index_add_(0, bins, torch.ones_like(bins))


def measure_natural_accuracy(model: nn.Module, split: Split, n_examples: int = 1000) -> float:
    """Measure the accuracy on some natural images of a split, in eval mode.

    Args:
        model: Maps images in [0, 1], (N, C, H, W), to logits.
        split: Usually the training split.
        n_examples: Number of images (see `choose_covering_rows`).

    Returns:
        The accuracy, in [0, 1].
    """
    rows = choose_covering_rows(split, n_examples)
    with freeze_model(model), torch.no_grad():
        correct: Tensor = model(split.get_float_images(rows)).argmax(1) == split.y[rows]
    return correct.float().mean().item()


def write_histograms(run_path: StorePath, epoch: int, histograms: dict[str, Histogram]) -> None:
    """Write an epoch's histograms to RUN/histograms/epoch-NNNN.json, atomically.

    Args:
        run_path: Folder of the run.
        epoch: 1-based number of the epoch.
        histograms: Histograms by name.
    """
    file = run_path / _HISTOGRAM_FOLDER / f"epoch-{epoch:04d}.json"
    file.write_json(histograms)


def read_histograms(run_path: StorePath) -> dict[int, dict[str, Histogram]]:
    """Read a run's histograms. Epochs that were reused from other runs have none.

    Args:
        run_path: Folder of the run.

    Returns:
        1-based epoch -> name -> histogram.
    """
    files = (run_path / _HISTOGRAM_FOLDER).read_matching("epoch-*.json")
    histograms = {}
    for file, data in files.items():
        number = file.name.removeprefix("epoch-").removesuffix(".json")
        if number.isascii() and number.isdecimal():
            content = parse_stored_json(data, str(file), {})
            types = dict.fromkeys(content, _StoredHistogram)
            check_stored_types(content, types, str(file))
            histograms[int(number)] = content
    return histograms


def _make_bin_edges(low: float, high: float, n_bins: int) -> list[float]:
    """Return the edges of equally wide bins."""
    return [low + (high - low) * i / n_bins for i in range(n_bins + 1)]


def _compute_lower_median(counts: list[int]) -> float:
    """Return the lower median of integers from a histogram: `counts[i]` of them are equal to i."""
    cumulative, half = 0, (sum(counts) + 1) // 2
    for value, count in enumerate(counts):
        cumulative += count
        if cumulative >= half:
            return float(value)
    return 0.0
