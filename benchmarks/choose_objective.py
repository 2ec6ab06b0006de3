"""Choose the sweep's default objective on one half of a table of outcomes, and report on the other.

    python benchmarks/choose_objective.py                    # tables, and benchmarks/objective.svg

The table is that of `outcomes.py`. A verdict is wrong if an example stands under an objective and
AutoAttack breaks it with any seed; the reverse (broken, and standing under AutoAttack) is counted
apart. Tau is Kendall's, over pairs of models of equal epsilon and norm.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command_line import create_parser
from measure import format_table
from numpy.typing import NDArray

Array = NDArray[np.float64]
FORMER, DEFAULT = "former default", "default"
BEFORE = (
    41  # passes of PGD-20 and CW-20 on a correct example, with two verdicts of 1/3 and rounding
)
N_BOOTSTRAP = 1000
# Cases that were recorded, and looked at, when the default was chosen; all others came later.
CHOSEN_ON = {
    *("at-0-late", "fat-0-late", "gair-fat-0-late", "gair-trades-0-late", "gairat-0-late"),
    *("mart-0-late", "mma-0-late", "oracle", "standard-0-late", "trades-0-late"),
    "wk17a_mipverify",
}


@dataclass(frozen=True)
class CaseOutcome:
    """Everything recorded of a case.

    Attributes:
        facts: name, method, stage, half, eps, norm, n_val, ...
        parts: part -> array name -> array.
    """

    facts: dict[str, object]
    parts: dict[str, dict[str, np.ndarray]]

    @property
    def seeds(self) -> list[np.ndarray]:
        """Rows that stand under AutoAttack, for each seed."""
        names = sorted(part for part in self.parts if part.startswith("autoattack"))
        return [self.parts[name]["square"] for name in names]

    @property
    def stands(self) -> np.ndarray:
        """Rows that stand under AutoAttack with all seeds."""
        return np.logical_and.reduce(self.seeds)

    @property
    def group(self) -> tuple[object, object]:
        """Cases of one group can be compared."""
        return self.facts["eps"], self.facts["norm"]

    def verdict(self, objective: str) -> np.ndarray:
        """Rows that stand under an objective."""
        candidates, default = self.parts["candidates"], self.parts.get("default", {})
        verdicts: dict[str, Callable[[], np.ndarray]] = {
            "clean": lambda: candidates["clean"],
            "PGD-20": lambda: candidates["clean"] & ~candidates["pgd20.broken"],
            "CW-20": lambda: candidates["clean"] & ~candidates["cw20.broken"],
            FORMER: lambda: ~candidates["former.broken"],
            DEFAULT: lambda: default["robust_worst"],
            "AutoAttack, seed 0": lambda: self.seeds[0],
        }
        return verdicts[objective]()


def load_table(path: Path) -> list[CaseOutcome]:
    arrays: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    with np.load(path) as file:
        for key in file.files:
            name, part, array = key.split("/")
            arrays[name][part][array] = file[key]
    return [
        CaseOutcome(json.loads(str(parts["default"].pop("facts"))), dict(parts))
        for parts in arrays.values()
        if {"candidates", "default"} <= set(parts)
    ]


@dataclass(frozen=True)
class Policy:
    """Settings of MultiTargeted."""

    steps: int
    targets: int
    reach: float
    runs: int

    def simulate(self, runs: dict[str, np.ndarray]) -> tuple[np.ndarray, Array]:
        """Return broken rows and passes (M,), of the rows that PGD-20 and CW-20 leave."""
        clean = runs["m0"].astype(float)
        margin = runs[f"u{self.steps}.m"].astype(float)
        taken = runs[f"u{self.steps}.p"].astype(int)
        broken = taken > 0
        cost = np.where(broken, taken, self.steps + 1).astype(float)
        n_targets = sum(f"t{self.steps}.0.{rank}.p" in runs for rank in range(100))
        for run in range(1, self.runs):
            repeat, rank = divmod(run - 1, min(self.targets, n_targets))
            name = f"t{self.steps}.{repeat}.{rank}"
            if f"{name}.p" not in runs:
                break
            live = ~broken & (margin * run <= self.reach * (clean - margin))
            taken = runs[f"{name}.p"].astype(int)
            cost += live * np.where(taken > 0, taken, self.steps + 1)
            broken = broken | (live & (taken > 0))
            margin = np.where(live, np.minimum(margin, runs[f"{name}.m"]), margin)
        return broken, cost


def fit_policies(cases: Sequence[CaseOutcome]) -> list[tuple[Policy, float, float]]:
    """Return each policy with its share of wrong verdicts and its passes per example, PGD-20 and
    CW-20 included.
    """
    grid = itertools.product((5, 10, 20), (3, 5, 9), (0.25, 0.5, 1.0, 2.0, np.inf), (5, 10, 20, 40))
    found = []
    n_examples = sum(len(case.stands) for case in cases)
    for policy in itertools.starmap(Policy, grid):
        wrong = cost = 0.0
        for case in cases:
            runs = case.parts["runs"]
            broken, passes = policy.simulate(runs)
            wrong += (~case.stands[runs["rows"].astype(int)] & ~broken).sum()
            cost += passes.sum() + BEFORE * case.parts["candidates"]["clean"].sum()
        found.append((policy, wrong / n_examples, cost / n_examples))
    return found


def keep_best(found: list[tuple[Policy, float, float]]) -> Iterator[tuple[Policy, float, float]]:
    """Yield the policies that no other one beats in both figures, the cheapest first."""
    least = np.inf
    for policy, wrong, cost in sorted(found, key=lambda row: (row[2], row[1])):
        if wrong < least:
            least = wrong
            yield policy, wrong, cost


def fit_cascade(cases: Sequence[CaseOutcome]) -> list[list[str]]:
    """Build a cascade greedily: the next candidate is the one that breaks most examples which
    AutoAttack breaks, per pass on what is left (as AutoAE does).
    """
    names = sorted(
        key.removesuffix(".passes")
        for key in cases[0].parts["candidates"]
        if key.endswith(".passes")
    )
    rest = [case.parts["candidates"]["clean"].copy() for case in cases]
    n_examples, cost, rows = sum(map(len, rest)), 0.0, []
    while names:
        gains = {}
        for name in names:
            hits = passes = 0.0
            for case, live in zip(cases, rest, strict=True):
                values = case.parts["candidates"]
                hits += (live & ~case.stands & values[f"{name}.broken"]).sum()
                passes += values[f"{name}.passes"][live].astype(float).sum()
            gains[name] = (hits / max(passes, 1), hits, passes)
        best = max(gains, key=lambda name: gains[name])
        if not gains[best][1]:
            break
        names.remove(best)
        cost += gains[best][2]
        for index, case in enumerate(cases):
            rest[index] &= ~case.parts["candidates"][f"{best}.broken"]
        wrong = sum((live & ~case.stands).sum() for case, live in zip(cases, rest, strict=True))
        rows.append([best, f"{cost / n_examples:.1f}", f"{wrong / n_examples:.2%}"])
    return rows


def rank_agreement(
    cases: Sequence[CaseOutcome], values: Sequence[float], truth: Sequence[float]
) -> float:
    """Return Kendall's tau-b over the pairs of cases of one group."""
    concordant = ties_a = ties_b = total = 0
    for i, j in itertools.combinations(range(len(cases)), 2):
        if cases[i].group == cases[j].group:
            a, b = np.sign(values[i] - values[j]), np.sign(truth[i] - truth[j])
            concordant += a * b
            ties_a, ties_b, total = ties_a + (a == 0), ties_b + (b == 0), total + 1
    scale = np.sqrt(float(total - ties_a) * float(total - ties_b))
    return concordant / scale if scale else np.nan


