"""No attack holds more than the graph of its present step."""

from weakref import WeakSet

import pytest
import torch
from robust_digits import digits, robust_digits
from torch import Tensor

from raysweep.attacks import APGD, FAB, PGD, AnyAttack, MinimalPerturbation, Square
from raysweep.data import DatasetSplits
from raysweep.rng import ExampleRng
from raysweep.training.config import build_training_config
from raysweep.training.trainer import build_model_variants, compute_step_gradients

ATTACKS: list[AnyAttack] = [
    PGD(eps=0.2, steps=4),
    PGD(eps=0.2, steps=4, loss="cw", norm="L2"),
    PGD(eps=0.2, steps=4, loss="kl", start="gaussian"),
    PGD(eps=0.2, steps=4, tau=1),
    MinimalPerturbation(d_max=0.3, steps=4),
    APGD(eps=0.2, steps=6),
    APGD(eps=0.2, steps=6, loss="dlr-targeted", targets=2),
    FAB(eps=0.2, steps=3),
    Square(eps=0.2, queries=5),
]


class Held:
    """A tensor that a graph saved for its backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Graphs:
    """How many tensors graphs hold whenever `model` begins a forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.alive: WeakSet[Held] = WeakSet()
        self.counts: list[int] = []
        self.most = 0
        model.register_forward_pre_hook(lambda *_: self.counts.append(len(self.alive)))

    def pack(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        self.alive.add(held)
        self.most = max(self.most, len(self.alive))
        return held

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)


@pytest.mark.parametrize(
    "attack", ATTACKS, ids=lambda a: f"{a.kind}-{getattr(a, 'loss', '')}-{a.digest()[:4]}"
)
def test_an_attack_holds_no_graph_from_step_to_step(attack) -> None:
    model, (x, y) = robust_digits(), digits(6)
    graphs = Graphs(model)
    with graphs.hooks():
        found = attack(model, x, y, ExampleRng.for_examples(torch.arange(6), 0))
    assert len(graphs.counts) > 3
    assert max(graphs.counts) == 0 and not graphs.alive
    assert found.x_adv.grad_fn is None and (attack.kind == "square" or graphs.most > 0)


@pytest.mark.parametrize("method", ["gairat", "lrat"])
def test_a_training_step_holds_the_graphs_of_its_own_forwards_only(
    method, digits: DatasetSplits
) -> None:
    faces = build_model_variants(build_training_config(method), digits, torch.device("cpu"))
    faces.model.train()
    batch = next(iter(digits.iter_train_batches(16, 0, 0)))
    attacked, trained = Graphs(faces.attack_module), Graphs(faces.model)
    with attacked.hooks():
        settings = build_training_config(method, {"*.attacks.*.steps": 3}).resolve_at(9).method
        step = compute_step_gradients(
            settings, faces, batch, ExampleRng.for_examples(batch.index, 0)
        )
    assert max(attacked.counts) == 0 and len(attacked.counts) == 3 * len(settings.attacks)
    assert len(trained.counts) == len(step.logits)
    del step
    assert not attacked.alive, "backward lets the step's own graph go"
