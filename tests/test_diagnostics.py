"""What training records of kappa, weights and vulnerability, the flatness of the loss, and the
figures of it all.
"""

import pytest
import torch

from raysweep.catalog import METHODS
from raysweep.data import DataSpec, load_data
from raysweep.models import ModelSpec
from raysweep.plots import plot_logits_map, plot_run_figures, plot_vulnerable_map
from raysweep.rng import ExampleRng
from raysweep.spec import apply_overrides
from raysweep.stores import open_path
from raysweep.training.config import build_training_config
from raysweep.training.diagnostics import EpochDiagnostics, read_histograms
from raysweep.training.input_gradient_norms import input_gradient_norm
from raysweep.training.trainer import train_model
from raysweep.worker_group import SINGLE_WORKER


def record(method, batches, epoch=0, workers=SINGLE_WORKER):
    """Diagnostics of some steps of an untrained model, and the steps."""
    model, seen, steps = ModelSpec().build_model(1, 10, 0), EpochDiagnostics(method, workers), []
    for number, (x, y) in enumerate(batches):
        index = torch.arange(len(y)) + 1000 * number
        steps.append(
            method.resolve_at(epoch)(model, x, y, ExampleRng.for_examples(index, 0), workers)
        )
        seen.add_batch(steps[-1], y)
    return seen, steps


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
        for n in (32, 9)
    ]