def bootstrap(
    cases: Sequence[CaseOutcome], measure: Callable[[Sequence[int]], float]
) -> tuple[float, float, float]:
    """Return a measure of all cases, and its 95% interval over draws of cases."""
    rng = np.random.default_rng(0)
    draws = [measure(rng.integers(len(cases), size=len(cases))) for _ in range(N_BOOTSTRAP)]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return measure(range(len(cases))), low, high


def report_objectives(cases: Sequence[CaseOutcome]) -> list[list[str]]:
    """Return a line for each objective: wrong verdicts, the reverse, tau, price."""
    truth = [float(case.stands.mean()) for case in cases]
    lines = []
    for name in ("clean", "PGD-20", "CW-20", FORMER, DEFAULT, "AutoAttack, seed 0"):
        verdicts = [case.verdict(name) for case in cases]
        sizes = np.array([len(rows) for rows in verdicts])
        pairs = list(zip(verdicts, cases, strict=True))
        wrong = np.array([(rows & ~case.stands).sum() for rows, case in pairs])
        reverse = np.array([(~rows & case.stands).sum() for rows, case in pairs])
        values = [float(rows.mean()) for rows in verdicts]

        def share(rows: Sequence[int], wrong: Array = wrong, sizes: Array = sizes) -> float:
            return wrong[list(rows)].sum() / sizes[list(rows)].sum()

        def tau(rows: Sequence[int], values: list[float] = values) -> float:
            return rank_agreement(
                [cases[i] for i in rows], [values[i] for i in rows], [truth[i] for i in rows]
            )

        share_text = "{:.2%} ({:.2%} .. {:.2%})".format(*bootstrap(cases, share))
        tau_text = "{:.3f} ({:.3f} .. {:.3f})".format(*bootstrap(cases, tau))
        lines.append(
            [name, share_text, f"{reverse.sum() / sizes.sum():.2%}", tau_text,
             _format_price(cases, name)]
        )  # fmt: skip
    return lines


