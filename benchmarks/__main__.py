"""Run every benchmark of speed and print one table: what was measured, the ratio, its goal.

    python benchmarks               # smallest sizes, a few minutes: checks that all parts run
    python benchmarks --full        # the sizes of RESULTS.md: an hour on an idle machine
    python benchmarks --full step   # one part of it

Each part is also a script with its own sizes: training_step.py, random_numbers.py,
objective_cost.py, autoattack.py, sweeps.py, scaling.py, footprint.py. Not in the table: the choice
of the objective (objectives.py), accuracies of the methods (methods_on_digits.py), killed sweeps
(kills.py), simulated large sweeps (scale.py), the early end of sweeps (told_apart.py), how often
AutoAttack overturns the objective (overturned_choices.py), the papers' pipelines reduced
(paper_pipelines.py), mutation tests (mutants.py), and wrong inputs (fuzz_inputs.py).
"""

from importlib import import_module

import torch
from command_line import create_parser
from measure import describe_machine, format_table

# The module of each part, imported only if the part is measured.
PARTS = {
    "step": "training_step",
    "random": "random_numbers",
    "objective": "objective_cost",
    "autoattack": "autoattack",
    "sweep": "sweeps",
    "scaling": "scaling",
    "footprint": "footprint",
}


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [
        ratio for name in args.parts or PARTS for ratio in import_module(PARTS[name]).run(args.full)
    ]
    print(
        f"\n{describe_machine()}"
        f"{'' if args.full else '; smallest sizes, which say little of speed'}\n"
    )
    print(
        format_table(
            ["what", "measured", "goal", "n"], [[r.what, r.value, r.goal, r.n] for r in ratios]
        )
    )


if __name__ == "__main__":
    main()
