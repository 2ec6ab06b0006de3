"""Simulate what `repeat` does to the choice of a sweep, beside more trials for the same trainings.

    python benchmarks/repeats.py                 # 400 sweeps of each spread, two minutes
    python benchmarks/repeats.py --sweeps 2000

The true accuracies of the settings are normal around 0.6; each training adds its own normal
deviation, and is measured on the same images, which are easy and hard for all models alike. The
rounds are those of the package. `gain`: true accuracy of the chosen setting above the mean setting.
`too high`: by how much the score by which it was chosen is above that.
"""

from dataclasses import replace

import numpy as np
from command_line import create_parser
from measure import format_table

from raysweep.sweep.repeat_plan import plan_repeats
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.selection import RunRank

EASINESS = 0.3
LR = "optim.lr"


class Simulation:
    """A sweep whose trials are drawn in place of trained."""

    def __init__(
        self, rng: np.random.Generator, n_trials: int, repeat: int, spreads: tuple[float, float]
    ) -> None:
        settings_spread, self.training_spread = spreads
        self.rng = rng
        space = {"method": "at", "trials": n_trials, "space": {LR: {"float": [0.01, 0.5]}}}
        self.space = SearchSpace.from_data({**space, "repeat": repeat})
        self.true = 0.6 + rng.normal(0, settings_spread, n_trials)
        self.easiness = rng.uniform(-EASINESS, EASINESS, 300)

    def train(self, run: Trial) -> Trial:
        """Return a run with a result."""
        level = self.true[run.number] + self.rng.normal(0, self.training_spread)
        mask = self.rng.random(300) < np.clip(level + self.easiness, 0, 1)
        verdicts = ExampleVerdicts.from_mask("robust_worst", 1, mask, np.arange(300))
        best = {"epoch": 1.0, "robust_worst": float(mask.mean())}
        return replace(run, state="finished", best=best, verdicts=verdicts)

    @staticmethod
    def rank(trial: Trial) -> RunRank:
        """Rank a trial as a ledger does if nothing but scores speaks against it."""
        seeds, score = len(trial.trainings), trial.score("robust_worst")
        return RunRank(False, False, False, False, -seeds, -score)

    def run(self) -> tuple[float, float, int]:
        """Return the gain of the choice, by how much its score is too high, and the trainings."""
        trials = [self.train(Trial(number, {LR: 0.1})) for number in range(self.space.n_trials)]
        repeats: list[Trial] = []
        while True:
            plan = plan_repeats(self.space, trials, repeats, self.rank)
            if not plan.waiting:
                break
            repeats += [self.train(run) for run in plan.waiting]
        best = min(plan.trials, key=self.rank)
        gain = float(self.true[best.number]) - 0.6
        too_high = best.score("robust_worst") - float(self.true[best.number])
        return gain, too_high, len(trials) + len(repeats)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--sweeps", type=int, default=400)
    args = parser.parse_args()
    rows = []
    for spreads in ((0.01, 0.01), (0.02, 0.01), (0.02, 0.02), (0.03, 0.02), (0.03, 0.03)):
        for n_trials, repeat in ((16, 0), (16, 2), (16, 3), (22, 0), (16, 4), (30, 0)):
            rng = np.random.default_rng(0)
            ends = [Simulation(rng, n_trials, repeat, spreads).run() for _ in range(args.sweeps)]
            gains, too_high, trainings = np.array(ends).T
            error = gains.std() / args.sweeps**0.5
            rows.append(
                [
                    *(f"{spread:.2f}" for spread in spreads),
                    *(f"{n_trials}", f"{repeat}", f"{trainings.mean():.1f}"),
                    *(f"{gains.mean():.4f} +- {error:.4f}", f"{too_high.mean():.3f}"),
                ]
            )
    header = ["sd of settings", "sd of training", "trials", "repeat", "trainings"]
    print(format_table([*header, "gain", "too high"], rows))


if __name__ == "__main__":
    main()
