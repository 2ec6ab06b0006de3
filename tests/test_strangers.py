"""Models as other people write them: the same verdicts as for a plain model of the same weights."""

from functools import cache

import numpy as np
import pytest
import torch
from strangers import (
    STRANGERS,
    AddsAnOffset,
    AutocastsInside,
    HasNoAnswerForOddBatches,
    KeepsBatchNormsInTrainMode,
    OfBatchesOfEight,
    Plain,
    RemembersItsImages,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from raysweep.attacks import APGD, FAB, PGD, AttackCascade, Square
from raysweep.evaluation import evaluate
from raysweep.evaluation.attack_model import make_attack_model
from raysweep.spec import SpecError

EPS = 0.06
# Radius at which an attack breaks some images and not all, where it is another.
RADII = {"pruned": 0.35, "orthogonal": 0.04}


def images(n: int = 24) -> tuple[Tensor, Tensor]:
    """Images, labelled as the plain model sees them, so that attacks have something to break."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, Plain().eval()(x).argmax(1)


def brief(eps: float) -> AttackCascade:
    """`apgd-ce,square` in fewer steps, where more would show no more."""
    return AttackCascade(
        attacks={"apgd-ce": APGD(eps=eps, steps=15), "square": Square(eps=eps, queries=100)}
    )


# Named attacks of few steps.
SHORT = {
    "apgd-ce": AttackCascade(attacks={"apgd-ce": APGD(eps=EPS, steps=15)}),
    "fab": AttackCascade(attacks={"fab": FAB(eps=EPS, steps=10, targets=None)}),
    "pgd": AttackCascade(attacks={"pgd": PGD(eps=EPS, step_size=EPS / 4, steps=10)}),
}


@cache
def plain_report(attack: str, n: int = 24):
    """Of the plain model: what others are compared with."""
    return evaluate(Plain(), *images(n), SHORT[attack])


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x.clone()).argmax(1)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", sorted(STRANGERS))
def test_a_strangers_model_is_attacked_as_the_plain_one(name: str) -> None:
    stranger, plain = STRANGERS[name]()
    x, _ = images()
    y = labels_of(plain, x)
    modes = [module.training for module in stranger.modules()]
    state = {key: value.clone() for key, value in stranger.state_dict().items()}
    eps = RADII.get(name, EPS)
    attack = AttackCascade(
        attacks={"square": Square(eps=eps, queries=40), "apgd": APGD(eps=eps, steps=12)}
    )
    found, expected = (evaluate(model, x, y, attack) for model in (stranger, plain))
    assert 0 < expected.robust_accuracy < 1, "the attacks break some and not all"
    assert found.broken_by.tolist() == expected.broken_by.tolist()
    assert found.robust.tolist() == expected.robust.tolist()
    assert found.margin_before.tolist() == pytest.approx(
        expected.margin_before.tolist(), rel=1e-3, abs=1e-3
    )
    assert [line for line in found.warnings if "masked" not in line] == []
    assert [module.training for module in stranger.modules()] == modes
    for key, value in stranger.state_dict().items():
        assert torch.equal(value, state[key]), "the model is as it was"


def test_a_model_that_autocasts_is_attacked_without_the_fast_gradient() -> None:
    """In bf16 the plain model's verdicts are not its own: those of its plain copy are."""
    model = AutocastsInside()
    x, _ = images()
    y = labels_of(model, x)
    fast, slow = (evaluate(model, x, y, SHORT["apgd-ce"], fold=fold) for fold in (True, False))
    assert fast.robust.tolist() == slow.robust.tolist() and 0 < slow.robust_accuracy < 1


def test_fast_paths_are_still_taken_by_our_own_kind_of_model() -> None:
    x, _ = images(32)
    copied = make_attack_model(Plain(), x)
    assert not [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    assert copied.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", SHORT)
def test_the_callers_mode_changes_nothing(context, attack: str) -> None:
    model, (x, y), expected = Plain(), images(), plain_report(attack)
    with context():
        found = evaluate(model, x * 1, y * 1, SHORT[attack])
    assert found.robust.tolist() == expected.robust.tolist() and 0 < found.robust_accuracy < 1
    assert found.warnings == expected.warnings


def test_an_answer_that_depends_on_the_batch_is_said_and_batches_are_filled_with_images() -> None:
    model = KeepsBatchNormsInTrainMode()
    x, _ = images(8)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    report = evaluate(KeepsBatchNormsInTrainMode(), x, y, "square", 0.0)
    assert report.clean_accuracy == 1.0, "black images would have changed the statistics"
    assert any("depend on the others of its batch" in line for line in report.warnings)
    x, y = images(8)
    assert not any("batch" in line for line in evaluate(Plain(), x, y, "square", 0.0).warnings)


class CutsTheGraph(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach().requires_grad_())


class Noisy(AddsAnOffset):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.5 * torch.randn_like(logits)


class Constant(AddsAnOffset):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(x)) + x.sum() * 0


class Sigmoids(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (CutsTheGraph, ["only Square can be run"]),
        (AddsAnOffset, []),
        (Noisy, ["answers differently each time"]),
        (Constant, ["it is constant"]),
        (Sigmoids, ["as of sigmoids"]),
    ],
)
def test_what_is_said_of_a_model(model: type[Plain], words: list[str]) -> None:
    x, _ = images()
    y = torch.arange(24) % 10
    lines = evaluate(model(), x, y, brief(0.01)).warnings
    found = [word for word in words if any(word in line for line in lines)]
    assert found == words
    if not words:
        assert not [line for line in lines if "constant" in line or "differently" in line]


