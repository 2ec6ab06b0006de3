"""What an epoch of training looked like: accuracies, kappa, weights and vulnerability, as numbers
and histograms.
"""

import json
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.attacks import freeze_model, true_class_confidence
from raysweep.data import Split
from raysweep.method import NATURAL_INPUT, Method, MethodOutput
from raysweep.worker_group import WorkerGroup

LOW_WEIGHT_THRESHOLD = 0.2
_HISTOGRAM_FOLDER = "histograms"


class Histogram(TypedDict):
    """counts[i] examples in edges[i] <= value < edges[i + 1]; the last bin holds everything larger
    too.
    """

    edges: list[float]
    counts: list[int]


class EpochDiagnostics:
    """Sums over an epoch, on the device: nothing waits for it until the end.

    Scalars, all `train/...`: `loss`; accuracy `clean` and under each attack, by name; for each
    attack that counts it `kappa_NAME` and `kappa_median_NAME`; `V_NAME`, mean vulnerability (L eq.
    8-9); for each term `weight_NAME`, the mean weight before normalisation, `ess_NAME`, the
    effective share of the sample (sum w)^2 / (n sum w^2), `active_NAME`, the share with a weight at
    all, and `low_weight_NAME`, the share with weight under 0.2 of the batch's mean (L fig. 1a).
    """

    def __init__(self, method: Method, workers: WorkerGroup) -> None:
        self._method = method
        self._workers = workers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._edges: dict[str, list[float]] = {}
        self._inner_edges: dict[str, Tensor] = {}

    def add_batch(self, output: MethodOutput, y: Tensor) -> None:
        """One batch of a worker's rows."""
        self._accumulate_sum("rows", y.new_full((), len(y)))
        # Each worker's loss is its part of the sum, times the number of workers.
        self._accumulate_sum(
            "loss", output.loss.detach() * output.global_batch_size / self._workers.size
        )
        for name, logits in output.logits.items():
            self._accumulate_sum(
                "clean" if name == NATURAL_INPUT else name, (logits.detach().argmax(1) == y).sum()
            )
        for name, adversarial in output.attack_results.items():
            attack = self._method.attacks[name]
            if adversarial.kappa is not None:
                self._accumulate_sum(f"kappa_{name}", adversarial.kappa.sum())
                self._accumulate_histogram(
                    f"kappa_{name}", adversarial.kappa, [float(k) for k in range(attack.steps + 2)]
                )
            value = true_class_confidence(
                output.logits[name].detach(), y, attack.vulnerability_kind
            )
            self._accumulate_sum(f"V_{name}", value.sum())
            self._accumulate_histogram(
                f"V_{name}",
                value,
                _make_bin_edges(-1.0 if attack.vulnerability_kind == "margin" else 0.0, 1.0, 40),
            )
        for name, weight in output.weights.items():
            self._accumulate_sum(f"weight_{name}", weight.sum())
            self._accumulate_sum(f"squares_{name}", (weight**2).sum())
            self._accumulate_sum(f"active_{name}", (weight > 0).sum())
            relative = weight / weight.mean().clamp_min(torch.finfo(weight.dtype).tiny)
            self._accumulate_sum(f"low_weight_{name}", (relative < LOW_WEIGHT_THRESHOLD).sum())
            self._accumulate_histogram(f"weight_{name}", relative, _make_bin_edges(0.0, 5.0, 50))

    def compute_metrics(self) -> dict[str, float]:
        """Means over the epoch and over all workers."""
        totals = {
            name: self._workers.all_reduce_sum(total).item() for name, total in self._sums.items()
        }
        rows = totals.pop("rows")
        squares = {name: totals.pop(f"squares_{name}") for name in self._method.terms}
        result = {f"train/{name}": total / rows for name, total in totals.items()}
        for name, square in squares.items():
            result[f"train/ess_{name}"] = (
                totals[f"weight_{name}"] ** 2 / (rows * square) if square else 0.0
            )
        for name in self._method.attacks:
            if f"kappa_{name}" in self._counts:
                result[f"train/kappa_median_{name}"] = _compute_lower_median(
                    self._workers.all_reduce_sum(self._counts[f"kappa_{name}"]).tolist()
                )
        return result

    def compute_histograms(self) -> dict[str, Histogram]:
        """`kappa_NAME` and `V_NAME` of each attack, `weight_NAME` of each term as a multiple of the
        batch's mean.
        """
        return {
            name: {
                "edges": self._edges[name],
                "counts": self._workers.all_reduce_sum(counts).tolist(),
            }
            for name, counts in self._counts.items()
        }

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Everything seen so far; `restore` takes it."""
        sums = {f"sum {name}": value for name, value in self._sums.items()}
        return sums | {f"count {name}": value for name, value in self._counts.items()}, self._edges

    def restore_state(self, tensors: dict[str, Tensor], edges: dict[str, list[float]]) -> None:
        """Go on from another's `state`."""
        for key, value in tensors.items():
            kind, _, name = key.partition(" ")
            (self._sums if kind == "sum" else self._counts)[name] = value
        self._edges = edges

    def _accumulate_sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def _accumulate_histogram(self, name: str, values: Tensor, edges: list[float]) -> None:
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
    """Accuracy at the first `count` training images as they are, by the model in eval mode."""
    rows = slice(0, min(n_examples, len(split)))
    with freeze_model(model), torch.no_grad():
        right: Tensor = model(split.get_float_images(rows)).argmax(1) == split.y[rows]
    return right.float().mean().item()


def write_histograms(run_path: Path, epoch: int, histograms: dict[str, Histogram]) -> None:
    """RUN/histograms/epoch-NNNN.json, whole or not at all."""
    file = run_path / _HISTOGRAM_FOLDER / f"epoch-{epoch:04d}.json"
    atomic_write_text(file, json.dumps(histograms))
    storage.push_to_bucket(file)


def read_histograms(run_path: Path) -> dict[int, dict[str, Histogram]]:
    """Histograms of a run's epochs, 1-based, as far as they were trained in this folder."""
    storage.pull_files(run_path / _HISTOGRAM_FOLDER, "epoch-*.json")
    files = sorted((run_path / _HISTOGRAM_FOLDER).glob("epoch-*.json"))
    return {int(file.stem.removeprefix("epoch-")): json.loads(file.read_text()) for file in files}


def _make_bin_edges(low: float, high: float, n_bins: int) -> list[float]:
    return [low + (high - low) * i / n_bins for i in range(n_bins + 1)]


def _compute_lower_median(counts: list[int]) -> float:
    """Lower median of whole numbers 0, 1, ... that occur so often."""
    seen, half = 0, (sum(counts) + 1) // 2
    for value, count in enumerate(counts):
        seen += count
        if seen >= half:
            return float(value)
    return 0.0
