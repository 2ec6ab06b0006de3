"""Simulate how often `until: told-apart` ends a sweep, when, and how often it is wrong.

    python benchmarks/told_apart.py                 # 150 sweeps of each spread, half a minute
    python benchmarks/told_apart.py --sweeps 1000

The true accuracies of the settings are normal around 0.6 with a known standard deviation; images
are easy and hard for all models alike. Every trial is trained to the end, and the rule of the
package looks after each of them. `wrong best`: the sweep ended because its best trial was told
apart, and another one is truly better. A landscape is truly flat if the true share is below 0.5.
"""

import statistics

import numpy as np
from command_line import create_parser
from measure import format_table

from raysweep.evaluation.paired_statistics import compare_paired, split_spread
from raysweep.sweep.spread_summary import MIN_CONCLUSIVE_TRIALS, decide_early_end

SPREADS = (0.0, 0.01, 0.02, 0.03, 0.06)
# Variance of a verdict around the mean of its example: 0.6 x 0.4 less that of the easiness.
EASINESS = 0.3
VERDICT_VARIANCE = 0.6 * 0.4 - (2 * EASINESS) ** 2 / 12


def simulate_sweep(
    rng: np.random.Generator, spread: float, n_trials: int, n_examples: int
) -> tuple[str, int, bool]:
    """Run one sweep; return why it ended ("" at its last trial), with how many trials, and whether
    its best trial is truly the best.
    """
    accuracies = 0.6 + rng.normal(0, spread, n_trials)
    easiness = rng.uniform(-EASINESS, EASINESS, n_examples)
    chances = np.clip(accuracies[:, None] + easiness, 0, 1)
    scores = (rng.random(chances.shape) < chances).astype(float)
    for n_ended in range(MIN_CONCLUSIVE_TRIALS, n_trials + 1):
        ended = scores[:n_ended]
        best = int(ended.mean(1).argmax())
        differences = {
            number: compare_paired(ended[best], row, n_comparisons=n_ended - 1)
            for number, row in enumerate(ended)
            if number != best
        }
        reason = decide_early_end(differences, split_spread(ended))
        if reason is not None:
            break
    return reason or "", n_ended, best == int(accuracies[:n_ended].argmax())


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--sweeps", type=int, default=150)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--examples", type=int, default=300)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for spread in SPREADS:
        ends = [simulate_sweep(rng, spread, args.trials, args.examples) for _ in range(args.sweeps)]
        reasons = [reason for reason, _, _ in ends]
        share = spread**2 / (spread**2 + VERDICT_VARIANCE / args.examples)
        wrong = sum(reason == "told-apart" and not is_best for reason, _, is_best in ends)
        rows.append(
            [
                f"{spread:.2f}",
                f"{share:.2f}",
                f"{reasons.count('flat') / args.sweeps:.2f}",
                f"{reasons.count('told-apart') / args.sweeps:.2f}",
                f"{wrong / args.sweeps:.2f}",
                f"{statistics.median(n_ended for _, n_ended, _ in ends):g}",
            ]
        )
    header = ["true sd", "true share", "flat", "told apart", "wrong best", "median trials"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
