"""Fresh attacks on examples that a bundle claims to be robust."""

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.attacks import Norm, autoattack
from raysweep.data import Split
from raysweep.evaluation import evaluate, show_evaluation_progress
from raysweep.rng import derive_seed

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class FreshAttackResult:
    """Result of AutoAttack on a random sample of the examples that were left.

    Attributes:
        n_attacked: Number of examples in the sample.
        n_left: Number of examples from which it was drawn.
        n_broken: Number of examples of the sample that AutoAttack broke.
        seed: Seed of the sample and of the attack.
        robust_low: Lower end of the 95% interval of the number of robust examples among `n_left`.
        robust_high: Its upper end.
    """

    n_attacked: int
    n_left: int
    n_broken: int
    seed: int
    robust_low: int
    robust_high: int

    @property
    def min_broken_share(self) -> float:
        """Lower end of the 95% interval of the share that AutoAttack breaks of those left."""
        return 1 - self.robust_high / self.n_left


def attack_sample(
    model: nn.Module,
    test: Split,
    rows: Tensor,
    n_attacked: int,
    seed: int,
    *,
    eps: float,
    norm: Norm,
) -> FreshAttackResult:
    """Attack a random sample of examples with AutoAttack's standard version.

    Args:
        model: The model; it is moved to the GPU if there is one.
        test: All test examples.
        rows: Row numbers of the examples that are left, (M,) int64, M >= 1.
        n_attacked: Number of examples to attack, 1 or more; at most M are attacked.
        seed: Seed of the sample and of the attack. Whoever made the model must not know it.
        eps: Radius of the attack, in pixels of [0, 1].
        norm: Norm of the radius.

    Returns:
        How many were broken, and what that says about all M.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample of a bundle"))
    sample = rows[torch.randperm(len(rows), generator=generator)[:n_attacked]].sort().values
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with show_evaluation_progress() as progress:
        report = evaluate(
            model.to(device),
            test.get_float_images(sample),
            test.y[sample],
            autoattack(eps, norm),
            seed=seed,
            index=test.index[sample],
            progress=progress,
        )
    n_broken = int((~report.robust).sum())
    low, high = compute_robust_interval(n_broken, len(sample), len(rows))
    return FreshAttackResult(len(sample), len(rows), n_broken, seed, low, high)


def compute_robust_interval(n_broken: int, n_attacked: int, n_left: int) -> tuple[int, int]:
    """Compute the exact 95% interval of the number of robust examples.

    It inverts the two tails of the hypergeometric distribution, as Clopper and Pearson (1934) do
    for the binomial one, because the sample is drawn without replacement: an attack on all examples
    gives their number.

    Args:
        n_broken: Number of examples of the sample that were broken, in 0..n_attacked.
        n_attacked: Size of the sample, in 1..n_left.
        n_left: Number of examples from which it was drawn.

    Returns:
        Least and largest number of robust examples among `n_left`.
    """
    from scipy.stats import hypergeom

    # Numbers of examples that the attack would break, as far as the sample allows. One tail falls
    # with the number and the other one grows.
    candidates = range(n_broken, n_left - (n_attacked - n_broken) + 1)
    tail = (1 - _CONFIDENCE) / 2

    def at_most(n_breakable: int) -> float:
        return float(hypergeom.cdf(n_broken, n_left, n_breakable, n_attacked))

    def at_least(n_breakable: int) -> float:
        return float(hypergeom.sf(n_broken - 1, n_left, n_breakable, n_attacked))

    least = candidates[bisect.bisect_right(candidates, tail, key=at_least)]
    most = candidates[bisect.bisect_left(candidates, -tail, key=lambda n: -at_most(n)) - 1]
    return n_left - most, n_left - least