def test_numbers_by_hand(batches):
    method = apply_overrides(METHODS["gairat"](), {"terms.pgd.weight.burn_in": 0})
    seen, steps = record(method, batches)
    kappa = torch.cat([s.attack_results["pgd"].kappa for s in steps])
    weights = [s.weights["pgd"] for s in steps]
    weight = torch.cat(weights)
    y = torch.cat([y for _, y in batches])
    p = torch.cat([s.logits["pgd"] for s in steps]).detach().softmax(1)
    expected = {
        "train/kappa_pgd": kappa.double().mean(),
        "train/kappa_median_pgd": kappa.sort().values[(len(kappa) - 1) // 2],
        "train/weight_pgd": weight.mean(),
        "train/ess_pgd": weight.sum() ** 2 / (len(weight) * (weight**2).sum()),
        "train/active_pgd": (weight > 0).double().mean(),
        "train/low_weight_pgd": torch.cat([w / w.mean() < 0.2 for w in weights]).float().mean(),
        "train/V_pgd": p.gather(1, y[:, None]).mean(),
        "train/pgd": (p.argmax(1) == y).float().mean(),
        "train/loss": sum(s.loss.detach() * len(b[1]) for s, b in zip(steps, batches, strict=True))
        / len(y),
    }
    metrics = seen.compute_metrics()
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    histograms = seen.compute_histograms()
    assert histograms["kappa_pgd"]["counts"] == torch.bincount(kappa, minlength=11).tolist()
    for histogram in histograms.values():
        assert sum(histogram["counts"]) == len(y)
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1


class TwoWorkers:
    """As if another worker had seen the same."""

    size = 2
    rank = 0

    def all_reduce_sum(self, value):
        return 2 * value


@pytest.mark.parametrize("name", ["lrat", "mma", "standard", "trades", "gair-rst"])
def test_every_method_can_be_recorded(batches, name):
    """Means over all workers do not change if all see the same; counts add up."""
    seen, _ = record(METHODS[name](), batches, epoch=150)
    both, _ = record(METHODS[name](), batches, epoch=150, workers=TwoWorkers())
    one, two = seen.compute_metrics(), both.compute_metrics()
    assert one == pytest.approx(two)
    shares = [key for key in one if "low_weight" in key or "ess" in key]
    assert len(shares) >= 2
    assert all(0 <= one[key] <= 1 for key in shares)
    for key, histogram in seen.compute_histograms().items():
        assert both.compute_histograms()[key]["counts"] == [2 * c for c in histogram["counts"]]


def test_flatness_is_the_mean_gradient_norm():
    """Without an attack to move the data, by hand; and friendly data are no steeper than a straight
    line says.
    """
    data = load_data(DataSpec(val_size=20))
    model = ModelSpec().build_model(1, 10, 0)
    attack = METHODS["at"]().attacks["pgd"].model_copy(update={"eps": 0.0, "step_size": 0.0})
    result = input_gradient_norm(model, data.val, attack, n_examples=20, batch_size=7)
    x, y = data.val.get_float_images(slice(0, 20)).requires_grad_(), data.val.y[:20]
    model.eval()
    norms = []
    for i in range(20):
        loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        norms.append(torch.autograd.grad(loss, x)[0].norm())
    expected = float(torch.stack(norms).mean())
    assert result == pytest.approx(
        {"flatness_friendly": expected, "flatness_adversarial": expected}, rel=1e-4
    )


def test_a_run_records_and_draws(tmp_path):
    settings = {
        "data.val_size": 60,
        "data.train_size": 120,
        "epochs": 2,
        "validation.flatness": True,
    }
    settings |= {"method.terms.pgd.weight.burn_in": 1, "*.steps": 2}
    fitted = train_model(build_training_config("gairat", settings), tmp_path / "run")
    histograms = read_histograms(open_path(tmp_path / "run"))
    assert list(histograms) == [1, 2]
    assert sum(histograms[2]["kappa_pgd"]["counts"]) == 120
    row = fitted.last_checkpoint.last_metrics
    assert {
        "train/natural",
        "flatness_friendly",
        "flatness_adversarial",
        "train/low_weight_pgd",
    } <= row.keys()
    figures = plot_run_figures(fitted.last_checkpoint.history, histograms)
    expected = {
        "errors",
        "flatness",
        "kappa_pgd",
        "kappa_pgd_histogram",
        "V_pgd_histogram",
        "weight_pgd_histogram",
    }
    assert set(figures) == expected
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_training_errors_are_those_of_fixed_images_if_there_are_any():
    """G fig. 4: not those of the training steps, in train mode and under PGD-10."""
    row = {"epoch": 1, "train/pgd": 0.5, "train/kappa_median_pgd": 3.0, "train/natural": 0.9}
    row |= {"clean": 0.8, "pgd": 0.4, "robust_worst": 0.3}
    lines = {}
    for more in ({}, {"train/robust": 0.6}):
        (axes,) = plot_run_figures([row | more], {})["errors"].axes
        lines = {line.get_label(): float(line.get_ydata()[0]) for line in axes.lines}
        expected = (
            {"under pgd, training": 0.4} if more else {"under pgd in train mode, training": 0.5}
        )
        expected |= {"natural, training": 0.1, "natural, validation": 0.2}
        expected |= {"under pgd, validation": 0.6, "worst case, validation": 0.7}
        assert lines == pytest.approx(expected)


def test_maps_of_instances(tmp_path):
    """G fig. 7 and L fig. 2 from logits; two classes that differ in one direction are told apart by
    it.
    """
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(60, 10, generator=generator), torch.arange(60) % 3
    logits[:, 0] += 20 * (y == 1)
    kappa = torch.randint(11, (60,), generator=generator)
    figure = plot_logits_map(logits, y, kappa, (0, 1))
    zeros, ones = (dots.get_offsets()[:, 0] for dots in figure.axes[0].collections)
    assert len(zeros) == len(ones) == 20
    assert zeros.max() < ones.min() or ones.max() < zeros.min()
    v = torch.rand(60, generator=generator)
    same = plot_vulnerable_map(logits, v, v)
    assert [text.get_text() for text in same.axes[0].get_legend().get_texts()] == [
        "consistent: 12",
        "inconsistent: 0",
    ]
    for number, drawn in enumerate((figure, same)):
        drawn.savefig(tmp_path / f"{number}.png")
