"""Tests that every attack must pass: subclass `AttackContract` and define an `attack` fixture."""

import pytest
import torch
from robust_digits import digits, robust_digits
from torch import Tensor, nn

from raysweep.attacks import Attack, AttackResult
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value


class AttackContract:
    @pytest.fixture(scope="class")
    def model(self) -> nn.Module:
        return robust_digits()

    @pytest.fixture(scope="class")
    def data(self) -> tuple[Tensor, Tensor]:
        return digits(24, first=20)

    @pytest.fixture(scope="class")
    def results(self) -> dict[str, AttackResult]:
        """Results by `repr` of the attack: several tests read the same one."""
        return {}

    @pytest.fixture
    def result(self, attack, model, data, results) -> AttackResult:
        """Result of the attack on the data."""
        if repr(attack) not in results:
            results[repr(attack)] = self.attack_images(attack, model, *data)
        return results[repr(attack)]

    def attack_images(
        self, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor | None = None
    ) -> AttackResult:
        ids = torch.arange(len(x)) if ids is None else ids
        return attack(model, x, y, ExampleRng.for_examples(ids, seed=3))

    def run(
        self, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        return self.attack_images(attack, model, x, y, ids).x_adv

    def test_stays_in_the_ball_and_the_box(self, attack, data, result):
        x, x_adv = data[0], result.x_adv
        one = next(iter(attack.attacks.values())) if hasattr(attack, "attacks") else attack
        move = (x_adv - x).double().flatten(1)
        size = move.abs().amax(1) if one.norm == "Linf" else move.norm(dim=1)
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert size.max() <= resolved_value(one.eps) * (1 + 1e-6)
        assert x_adv.min() >= 0 and x_adv.max() <= 1

    def test_rows_keep_their_order(self, attack, model, data, result):
        x, y = data
        turned = torch.arange(len(x)).flip(0)
        assert torch.equal(
            result.x_adv.flip(0), self.run(attack, model, x[turned], y[turned], turned)
        )

    def test_a_row_does_not_depend_on_its_batch(self, attack, model, data, result):
        x, y = data
        whole = result.x_adv
        halves = [
            self.run(attack, model, x[part], y[part], part)
            for part in torch.arange(len(x)).split(12)
        ]
        # Not bit for bit: the model's kernels may add in another order in a batch of another size.
        assert (model(whole).argmax(1) == y).tolist() == (
            model(torch.cat(halves)).argmax(1) == y
        ).tolist()

    def test_same_seed_same_bytes(self, attack, model, data, result):
        assert torch.equal(result.x_adv, self.run(attack, model, *data))

    def test_global_generator_is_left_alone(self, attack, model, data):
        before = torch.get_rng_state()
        self.run(attack, model, *data)
        assert torch.equal(before, torch.get_rng_state())

    def test_not_worse_than_clean(self, model, data, result):
        x, y = data
        assert (model(result.x_adv).argmax(1) == y).sum() < (model(x).argmax(1) == y).sum()

    def test_inputs_are_left_alone(self, attack, model, data):
        x, y = (tensor.clone() for tensor in data)
        self.run(attack, model, *data)
        assert torch.equal(x, data[0]) and torch.equal(y, data[1])

    def test_model_comes_out_as_it_went_in(self, attack, data):
        model = robust_digits().train()
        model.conv2.eval()
        model.fc1.weight.requires_grad_(False)
        modes = [module.training for module in model.modules()]
        needed = [p.requires_grad for p in model.parameters()]
        self.run(attack, model, *data)
        assert modes == [module.training for module in model.modules()]
        assert needed == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())

    def test_queries_are_counted(self, data, result):
        y, queries = data[1], result.queries
        assert queries.shape == y.shape and queries.dtype == torch.int64 and queries.min() >= 1

    def test_plain_data_round_trip(self, attack):
        assert type(attack).from_data(attack.to_json_dict()) == attack