class RecordsBatches(Plain):
    largest = 0

    def forward(self, x: Tensor) -> Tensor:
        RecordsBatches.largest = max(RecordsBatches.largest, len(x))
        return super().forward(x)


@pytest.mark.parametrize("batch_size", [4, 20])
def test_the_batch_size_bounds_every_batch(batch_size: int) -> None:
    RecordsBatches.largest = 0
    x, y = images(40)
    found = evaluate(RecordsBatches(), x, y, SHORT["apgd-ce"], batch_size=batch_size)
    assert RecordsBatches.largest == batch_size
    assert found.robust.tolist() == plain_report("apgd-ce", 40).robust.tolist()


def test_a_radius_of_zero_costs_nothing() -> None:
    x, y = images()
    report = evaluate(Plain(), x, (y + (torch.arange(24) == 5)) % 10, "autoattack", 0.0)
    assert report.robust_accuracy == report.clean_accuracy == pytest.approx(23 / 24)
    assert report.queries.max() <= 1 and report.is_autoattack


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x, y: (x + 2e-7, y), "got 8.656713180243969e-05 to 1.0000002"),
        (lambda x, y: (x, y[:, None]), "got shape (24, 1): give y[:, 0]"),
        (lambda x, y: (x, torch.eye(10)[y]), "got shape (24, 10): give y.argmax(1)"),
        (lambda x, y: (DataLoader(TensorDataset(x, y)), y), "x is a DataLoader: give one tensor"),
        (lambda x, y: (x, TensorDataset(x, y)), "y is a TensorDataset: give one tensor"),
        (lambda x, y: (x * 255, y), "to 255.0: give x / 255"),
        (lambda x, y: (x > 0.5, y), "got Tensor of torch.bool"),
        (lambda x, y: (x, y > 5), "got Tensor of torch.bool"),
        (lambda x, y: (x.to(torch.complex64), y), "got Tensor of torch.complex64"),
        (lambda x, y: (x.to("meta"), y), "a tensor on the device 'meta'"),
        (lambda x, y: (None, y), "x must be"),
        (lambda x, y: (["a"] * 24, y), "x must be"),
    ],
)
def test_wrong_inputs_are_one_line(change, line: str) -> None:
    x, y = images()
    x[0, 0, 0, 0] = 1.0
    with pytest.raises(SpecError) as error:
        evaluate(Plain(), *change(x, y), "apgd-ce", EPS)
    assert any(line in problem for problem in error.value.problems), error.value.problems


def test_arrays_of_any_kind_are_taken(tmp_path) -> None:
    x, y = images()
    expected = plain_report("apgd-ce").robust.tolist()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    fixed = y.numpy().copy()
    fixed.flags.writeable = False
    for given, labels in (
        (mapped, fixed),
        (x.double(), y.float()),
        (x.numpy().astype(">f4"), y.to(torch.int8)),
        (x.to_sparse(), y.tolist()),
        (np.asfortranarray(x.numpy()), y),
        (x.clone().requires_grad_(), y),
    ):
        assert evaluate(Plain(), given, labels, SHORT["apgd-ce"]).robust.tolist() == expected


def test_bfloat16_images_are_taken() -> None:
    x, y = images()
    found = evaluate(Plain(), x.bfloat16(), y, SHORT["apgd-ce"])
    expected = evaluate(Plain(), x.bfloat16().float(), y, SHORT["apgd-ce"])
    assert found.robust.tolist() == expected.robust.tolist()


def test_each_batch_is_answered_from_the_state_that_the_model_has() -> None:
    """The buffers of a model are part of it: what an attack asks must not change them."""
    model, (x, y) = RemembersItsImages(), images()
    found = evaluate(model, x, y, brief(EPS))
    expected = evaluate(Plain(), x, y, brief(EPS))
    assert float(model.shift) == 0 and found.warnings == expected.warnings == ()
    assert found.broken_by.tolist() == expected.broken_by.tolist()


@pytest.mark.parametrize("model_type", [HasNoAnswerForOddBatches, OfBatchesOfEight])
def test_a_model_of_certain_batches_is_one_line_and_tiles_help(model_type) -> None:
    x, y = images(23)
    with pytest.raises(
        SpecError, match=r"cannot take .* images at a time: evaluate\(\.\.\., tile=N\)"
    ):
        evaluate(model_type(), x, y, "apgd-ce", EPS)
    found, expected = (
        evaluate(model, x, y, brief(EPS), tile=8) for model in (model_type(), Plain())
    )
    assert found.broken_by.tolist() == expected.broken_by.tolist()


class ReturnsATuple(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits


@pytest.mark.parametrize("tile", [None, 8])
def test_other_outputs_are_one_line(tile) -> None:
    x, y = images()
    with pytest.raises(SpecError, match="it returned tuple: wrap it in a module that returns the"):
        evaluate(ReturnsATuple(), x, y, "apgd-ce", EPS, tile=tile)


def test_labels_of_other_classes_are_said() -> None:
    x, y = images(60)
    assert not evaluate(Plain(), x, y, "square", 0.0).warnings
    lines = evaluate(Plain(), x, (y + 1) % 10, "square", 0.0).warnings
    assert any("is right on none of the 60 examples" in line for line in lines)
