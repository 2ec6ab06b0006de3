"""Metrics of single examples, for scatter plots as in the papers: logits, kappa, vulnerability."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.attacks import PGD, freeze_model, true_class_confidence
from raysweep.data import Split, choose_covering_rows
from raysweep.rng import ExampleRng


@dataclass(frozen=True)
class InstanceMetrics:
    """Metrics of N examples, on the CPU.

    Attributes:
        logits: Logits of the natural images, (N, classes).
        y: Labels, (N,).
        kappa: Attack name -> number of steps until the attack succeeds, (N,).
        v: Attack name -> V at the adversarial example, (N,); small where the model is vulnerable.
    """

    logits: Tensor
    y: Tensor
    kappa: dict[str, Tensor]
    v: dict[str, Tensor]

    def find_most_confused_classes(self) -> tuple[int, int]:
        """Find the pair of classes that the model confuses most.

        The rival of an example is the wrong class with the largest logit.

        Returns:
            The two classes, ascending, for which most examples of either class have the other class
            as rival.
        """
        n_classes = self.logits.shape[1]
        rivals = self.logits.scatter(1, self.y[:, None], -torch.inf).argmax(1)
        counts = torch.zeros(n_classes, n_classes)
        counts.index_put_((self.y, rivals), torch.ones(len(self.y)), accumulate=True)
        first, second = divmod(int((counts + counts.T).argmax()), n_classes)
        return min(first, second), max(first, second)


def compute_instance_metrics(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, PGD],
    n_examples: int,
    batch_size: int = 2000,
) -> InstanceMetrics:
    """Measure some examples of a split; the random starts are the same in each call.

    Args:
        model: Maps images in [0, 1], (N, C, H, W), to logits.
        split: The examples.
        attacks: Attack name -> attack that counts kappa.
        n_examples: Number of examples (see `choose_covering_rows`).
        batch_size: Examples that are attacked at once.

    Returns:
        The metrics, on the CPU.
    """
    chosen = torch.arange(len(split), device=split.y.device)[
        choose_covering_rows(split, n_examples)
    ]
    logits: list[Tensor] = []
    kappa: dict[str, list[Tensor]] = {name: [] for name in attacks}
    v: dict[str, list[Tensor]] = {name: [] for name in attacks}
    with freeze_model(model):
        for rows in torch.split(chosen, batch_size):
            x, y = split.get_float_images(rows), split.y[rows]
            with torch.no_grad():
                logits.append(model(x).cpu())
            for name, attack in attacks.items():
                rng = ExampleRng.for_examples(split.index[rows], 0, "instances", name)
                result = attack(model, x, y, rng)
                assert result.kappa is not None
                kappa[name].append(result.kappa.cpu())
                with torch.no_grad():
                    adv_logits = model(result.x_adv)
                v[name].append(
                    true_class_confidence(adv_logits, y, attack.vulnerability_kind).cpu()
                )
    return InstanceMetrics(
        torch.cat(logits),
        split.y[chosen].cpu(),
        {name: torch.cat(parts) for name, parts in kappa.items()},
        {name: torch.cat(parts) for name, parts in v.items()},
    )


def select_first_of_each_class(split: Split, n_per_class: int) -> Split:
    """Select the first examples of each class.

    Args:
        split: The examples.
        n_per_class: Number of examples of a class; all examples of a smaller class.

    Returns:
        The selected examples, in their order.
    """
    labels = sorted(set(split.y.tolist()))
    firsts = [(split.y == label).nonzero()[:n_per_class, 0] for label in labels]
    rows = torch.cat(firsts).sort().values
    return Split(split.x[rows], split.y[rows], split.index[rows], split.pixel_max)
