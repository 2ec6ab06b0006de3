"""One training step and what is recorded of it, in numbers worked out by hand, with one worker and
with two.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysweep.attacks import PGD, AttackResult
from raysweep.catalog import METHODS
from raysweep.data import DatasetSplits
from raysweep.instance_weights import (
    GeometryWeight,
    ProbabilisticMarginWeight,
    RemainderWeight,
    VulnerabilityWeight,
)
from raysweep.method import NATURAL_INPUT, Method, MethodOutput, Term
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError, apply_overrides
from raysweep.stores import open_path
from raysweep.training import distributed
from raysweep.training.diagnostics import (
    EpochDiagnostics,
    measure_natural_accuracy,
    read_histograms,
    write_histograms,
)
from raysweep.training.distributed import (
    average_gradients,
    average_metrics,
    broadcast_int,
    check_method_distributable,
)
from raysweep.training.trainer import train_model
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup


class Rank:
    """One of two workers, each in a thread: `sum` waits for the value of the other."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, values: dict[int, Tensor]) -> None:
        self.rank, self._barrier, self._values = rank, barrier, values

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        self._values[self.rank] = value.detach().clone()
        self._barrier.wait()
        total = self._values[0] + self._values[1]
        self._barrier.wait()
        return total

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        total = self.all_reduce_sum(value)
        return lambda: total