def _format_price(cases: Sequence[CaseOutcome], name: str) -> str:
    key = {FORMER: ("candidates", "former.cost"), DEFAULT: ("default", "cost")}.get(name)
    if key is None:
        return ""
    n_examples = sum(len(case.stands) for case in cases)
    return f"{sum(float(case.parts[key[0]][key[1]]) for case in cases) / n_examples:.1f}"


def report_methods(cases: Sequence[CaseOutcome]) -> list[list[str]]:
    """Return a line for each method: wrong verdicts of the former default and of the default."""
    lines = []
    for method in sorted({str(case.facts["method"]) for case in cases}):
        own = [case for case in cases if case.facts["method"] == method]
        counts = [
            sum(int((case.verdict(name) & ~case.stands).sum()) for case in own)
            for name in ("PGD-20", FORMER, DEFAULT)
        ]
        n_examples = sum(len(case.stands) for case in own)
        lines.append([method, f"{len(own)} models, {n_examples}", *map(str, counts)])
    return lines


def compare_methods(cases: Sequence[CaseOutcome]) -> str:
    """Say whether the default's wrong verdicts differ between methods by more than chance.

    The statistic is the variance of the methods' shares of wrong verdicts; its distribution by
    chance comes from permuting the methods of the models.
    """
    methods = np.array([str(case.facts["method"]) for case in cases])
    wrong = np.array([(case.verdict(DEFAULT) & ~case.stands).mean() for case in cases])

    def spread(labels: NDArray[np.str_]) -> float:
        return float(np.var([wrong[labels == method].mean() for method in set(methods)]))

    rng, observed = np.random.default_rng(0), spread(methods)
    larger = sum(spread(rng.permutation(methods)) >= observed for _ in range(N_BOOTSTRAP))
    p_value = (larger + 1) / (N_BOOTSTRAP + 1)
    return f"shares of wrong verdicts differ between methods: p = {p_value:.2f} (permutation)"


def report_rungs(cases: Sequence[CaseOutcome]) -> list[list[str]]:
    """Count pairs of models of one group that validation orders unlike AutoAttack on test examples;
    a tie counts half.
    """
    split = [case for case in cases if len(case.stands) > int(case.facts["n_val"])]
    scores: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    truth = []
    for case in split:
        val = slice(0, int(case.facts["n_val"]))
        worst = float(case.verdict(DEFAULT)[val].mean())
        kept = round(float(case.parts["default"]["kept"][val].astype(float).mean()), 4)
        scores["PGD-20"].append((float(case.verdict("PGD-20")[val].mean()),))
        scores[FORMER].append((float(case.verdict(FORMER)[val].mean()),))
        scores[DEFAULT].append((worst,))
        scores["default, ties by robust_margin"].append((worst, kept))
        scores["robust_margin alone"].append((kept,))
        scores["mean of both"].append((worst + kept,))
        scores["AutoAttack on validation (noise ceiling)"].append((float(case.stands[val].mean()),))
        truth.append(float(case.stands[val.stop :].mean()))
    lines = []
    for name, values in scores.items():
        wrong, ties, total = 0.0, 0, 0
        for i, j in itertools.combinations(range(len(split)), 2):
            if split[i].group == split[j].group and truth[i] != truth[j]:
                is_tie = values[i] == values[j]
                wrong += 0.5 if is_tie else (values[i] > values[j]) != (truth[i] > truth[j])
                ties, total = ties + is_tie, total + 1
        lines.append([name, f"{wrong:g} of {total}", str(ties), f"{1 - 2 * wrong / total:.3f}"])
    return lines


