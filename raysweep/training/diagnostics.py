"""What an epoch of training looked like: accuracies, kappa, weights and vulnerability, as numbers and histograms."""

import json
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from raysweep import storage
from raysweep.attacks import frozen, vulnerability
from raysweep.data import Split
from raysweep.files import write_whole
from raysweep.method import NATURAL, Method, Step, Workers

LOW_WEIGHT = 0.2
_FOLDER = "histograms"


class Histogram(TypedDict):
    """counts[i] examples in edges[i] <= value < edges[i + 1]; the last bin holds everything larger too."""

    edges: list[float]
    counts: list[int]


class Diagnostics:
    """Sums over an epoch, on the device: nothing waits for it until the end.

    Scalars, all `train/...`: `loss`; accuracy `clean` and under each attack, by name; for each attack that counts it
    `kappa_NAME` and `kappa_median_NAME`; `V_NAME`, mean vulnerability (L eq. 8-9); for each term `weight_NAME`, the
    mean weight before normalisation, `ess_NAME`, the effective share of the sample (sum w)^2 / (n sum w^2),
    `active_NAME`, the share with a weight at all, and `low_weight_NAME`, the share with weight under 0.2 of the batch's
    mean (L fig. 1a).
    """

    def __init__(self, method: Method, workers: Workers) -> None:
        self._method = method
        self._workers = workers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._edges: dict[str, list[float]] = {}
        self._inner: dict[str, Tensor] = {}

    def add(self, step: Step, y: Tensor) -> None:
        """One batch of a worker's rows."""
        self._sum("rows", y.new_full((), len(y)))
        # Each worker's loss is its part of the sum, times the number of workers.
        self._sum("loss", step.loss.detach() * step.rows / self._workers.size)
        for name, logits in step.logits.items():
            self._sum("clean" if name == NATURAL else name, (logits.detach().argmax(1) == y).sum())
        for name, adversarial in step.adversarial.items():
            attack = self._method.attacks[name]
            if adversarial.kappa is not None:
                self._sum(f"kappa_{name}", adversarial.kappa.sum())
                self._count(f"kappa_{name}", adversarial.kappa, [float(k) for k in range(attack.steps + 2)])
            value = vulnerability(step.logits[name].detach(), y, attack.view)
            self._sum(f"V_{name}", value.sum())
            self._count(f"V_{name}", value, _bins(-1.0 if attack.view == "margin" else 0.0, 1.0, 40))
        for name, weight in step.weights.items():
            self._sum(f"weight_{name}", weight.sum())
            self._sum(f"squares_{name}", (weight**2).sum())
            self._sum(f"active_{name}", (weight > 0).sum())
            relative = weight / weight.mean().clamp_min(torch.finfo(weight.dtype).tiny)
            self._sum(f"low_weight_{name}", (relative < LOW_WEIGHT).sum())
            self._count(f"weight_{name}", relative, _bins(0.0, 5.0, 50))

    def metrics(self) -> dict[str, float]:
        """Means over the epoch and over all workers."""
        totals = {name: self._workers.sum(total).item() for name, total in self._sums.items()}
        rows = totals.pop("rows")
        squares = {name: totals.pop(f"squares_{name}") for name in self._method.terms}
        result = {f"train/{name}": total / rows for name, total in totals.items()}
        for name, square in squares.items():
            result[f"train/ess_{name}"] = totals[f"weight_{name}"] ** 2 / (rows * square) if square else 0.0
        for name in self._method.attacks:
            if f"kappa_{name}" in self._counts:
                result[f"train/kappa_median_{name}"] = _median(
                    self._workers.sum(self._counts[f"kappa_{name}"]).tolist()
                )
        return result

    def histograms(self) -> dict[str, Histogram]:
        """`kappa_NAME` and `V_NAME` of each attack, `weight_NAME` of each term as a multiple of the batch's mean."""
        return {
            name: {"edges": self._edges[name], "counts": self._workers.sum(counts).tolist()}
            for name, counts in self._counts.items()
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Everything seen so far; `restore` takes it."""
        sums = {f"sum {name}": value for name, value in self._sums.items()}
        return sums | {f"count {name}": value for name, value in self._counts.items()}, self._edges

    def restore(self, seen: dict[str, Tensor], edges: dict[str, list[float]]) -> None:
        """Go on from another's `state`."""
        for key, value in seen.items():
            kind, _, name = key.partition(" ")
            (self._sums if kind == "sum" else self._counts)[name] = value
        self._edges = edges

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def _count(self, name: str, values: Tensor, edges: list[float]) -> None:
        if name not in self._inner:
            self._edges[name] = edges
            self._inner[name] = torch.tensor(edges[1:-1], device=values.device, dtype=torch.float64)
            empty = torch.zeros(len(edges) - 1, dtype=torch.int64, device=values.device)
            self._counts.setdefault(name, empty)
        bins = torch.bucketize(values.double(), self._inner[name], right=True)
        self._counts[name].index_add_(0, bins, torch.ones_like(bins))


def natural_accuracy(model: nn.Module, train: Split, count: int = 1000) -> float:
    """Accuracy at the first `count` training images as they are, by the model in eval mode."""
    rows = slice(0, min(count, len(train)))
    with frozen(model), torch.no_grad():
        right: Tensor = model(train.images(rows)).argmax(1) == train.y[rows]
    return right.float().mean().item()


def write_histograms(run_path: Path, epoch: int, histograms: dict[str, Histogram]) -> None:
    """RUN/histograms/epoch-NNNN.json, whole or not at all."""
    file = run_path / _FOLDER / f"epoch-{epoch:04d}.json"
    write_whole(file, json.dumps(histograms))
    storage.push(file)


def read_histograms(run_path: Path) -> dict[int, dict[str, Histogram]]:
    """Histograms of a run's epochs, 1-based, as far as they were trained in this folder."""
    storage.pull_files(run_path / _FOLDER, "epoch-*.json")
    files = sorted((run_path / _FOLDER).glob("epoch-*.json"))
    return {int(file.stem.removeprefix("epoch-")): json.loads(file.read_text()) for file in files}


def _bins(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / count for i in range(count + 1)]


def _median(counts: list[int]) -> float:
    """Lower median of whole numbers 0, 1, ... that occur so often."""
    seen, half = 0, (sum(counts) + 1) // 2
    for value, count in enumerate(counts):
        seen += count
        if seen >= half:
            return float(value)
    return 0.0
