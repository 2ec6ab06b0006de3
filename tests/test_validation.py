"""The objective of sweeps on a network whose robustness is known by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny
from ladder_network import LadderNetwork, ladder_images
from torch import Tensor, nn

from raysweep.attacks import APGD, PGD
from raysweep.data import Split, load_data
from raysweep.rng import ExampleRng
from raysweep.training import validation
from raysweep.training.gradient_masking import estimate_scaling_gap
from raysweep.training.input_gradient_norms import input_gradient_norm
from raysweep.training.instance_metrics import compute_instance_metrics
from raysweep.training.trainer import train_model
from raysweep.training.validation import DEFAULT_OBJECTIVE, OBJECTIVE_DESCRIPTIONS, Validation

# Distances to the boundary; rows with a negative one are wrong from the start, and so is label 2 at
# any distance.
DISTANCES = [0.01, -0.02, 0.03, 0.05, 0.07, 0.09, 0.05, 0.07, 0.03, 0.2]
LABELS = [0, 1, 1, 0, 1, 0, 2, 0, 0, 1]
# Rows with a thousandfold slope, where the cross-entropy has no gradient.
STEEP = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0]


def step(reach: float, **settings) -> PGD:
    """PGD that lowers the height by `reach`, along the only direction that there is."""
    return PGD(eps=reach, step_size=reach / 2, steps=2, start="natural", **settings)


def split(count: int | None = None, white: int = 1) -> Split:
    x, y = ladder_images(DISTANCES, LABELS, STEEP)
    return Split(white * x[:count], y[:count], torch.arange(len(y))[:count], white)


JUDGE = Validation(
    attacks={"pgd": step(0.04), "cw": step(0.02, loss="cw")},
    finish={"apgd_t": APGD(eps=0.06, steps=10, loss="dlr-targeted", targets=3)},
    scales=(),
)
# By hand: of 10, two are wrong. PGD breaks rows nearer than 0.04 that are not steep: both at 0.03.
# CW breaks rows nearer than 0.02: the one at 0.01. Both leave two at 0.07, one at 0.05, one at 0.09
# and one at 0.2; `finish` leaves those farther than 0.06, each with the share (d - 0.06) / d of its
# margin: 2 x 1/7, 1/3 and 0.7, divided by 10.
SHARES = {
    "clean": 0.8,
    "zero_gradient": 0.3,
    "pgd": 0.6,
    "cw": 0.7,
    "robust_worst": 0.4,
    "robust_margin": 0.131905,
    "masking_gap": 0.2,
}


def test_every_share_by_hand() -> None:
    found = JUDGE(LadderNetwork(), split())
    assert found.pop("val/ce_cw_gap") == pytest.approx(0.6 - 0.7)
    assert list(found) == list(SHARES) and found == pytest.approx(SHARES)
    assert (
        set(OBJECTIVE_DESCRIPTIONS) <= set(found)
        and DEFAULT_OBJECTIVE == "robust_worst" == Validation().objective
    )


def test_without_finish_the_worst_case_is_over_the_attacks() -> None:
    found = JUDGE.model_copy(update={"finish": {}})(LadderNetwork(), split())
    assert found["robust_worst"] == pytest.approx(0.5) and found["masking_gap"] == pytest.approx(
        0.1
    )
    assert "apgd_t" not in found


def test_only_right_rows_count_as_rows_without_a_gradient() -> None:
    class Rounded(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 1000).round() / 1000)

    found = JUDGE(Rounded(), split())
    assert found["zero_gradient"] == found["clean"] == pytest.approx(0.8)


def test_with_several_finishing_attacks_each_breaks_what_it_can() -> None:
    finish = {"weak": step(0.03), "strong": step(0.08, loss="cw"), "weaker": step(0.01)}
    found = JUDGE.model_copy(update={"finish": finish})(LadderNetwork(), split())
    assert found["robust_worst"] == pytest.approx(0.2) and found["masking_gap"] == pytest.approx(
        0.4
    )


def test_the_gap_is_that_of_the_first_attack() -> None:
    turned = JUDGE.model_copy(update={"attacks": dict(reversed(JUDGE.attacks.items()))})
    assert turned(LadderNetwork(), split())["masking_gap"] == pytest.approx(0.7 - 0.4)


def test_which_rows_each_attack_faces() -> None:
    """`attacks` get all rows that are right, `finish` those that all attacks before left; no attack
    gets wrong rows.
    """
    sizes: list[int] = []
    model = LadderNetwork()
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    finish = {
        "a": step(0.06, loss="cw"),
        "b": step(0.08, loss="cw"),
        "c": step(0.3, loss="cw"),
        "d": step(0.01),
    }
    JUDGE.model_copy(update={"finish": finish})(model, split())
    # The clean pass on all 10; two steps and a verdict for each attack; none for the last, as no
    # row is left.
    assert sizes == [10] + 3 * [8] + 3 * [8] + 3 * [5] + 3 * [4] + 3 * [2]


def test_only_the_first_examples_are_used() -> None:
    """By hand for the first four: 0.01 and steep, one that is wrong, 0.03, and 0.05 and steep."""
    expected = {
        "clean": 0.75,
        "zero_gradient": 0.5,
        "pgd": 0.5,
        "cw": 0.5,
        "robust_worst": 0.0,
        "masking_gap": 0.5,
    }
    for size, rows in ((4, None), (None, 4), (99, 4)):
        found = JUDGE.model_copy(update={"size": size})(LadderNetwork(), split(rows))
        assert {name: found[name] for name in expected} == pytest.approx(expected), (size, rows)


@pytest.mark.parametrize("batch_size", [1, 3, 9, 10])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    judge = JUDGE.model_copy(
        update={"batch_size": batch_size, "scales": (1e-4,), "scaled_share": 1.0}
    )
    assert judge(LadderNetwork(), split()) == pytest.approx(
        SHARES | {"val/ce_cw_gap": -0.1, "val/scaling_gap": 0.1}
    )


def test_pixels_are_divided_by_their_maximum() -> None:
    assert JUDGE(LadderNetwork(), split(white=4)) == JUDGE(LadderNetwork(), split())


def test_the_gap_that_scaled_logits_reveal() -> None:
    """With logits divided by 10,000 steep rows are like others: PGD of 0.04 breaks the one at 0.01,
    not at 0.05.
    """
    judge = JUDGE.model_copy(update={"scales": (1.0, 1e-4), "scaled_share": 1.0})
    assert judge(LadderNetwork(), split())["val/scaling_gap"] == pytest.approx(0.1)
    survived = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 0, 1]) > 0
    for scales, expected in (
        ((1e-4,), 0.1),
        ((1.0,), 0.0),
        ((1e-4, 1.0), 0.1),
        ((1.0, 1e-4, 1.0), 0.1),
        ((), 0.0),
    ):
        assert estimate_scaling_gap(
            LadderNetwork(), split(), step(0.04), survived, scales, batch_size=4
        ) == pytest.approx(expected)
    assert estimate_scaling_gap(
        LadderNetwork(), split(), step(0.06), survived, (1e-4,)
    ) == pytest.approx(0.2)
    assert estimate_scaling_gap(
        LadderNetwork(), split(), step(0.06), survived[:3], (1e-4,)
    ) == pytest.approx(1 / 3), "the share of these three rows"


def test_the_gaps_need_a_cross_entropy_pgd_and_take_the_first() -> None:
    def gaps(**attacks: PGD | APGD) -> dict[str, float]:
        judge = Validation(attacks=attacks, finish={}, scales=(1e-4,), scaled_share=1.0)
        return {
            name: round(value, 6)
            for name, value in judge(LadderNetwork(), split()).items()
            if name.startswith("val/")
        }

    assert gaps(pgd=step(0.02, loss="cw")) == {}
    assert gaps(a=APGD(eps=0.04, steps=3)) == {}
    assert gaps(pgd=step(0.04)) == {"val/scaling_gap": 0.1}
    both = {
        "cw": step(0.06, loss="cw"),
        "wide": step(0.06),
        "narrow": step(0.01),
        "cw2": step(0.01, loss="cw"),
    }
    # The CW attack leaves 4 of 10. The wide PGD also leaves the steep ones at 0.01 and 0.05, which
    # scaling reveals.
    assert gaps(**both) == {"val/ce_cw_gap": 0.2, "val/scaling_gap": 0.2}


def test_starts_are_drawn_by_the_examples_number_and_the_attacks_name() -> None:
    """The result of an attack without steps depends only on its start."""
    attacks = {name: PGD(eps=0.3, step_size=0.0, steps=1) for name in ("pgd", "other")}
    x, y = ladder_images([0.05] * 200, [1] * 200)
    index = torch.arange(200) * 7 + 3

    def by_hand(name: str, index: Tensor) -> float:
        noise = ExampleRng.for_examples(index, 0, "validation", name).uniform((1, 2, 2))
        start = x.double() + 0.3 * (2 * noise.double() - 1)
        sums = start[:, 0, 0, 0] + start[:, 0, 1, 1] - start[:, 0, 0, 1] - start[:, 0, 1, 0]
        return float((sums > 0).double().mean())

    found = Validation(attacks=attacks, finish={}, scales=(), batch_size=64)(
        LadderNetwork(), Split(x, y, index, 1)
    )
    assert found["pgd"] == pytest.approx(by_hand("pgd", index)) != found["other"]
    assert found["other"] == pytest.approx(by_hand("other", index))
    assert by_hand("pgd", index) != by_hand("pgd", torch.arange(200))
    turned = index.flip(0)
    again = Validation(attacks=attacks, finish={}, scales=())(
        LadderNetwork(), Split(x.flip(0), y.flip(0), turned, 1)
    )
    assert again == pytest.approx(found)


def test_with_three_classes_the_margin_stands_in_for_the_targeted_loss() -> None:
    class Three(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :3]

    for loss in ("dlr-targeted", "dlr"):
        judge = JUDGE.model_copy(update={"finish": {"t": APGD(eps=0.06, steps=10, loss=loss)}})
        assert judge(Three(), split())["robust_worst"] == pytest.approx(0.4), loss


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes, flags and gradients of a model in which one part is in eval mode and one weight is
    fixed.
    """
    model.train()
    model.ladder.eval()
    model.fixed.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert before == (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


class Moody(nn.Module):
    """A ladder that is upside down in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ladder, self.fixed, self.norm = (
            LadderNetwork(),
            nn.Parameter(torch.ones(())),
            nn.BatchNorm2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.ladder(x) * (-1 if self.training else 1) * self.fixed


def test_a_model_is_evaluated_in_eval_mode_and_left_as_it_was() -> None:
    model = Moody()
    with left_as_it_was(model):
        found = JUDGE(model, split())
        compute_instance_metrics(model, split(), {"pgd": step(0.04)}, 10)
        flat = input_gradient_norm(model, split(), step(0.02), 10)
    assert found["robust_worst"] == pytest.approx(0.4)
    assert flat == pytest.approx(input_gradient_norm(LadderNetwork(), split(), step(0.02), 10))


def slope(distance: float) -> float:
    """The norm of the gradient of the cross-entropy: (1 - p_y) 20 / 2, because the height's
    gradient has norm 1/2.
    """
    return float(torch.sigmoid(torch.tensor(-20.0 * distance, dtype=torch.float64))) * 10


def test_flatness_where_the_attack_first_succeeds_and_where_it_ends() -> None:
    """20 steps of 0.01 in a ball of 0.055, whatever loss, steps and tau the attack has."""
    x, y = ladder_images([0.025, 0.2, -0.01], [1, 0, 1])
    images = Split(x, y, torch.arange(3), 1)
    # From 0.025 in steps of 0.01 the first wrong point is -0.005; from 0.2 the ball ends first;
    # wrong rows stay.
    friendly = [slope(-0.005), slope(0.145), slope(-0.01)]
    adversarial = [slope(-0.03), slope(0.145), slope(-0.065)]
    for attack in (
        PGD(eps=0.055, step_size=0.01, steps=1, start="natural", loss="cw"),
        PGD(eps=0.055, step_size=0.01, steps=50, start="natural", tau=3),
    ):
        for batch_size in (1, 2, 512):
            found = input_gradient_norm(LadderNetwork(), images, attack, 3, batch_size)
            expected = {
                "flatness_friendly": sum(friendly) / 3,
                "flatness_adversarial": sum(adversarial) / 3,
            }
            assert found == pytest.approx(expected, rel=1e-4)
    found = input_gradient_norm(LadderNetwork(), images, attack, 2)
    assert found["flatness_adversarial"] == pytest.approx(sum(adversarial[:2]) / 2, rel=1e-4), (
        "only the first two examples"
    )


def test_flatness_is_of_attacks_on_the_cross_entropy() -> None:
    """It cannot move a steep row, where an attack on the margin would reach a slope of 100,000."""
    x, y = ladder_images([0.03], [1], [1])
    attack = PGD(eps=0.055, step_size=0.01, steps=1, start="natural", loss="cw")
    found = input_gradient_norm(LadderNetwork(), Split(x, y, torch.arange(1), 1), attack, 1)
    assert found == {"flatness_friendly": 0.0, "flatness_adversarial": 0.0}


def test_flatness_uses_the_first_pgd_and_as_many_examples_as_validation() -> None:
    x, y = ladder_images([0.05, 0.2], [1, 1])
    attacks = {"apgd": APGD(eps=0.01, steps=1), "cw": step(0.02, loss="cw"), "pgd": step(0.1)}
    judge = Validation(attacks=attacks, finish={}, scales=(), flatness=True)
    found = judge(LadderNetwork(), Split(x, y, torch.arange(2), 1))
    assert found["flatness_adversarial"] == pytest.approx((slope(0.03) + slope(0.18)) / 2, rel=1e-4)
    found = judge.model_copy(update={"size": 1})(LadderNetwork(), Split(x, y, torch.arange(2), 1))
    assert found["flatness_adversarial"] == pytest.approx(slope(0.03), rel=1e-4)


def test_training_accuracy_under_pgd_by_hand() -> None:
    """Eight rows are right. Steps of 0.02 up to the radius of 0.04: one breaks none of them, two
    break both at 0.03; the one at 0.01 is steep and has no gradient.
    """
    for steps, right in ((1, 8), (2, 6), (20, 6)):
        judge = JUDGE.replace(train_steps=steps, batch_size=3)
        found = judge.measure_training_accuracy(LadderNetwork(), split())
        assert found == pytest.approx(right / 10), steps


@pytest.mark.parametrize(
    ("setting", "n_train", "expected"),
    [(None, 39_999, 0), (None, 40_000, 1000), (0, 50_000, 0), (300, 1000, 300), (300, 64, 64)],
)
def test_how_many_training_images_are_measured(setting, n_train: int, expected: int) -> None:
    assert Validation(train_examples=setting).count_train_examples(n_train) == expected
    without_pgd = Validation(attacks={"cw": PGD(loss="cw")}, train_examples=setting)
    assert without_pgd.count_train_examples(n_train) == 0


def test_a_run_records_the_accuracy_on_fixed_training_images(tmp_path: Path) -> None:
    """That of its checkpoint on its first images, which augmentation would have moved."""
    config = tiny("at", validation__train_examples=40, validation__train_steps=3, epochs=2)
    last = train_model(config, tmp_path / "run").last_checkpoint
    data = load_data(config.data)
    model = last.load_weights(config.model.build_model(data.channels, data.classes, 0))
    first = Split(data.train.x[:40], data.train.y[:40], data.train.index[:40], data.train.pixel_max)
    pgd = config.validation.attacks["pgd"].replace(steps=3)
    model.eval()
    rng = ExampleRng.for_examples(first.index, 0, "training accuracy")
    x_adv = pgd(model, first.get_float_images(slice(None)), first.y, rng).x_adv
    right = float((model(x_adv).argmax(1) == first.y).float().mean())
    assert last.last_metrics["train/robust"] == pytest.approx(right, abs=1 / 40)
    assert all("train/robust" in metrics for metrics in last.history)
    other = train_model(tiny("at", epochs=1), tmp_path / "other").last_checkpoint
    assert "train/robust" not in other.last_metrics


def test_examples_as_a_model_sees_them_by_hand() -> None:
    """Steps of 0.01 from the image itself: kappa counts the points before each step that are still
    right.
    """
    x, y = ladder_images([0.025, 0.2, -0.01, 0.3], [1, 0, 1, 1])
    settings = {"eps": 0.055, "step_size": 0.01, "start": "natural"}
    attacks = {"pgd": PGD(**settings, steps=10), "cw": PGD(**settings, steps=4, loss="cw")}
    seen = compute_instance_metrics(LadderNetwork(), Split(x, y, torch.arange(4), 1), attacks, 3)
    assert seen.y.tolist() == [1, 0, 1]
    assert seen.logits[:, :2].flatten().tolist() == pytest.approx(
        [-0.25, 0.25, 2, -2, 0.1, -0.1], abs=1e-5
    )
    assert seen.kappa["pgd"].tolist() == [3, 10, 0] and seen.kappa["cw"].tolist() == [3, 4, 0]
    p = torch.sigmoid(20 * torch.tensor([-0.03, 0.145, -0.065])).tolist()
    assert seen.v["pgd"].tolist() == pytest.approx(p, rel=1e-4), "the true class's probability"
    p = torch.sigmoid(20 * torch.tensor([-0.015, 0.16, -0.05])).tolist()
    assert seen.v["cw"].tolist() == pytest.approx([2 * each - 1 for each in p], rel=1e-4), (
        "the true class's probability less the other's"
    )


@pytest.mark.parametrize(("every", "epochs", "judged"), [(2, 3, [2, 3])])
def test_which_epochs_are_validated(
    every: int, epochs: int, judged: list[int], tmp_path: Path
) -> None:
    """Every n-th epoch and the last, on the first `size` validation examples."""
    config = tiny("standard", epochs=epochs, validation__every=every, validation__size=20)
    history = train_model(config, tmp_path).last_checkpoint.history
    assert [int(row["epoch"]) for row in history if "robust_worst" in row] == judged
    assert [int(row["epoch"]) for row in history if "validation_seconds" in row] == judged
    hits = [20 * row["clean"] for row in history if "clean" in row]
    assert hits == pytest.approx([round(hit) for hit in hits], abs=1e-4)


def test_only_dlr_losses_over_fewer_than_four_classes_are_replaced() -> None:
    """DLR divides by a difference to the third largest logit, or to the mean of the third and
    fourth.
    """
    targeted, plain, pgd = APGD(loss="dlr-targeted"), APGD(loss="ce"), PGD(loss="ce")
    assert validation._replace_unsupported_dlr(targeted, 3) == APGD(loss="cw")
    assert validation._replace_unsupported_dlr(targeted, 4) == targeted
    assert (
        validation._replace_unsupported_dlr(plain, 3) == plain
        and validation._replace_unsupported_dlr(pgd, 3) == pgd
    )


def test_an_image_on_the_boundary_keeps_no_margin() -> None:
    """All logits are equal, as of a network whose activations have died: class 0 wins the tie, and
    its margin, 0, is no share of 0.
    """

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :1].expand(-1, 3)

    metrics = JUDGE(Constant().eval(), split())
    assert metrics["clean"] == metrics["robust_worst"] == 0.5, "the labels that are 0"
    assert metrics["robust_margin"] == 0