def on_two_workers(work: Callable[[WorkerGroup], Any]) -> list[Any]:
    """Run `work` on both workers and return both results."""
    barrier, values, found = threading.Barrier(2, timeout=600), {}, {}
    ranks = [Rank(rank, barrier, values) for rank in range(2)]
    threads = [threading.Thread(target=lambda r=r: found.update({r.rank: work(r)})) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


class Row(nn.Module):
    """Logits of an image are its own pixels, in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


# Three classes; the first two rows are right. Attacks with eps 0 leave them so: kappa is 4, 4, 0.
LOGITS = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.7, 0.4, 0.6]]
LABELS = [0, 1, 2]
STILL = PGD(eps=0.0, step_size=0.0, steps=4)


def ce(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


CE = [ce(z, y) for z, y in zip(LOGITS, LABELS, strict=True)]


def step_of(
    method: Method, workers: WorkerGroup = SINGLE_WORKER, rows: slice = slice(None)
) -> MethodOutput:
    x = torch.tensor(LOGITS, dtype=torch.float64)[rows].view(-1, 1, 1, 3)
    return method(
        Row(),
        x,
        torch.tensor(LABELS)[rows],
        ExampleRng.for_examples(torch.arange(len(x)), 0),
        workers,
    )


def by_hand_method(normalise: bool = False, divided: bool = True) -> Method:
    return Method(
        attacks={"pgd": STILL},
        terms={
            "clean": Term(on="natural", coef=0.5),
            "both": Term(
                on="natural+pgd",
                coef=2.0,
                weight=GeometryWeight(lam=-1.0, by="pgd", normalise=divided),
            ),
            "rest": Term(
                on="pgd", coef=3.0, weight=RemainderWeight(total=1.5, of=("clean", "both"))
            ),
        },
        normalise=normalise,
    )


def expected_loss(normalise: bool, divided: bool) -> float:
    # (1 + tanh(-1 + 5 (1 - 2 kappa / 4))) / 2 of kappa 4, 4, 0.
    both = [(1 + math.tanh(-1 - 5)) / 2] * 2 + [(1 + math.tanh(-1 + 5)) / 2]
    rest = [max(1.5 - 1 - w, 0) for w in both]
    if divided:
        both = [w / (sum(both) / 3) for w in both]
    total = sum(
        0.5 * c + 2 * w * (c + c) + 3 * r * c for c, w, r in zip(CE, both, rest, strict=True)
    )
    return total / (sum(1 + w + r for w, r in zip(both, rest, strict=True)) if normalise else 3)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_the_loss_by_hand(normalise: bool, divided: bool) -> None:
    """A term sees the weights of earlier terms before they are divided by their mean."""
    method = by_hand_method(normalise, divided)
    step = step_of(method)
    assert step.attack_results["pgd"].kappa is not None and step.attack_results[
        "pgd"
    ].kappa.tolist() == [4, 4, 0]
    assert step.loss.item() == pytest.approx(expected_loss(normalise, divided), rel=1e-9)
    assert step.global_batch_size == 3
    parts = on_two_workers(
        lambda w: step_of(method, w, slice(0, 1) if w.rank == 0 else slice(1, 3))
    )
    assert [len(part.weights["both"]) for part in parts] == [1, 2] and all(
        part.global_batch_size == 3 for part in parts
    )
    assert sum(part.loss.item() for part in parts) / 2 == pytest.approx(step.loss.item(), rel=1e-9)


def test_a_worker_without_rows_has_no_part_in_the_loss() -> None:
    parts = on_two_workers(
        lambda w: step_of(by_hand_method(), w, slice(0, 3) if w.rank == 0 else slice(3, 3))
    )
    assert parts[1].loss == 0 and parts[0].loss.item() / 2 == pytest.approx(
        expected_loss(False, True), rel=1e-9
    )


def test_weights_that_are_all_zero_give_a_loss_of_zero() -> None:
    nothing = Term(on="pgd", weight=GeometryWeight(shape="piecewise", table=(0.0,)))
    faint = Term(on="pgd", weight=VulnerabilityWeight(alpha=0.0))
    for term, normalise in ((nothing, False), (nothing, True), (faint, True)):
        assert (
            step_of(Method(attacks={"pgd": STILL}, terms={"a": term}, normalise=normalise)).loss
            == 0
        )


def test_the_model_sees_the_views_in_order_and_natural_data_only_if_a_term_needs_them() -> None:
    """The running statistics of a batch norm show the order and number of forwards in training."""

    def norm_after(terms: dict[str, Term]) -> tuple[nn.BatchNorm2d, MethodOutput, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
        x = torch.rand(6, 1, 2, 2)
        used = {view for term in terms.values() for view in term.input_names} - {NATURAL_INPUT}
        attacks = {
            name: PGD(eps=0.3, step_size=0.2, steps=2, loss=loss)
            for name, loss in (("pgd", "ce"), ("cw", "cw"))
        }
        method = Method(
            attacks={name: attacks[name] for name in attacks if name in used}, terms=terms
        )
        rng = ExampleRng.for_examples(torch.arange(6), 0)
        return model[0], method(model, x, torch.arange(6) % 3, rng), x

    norm, step, x = norm_after(
        {"cw": Term(on="cw"), "pgd": Term(on="pgd"), "natural": Term(on="natural")}
    )
    mean = 0.0
    for view in (x, step.attack_results["pgd"].x_adv, step.attack_results["cw"].x_adv):
        mean = 0.9 * mean + 0.1 * view.mean().item()
    assert norm.num_batches_tracked == 3 and norm.running_mean is not None
    assert norm.running_mean.item() == pytest.approx(mean, rel=1e-5)
    for term, forwards in (
        (Term(on="pgd"), 1),
        (Term(on="pgd", loss="kl"), 2),
        (Term(on="pgd", loss="kl_misclassified"), 2),
        (Term(on="pgd", weight=ProbabilisticMarginWeight(by="natural")), 2),
        (Term(on="pgd+natural"), 2),
    ):
        assert norm_after({"a": term})[0].num_batches_tracked == forwards, term


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"attacks": {"natural": {"kind": "pgd"}}, "terms": {"a": {"on": "natural"}}},
            "is the name of the natural images",
        ),
        (
            {"attacks": {"my-pgd": {"kind": "pgd"}}, "terms": {"a": {"on": "my-pgd"}}},
            "'my-pgd' is not a plain name",
        ),
        ({"terms": {"a b": {"on": "natural"}}}, "'a b' is not a plain name"),
        ({"name": "../up", "terms": {"a": {"on": "natural"}}}, "use letters, digits"),
        ({"terms": {"a": {"on": "natural + pgd"}}}, r"terms\.a\.on: no input 'pgd'"),
        (
            {"terms": {"a": {"on": "natural", "weight": {"kind": "margin", "by": "cw"}}}},
            r"weight\.by: no input 'cw'",
        ),
        ({"terms": {}}, "at least 1 item"),
        (
            {
                "terms": {
                    "a": {"on": "natural", "weight": {"kind": "remainder", "total": 1, "of": ["a"]}}
                }
            },
            "before it",
        ),
    ],
)
def test_a_method_that_makes_no_sense_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Method.from_data(data)


def test_a_term_may_have_the_name_of_the_clean_view() -> None:
    assert list(Method.from_data({"terms": {"natural": {"on": "natural"}}}).terms) == ["natural"]


P = [
    [0.51, 0.30, 0.19],
    [0.60, 0.31, 0.09],
    [0.10, 0.09, 0.81],
    [0.21, 0.20, 0.59],
    [0.25, 0.51, 0.24],
]
Y, KAPPA, WEIGHT = [0, 1, 2, 0, 1], [0, 1, 3, 4, 3], [0.1, 1.0, 2.9, 0.0, 0.5]
RECORDED = Method(
    attacks={"pgd": PGD(steps=4), "cw": PGD(steps=4, loss="cw")},
    terms={"pgd": Term(on="pgd+cw"), "clean": Term(on="natural")},
)


def method_output(rows: slice, loss: float, of: int) -> tuple[MethodOutput, Tensor]:
    logits = torch.tensor(P)[rows].log()
    kappa = torch.tensor(KAPPA)[rows]
    # On natural data all rows but the first are right.
    natural = torch.nn.functional.one_hot(torch.tensor([1, 1, 2, 0, 1])[rows], 3).float()
    spent = torch.full_like(kappa, 4)
    return (
        MethodOutput(
            loss=torch.tensor(loss),
            natural_logits=natural,
            logits={NATURAL_INPUT: natural, "pgd": logits, "cw": logits},
            attack_results={
                "pgd": AttackResult(logits, spent, kappa),
                "cw": AttackResult(logits, spent),
            },
            weights={"pgd": torch.tensor(WEIGHT)[rows], "clean": torch.zeros(len(kappa))},
            global_batch_size=torch.tensor(float(of)),
        ),
        torch.tensor(Y)[rows],
    )


EXPECTED = {
    "train/loss": 2.6,  # (4 x 2 + 1 x 5) / 5
    "train/clean": 0.8,
    "train/pgd": 0.6,
    "train/cw": 0.6,
    "train/kappa_pgd": 2.2,
    "train/kappa_median_pgd": 3.0,
    "train/V_pgd": 0.47,  # (0.51 + 0.31 + 0.81 + 0.21 + 0.51) / 5
    "train/V_cw": 0.102,  # (0.21 - 0.29 + 0.71 - 0.38 + 0.26) / 5
    "train/weight_pgd": 0.9,
    "train/ess_pgd": 4.5**2 / (5 * 9.67),
    "train/active_pgd": 0.8,
    "train/low_weight_pgd": 0.4,
    "train/weight_clean": 0.0,
    "train/ess_clean": 0.0,
    "train/active_clean": 0.0,
    "train/low_weight_clean": 1.0,
}
# {bin: examples}, of bins 0.025 and 0.05 wide for V, 0.1 for weights as multiples of their batch's
# mean.
BINS = {
    "kappa_pgd": {0: 1, 1: 1, 3: 2, 4: 1},
    "V_pgd": {8: 1, 12: 1, 20: 2, 32: 1},
    "V_cw": {12: 1, 14: 1, 24: 1, 25: 1, 34: 1},
    "weight_pgd": {0: 1, 1: 1, 10: 2, 29: 1},
    "weight_clean": {0: 5},
}


def test_the_record_of_an_epoch_by_hand() -> None:
    seen = EpochDiagnostics(RECORDED, SINGLE_WORKER)
    seen.add_batch(*method_output(slice(0, 4), 2.0, 4))
    assert seen.compute_metrics()["train/kappa_median_pgd"] == 1.0, (
        "the lower of the two medians of 0, 1, 3, 4"
    )
    seen.add_batch(*method_output(slice(4, 5), 5.0, 1))
    assert seen.compute_metrics() == pytest.approx(EXPECTED)
    histograms = seen.compute_histograms()
    assert {
        k: {i: n for i, n in enumerate(h["counts"]) if n} for k, h in histograms.items()
    } == BINS
    edges = {name: histogram["edges"] for name, histogram in histograms.items()}
    assert edges["kappa_pgd"] == [0, 1, 2, 3, 4, 5]
    for name, low, high, count in (
        ("V_pgd", 0, 1, 40),
        ("V_cw", -1, 1, 40),
        ("weight_pgd", 0, 5, 50),
    ):
        assert len(edges[name]) == count + 1 and edges[name][0] == low and edges[name][-1] == high
        assert edges[name][1] - edges[name][0] == pytest.approx((high - low) / count)


def test_two_workers_record_what_one_does() -> None:
    """A worker's loss is its part of the global mean, times the number of workers."""

    def work(workers: WorkerGroup) -> tuple[dict[str, float], dict[str, Any]]:
        seen = EpochDiagnostics(RECORDED, workers)
        seen.add_batch(
            *(
                method_output(slice(0, 4), 8 / 5 * 2, 5)
                if workers.rank == 0
                else method_output(slice(4, 5), 5 / 5 * 2, 5)
            )
        )
        return seen.compute_metrics(), seen.compute_histograms()

    for metrics, histograms in on_two_workers(work):
        assert metrics == pytest.approx(EXPECTED)
        assert {
            k: {i: n for i, n in enumerate(h["counts"]) if n} for k, h in histograms.items()
        } == BINS


def test_a_weight_beyond_the_last_edge_is_in_the_last_bin() -> None:
    """One of eight rows has all the weight, eight times the mean; the histogram ends at five times
    the mean.
    """
    logits, y = torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)
    method = Method(terms={"clean": Term(on="natural")})
    weight = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    seen = EpochDiagnostics(method, SINGLE_WORKER)
    seen.add_batch(
        MethodOutput(
            torch.tensor(1.0),
            logits,
            {NATURAL_INPUT: logits},
            {},
            {"clean": weight},
            torch.tensor(8.0),
        ),
        y,
    )
    assert seen.compute_histograms()["weight_clean"]["counts"] == [7, *[0] * 48, 1]
    assert seen.compute_metrics()["train/ess_clean"] == pytest.approx(1 / 8)