def report_price(cases: Sequence[CaseOutcome]) -> list[list[str]]:
    """Return the objective's share of an epoch of PGD-10 training by the count of passes: 11 for
    each training image, for the defaults of digits and CIFAR-10.
    """
    sizes = {"digits": (1047, 300, 1), "cifar10": (49_000, 1000, 2)}
    lines = []
    for name in (FORMER, DEFAULT):
        passes = float(_format_price(cases, name))
        shares = [passes * val / every / (11 * train) for train, val, every in sizes.values()]
        lines.append([name, f"{passes:.1f}", *(f"{share:.1%}" for share in shares)])
    return lines


def draw_curve(found: list[tuple[Policy, float, float]], cases: Sequence[CaseOutcome], path: Path):
    """Draw wrong verdicts over price: all policies on the fitted half, defaults on the other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    cost, wrong = ([row[k] * (1, 100)[k == 1] for row in found] for k in (2, 1))
    axes.scatter(cost, wrong, s=8, color="#9ab", label="settings of MultiTargeted, fitted half")
    best = list(keep_best(found))
    axes.plot([row[2] for row in best], [100 * row[1] for row in best], color="#457", lw=1)
    n_examples = sum(len(case.stands) for case in cases)
    for name, mark in ((FORMER, "s"), (DEFAULT, "o")):
        share = sum((case.verdict(name) & ~case.stands).sum() for case in cases) / n_examples
        price = float(_format_price(cases, name))
        axes.plot(price, 100 * share, mark, label=f"{name}, reported half")
    axes.axhline(0.5, color="gray", lw=0.6, ls=":")
    axes.set(xlabel="passes per example", ylabel="wrong verdicts (%)", xlim=(30, 130))
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("outcomes.npz"))
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("objective.svg"))
    args = parser.parse_args()
    cases = load_table(args.table)
    fit = [case for case in cases if case.facts["half"] == "fit"]
    other = [case for case in cases if case.facts["half"] == "report"]
    n_seeds = sum(len(case.seeds) > 1 for case in other)
    print(f"{len(cases)} cases: {len(fit)} to fit, {len(other)} to report ({n_seeds} with 3 seeds)")
    print("\nGreedy cascade of the candidates, fitted half\n")
    print(format_table(["next attack", "passes per example", "wrong"], fit_cascade(fit)))
    found = fit_policies([case for case in fit if "runs" in case.parts])
    print("\nMultiTargeted after PGD-20 and CW-20, fitted half: the best for each price\n")
    rows = [
        [f"{p.steps} steps, {p.targets} targets, reach {p.reach:g}, {p.runs} runs",
         f"{cost:.1f}", f"{wrong:.2%}"]
        for p, wrong, cost in keep_best(found)
    ]  # fmt: skip
    print(format_table(["settings", "passes per example", "wrong"], rows))
    heads = ["objective", "wrong (95%)", "reverse", "tau (95%)", "passes per example"]
    new = [case for case in cases if case.facts["name"] not in CHOSEN_ON]
    print(f"\n{len(new)} cases were recorded after the default was chosen")
    published = [case for case in new if case.facts["method"] == "published"]
    trained = [case for case in new if case.facts["method"] != "published"]
    parts = {
        "recorded after the choice: networks trained here": trained,
        "recorded after the choice: published networks": published,
        "reported half": other,
        "all cases": cases,
    }
    for title, part in parts.items():
        print(f"\n{title}\n\n{format_table(heads, report_objectives(part))}")
    heads = ["method, recorded after the choice", "examples", "wrong: PGD-20", FORMER, DEFAULT]
    print(f"\n{format_table(heads, report_methods(new))}")
    print(f"\n{compare_methods(new)}")
    heads = ["decision by, on validation", "wrong pairs", "ties", "tau"]
    print(f"\nagainst AutoAttack on test examples\n\n{format_table(heads, report_rungs(cases))}")
    heads = ["objective", "passes per example", "of an epoch, digits", "of an epoch, CIFAR-10"]
    print(f"\n{format_table(heads, report_price(cases))}")
    draw_curve(found, other, args.figure)


if __name__ == "__main__":
    main()