def test_natural_accuracy_is_at_the_first_images_in_eval_mode(digits: DatasetSplits) -> None:
    class Seen(nn.Module):
        rows = 0

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            self.rows += len(x)
            return (
                nn.functional.one_hot(digits.train.y[: len(x)], 10).float()
                * torch.arange(len(x)).lt(5)[:, None]
            )

    model = Seen().train()
    assert set(digits.train.y[:30].tolist()) == set(range(10)), "these are covered"
    right = 5 + int((digits.train.y[5:30] == 0).sum())
    assert measure_natural_accuracy(model, digits.train, 30) == pytest.approx(right / 30)
    assert model.rows == 30 and model.training
    measure_natural_accuracy(model, digits.train)
    assert model.rows == 30 + 64


def test_histograms_are_kept_by_epoch(tmp_path: Path) -> None:
    for epoch in (1, 12):
        write_histograms(
            open_path(tmp_path), epoch, {"V": {"edges": [0.0, 1.0], "counts": [epoch]}}
        )
    assert sorted(path.name for path in (tmp_path / "histograms").iterdir()) == [
        "epoch-0001.json",
        "epoch-0012.json",
    ]
    assert {
        epoch: found["V"]["counts"] for epoch, found in read_histograms(open_path(tmp_path)).items()
    } == {
        1: [1],
        12: [12],
    }


def test_metrics_of_workers_are_weighted_by_their_rows() -> None:
    parts = [({"clean": 0.5, "pgd": 1 / 3}, 3), ({"clean": 0.1, "pgd": 1 / 3}, 1)]
    for found in on_two_workers(lambda w: average_metrics(*parts[w.rank], w, torch.device("cpu"))):
        assert found == {"clean": 0.4, "pgd": 0.333333}, (
            "values are rounded, so that ties stay ties"
        )
    assert average_metrics({"pgd": 1 / 3}, 3, SINGLE_WORKER, torch.device("cpu")) == {"pgd": 1 / 3}


def test_the_first_workers_number_is_everybodys() -> None:
    assert on_two_workers(lambda w: broadcast_int(7 - 4 * w.rank, w, torch.device("cpu"))) == [7, 7]
    assert broadcast_int(3, SINGLE_WORKER, torch.device("cpu")) == 3


@pytest.mark.parametrize("bucket_bytes", [1, 2**22])
def test_gradients_are_averaged_in_their_own_place_and_type(bucket_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", bucket_bytes)

    def work(workers: WorkerGroup) -> list[Tensor | None]:
        model = nn.ParameterList(
            [
                torch.zeros(2),
                torch.zeros(1, 3, dtype=torch.float64),
                torch.zeros(4),
                torch.zeros(2, 2, 1, 2).contiguous(memory_format=torch.channels_last),
            ]
        )
        loss = torch.zeros((), dtype=torch.float64)
        for number, parameter in enumerate(model):
            if number != 2:
                values = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter)
                loss = loss + (parameter * (values + 10 * number) * (1 + 2 * workers.rank)).sum()
        with average_gradients(model, workers):
            loss.backward()
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in model)
        return [parameter.grad for parameter in model]

    for grads in on_two_workers(work):
        assert grads[2] is None
        assert grads[0].tolist() == [0, 2] and grads[3].flatten().tolist() == [*range(60, 76, 2)]
        assert grads[1].tolist() == [[20, 22, 24]] and grads[1].dtype == torch.float64


@pytest.mark.parametrize("bucket_bytes", [1, 2**22])
def test_gradients_of_networks_that_recompute_activations_are_complete(
    bucket_bytes: int, monkeypatch
) -> None:
    """Each of two forward passes adds to the gradients in a backward pass of its own."""
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", bucket_bytes)

    def work(workers: WorkerGroup) -> list[list[list[float]]]:
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
        for layer in model:
            nn.init.eye_(layer.weight)
        x = torch.tensor([[1.0, 10.0]]) * (1 + 2 * workers.rank)
        passes = [checkpoint(model, x.requires_grad_(), use_reentrant=True) for _ in range(2)]
        with average_gradients(model, workers):
            (passes[0].sum() + 2 * passes[1].sum()).backward()
        return [layer.weight.grad.tolist() for layer in model]

    # The loss is three times the sum of the outputs, and the workers' mean image is (2, 20).
    for grads in on_two_workers(work):
        assert grads == [[[6, 60], [6, 60]]] * 2


def test_gradients_are_summed_during_the_backward_pass(monkeypatch) -> None:
    """Those of the last layer before the first layer has any."""
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 1)
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    events: list[str] = []

    class Group(Rank):
        def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
            events.append("sum" if first.weight.grad is None else "late sum")
            return lambda: events.append("wait") or value

    group = Group(0, threading.Barrier(1), {})
    with average_gradients(nn.Sequential(first, last), group):
        last(first(torch.ones(1, 2))).sum().backward()
    assert events[:2] == ["sum", "sum"] and events[4:] == ["wait"] * 4


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"mode": "train", "tau": 1}, True),
        ({"mode": "train", "tau": 0}, True),
        (
            {"mode": "train", "tau": {"kind": "piecewise", "boundaries": [5], "values": [0, 3]}},
            True,
        ),
        ({"mode": "train"}, False),
        ({"tau": 1}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("attack", ["pgd", "cw"])
def test_which_attacks_several_workers_refuse(
    changes: dict[str, Any], refused: bool, attack: str
) -> None:
    """Batch norms over the rows of all workers need the same number of forwards on each worker."""
    method = apply_overrides(
        METHODS["lrat"](), {f"attacks.{attack}.{key}": value for key, value in changes.items()}
    )
    check_method_distributable(method, SINGLE_WORKER)
    two = Rank(0, threading.Barrier(2), {})
    if refused:
        with pytest.raises(SpecError, match=rf"method\.attacks\.{attack}: mode train with tau"):
            check_method_distributable(method, two)
    else:
        check_method_distributable(method, two)
    check_method_distributable(METHODS["mma"](), two)


def test_one_worker_trains_with_batch_norms_in_train_mode_under_an_attack_that_stops_early(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    settings = {"method__attacks__pgd__mode": "train", "method__attacks__pgd__tau": 1}
    fitted = train_model(tiny("at", epochs=1, **settings), tmp_path, data=digits)
    assert fitted.last_checkpoint.epoch == 1 and math.isfinite(
        fitted.last_checkpoint.last_metrics["train/loss"]
    )
