"""`raysweep eval BUNDLE --verify`: verify a bundle and print what it shows."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raysweep.code_files import CodeFile
    from raysweep.robustness_bundle import BundleVerification

# The setting of a verification: the seed of its attack.
_SEED_SETTING = "seed"
_SUBSET_WORDS = {
    "all": "all of the {n_test}",
    "first": "the first of {n_test}",
    "balanced": "a balanced subset of {n_test}",
    "proportional": "a proportional subset of {n_test}",
    None: "selected by whoever made it from {n_test}",
}


@dataclass(frozen=True)
class VerificationRequest:
    """What the user asked `raysweep eval --verify` to do.

    Attributes:
        bundle: The bundle, as the user named it.
        data_dir: Folder of the data set; None for `digits`.
        n_attacked: Number of examples to attack afresh; 0 for none.
        seed: Seed of this attack; None for a random one.
        code: The file of `--code`; or None.
        as_json: Whether to print JSON on stdout.
    """

    bundle: str
    data_dir: Path | None
    n_attacked: int
    seed: int | None
    code: CodeFile | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace, default_attack: str) -> VerificationRequest:
        """Convert parsed arguments.

        Args:
            args: Arguments of `raysweep eval`.
            default_attack: Value of `--attack` if it is not there.

        Raises:
            SpecError: `--attack` is no number, or `--set` has something else than a seed for it.
        """
        from raysweep.code_files import open_code_file
        from raysweep.commands.common import parse_overrides
        from raysweep.spec import SpecError

        n_attacked = 0
        if args.attack != default_attack:
            if not args.attack.isdecimal() or int(args.attack) < 1:
                raise SpecError(
                    f"--verify --attack {args.attack}: give the number of examples that AutoAttack "
                    "attacks afresh, such as 20"
                )
            n_attacked = int(args.attack)
        settings = parse_overrides(args.set, None)
        seed = settings.pop(_SEED_SETTING, None)
        if settings or (seed is not None and not n_attacked):
            raise SpecError("--verify: leave out --set; only --attack N has a setting, its seed")
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise SpecError(f"--set {_SEED_SETTING}={seed}: give a whole number from 0")
        data_dir = args.data_dir.resolve() if args.data_dir else None
        code = None if args.code is None else open_code_file(args.code)
        return cls(args.what, data_dir, n_attacked, seed, code, args.json)


def verify_bundle_claims(request: VerificationRequest) -> None:
    """Verify a bundle and print what it shows.

    Args:
        request: What the user asked for.

    Raises:
        WorkFailed: One of its claims is false, or rows that it claims robust fell to the attack.
        SpecError: It is not a bundle, the data set is not there, or its network is a function of
            another file than that of `--code`.
        DamagedFileError: One of its files is damaged.
    """
    from raysweep.errors import WorkFailed
    from raysweep.robustness_bundle import verify_bundle
    from raysweep.spec import SpecError
    from raysweep.user_folders import expand_home

    folder = expand_home(request.bundle).resolve()
    verification = verify_bundle(
        folder, request.data_dir, n_attacked=request.n_attacked, seed=request.seed
    )
    if request.code is not None and verification.network_code is None:
        raise SpecError(
            f"--code {request.code.path}: has no effect: {request.bundle} needs no code"
        )
    if request.as_json:
        print(json.dumps({"bundle": request.bundle, **verification.summary()}, indent=1))
    else:
        print(f"{request.bundle}: " + "\n  ".join(describe_verification(verification)))
    lines = [f"{request.bundle}: false claim: {line}" for line in verification.problems]
    if verification.attack_finding:
        lines.append(f"{request.bundle}: {verification.attack_finding}")
    if lines:
        raise WorkFailed(lines)


def describe_verification(verification: BundleVerification) -> list[str]:
    """Say what a bundle shows.

    Args:
        verification: The verification.

    Returns:
        Lines; the first has the upper bound of the robust accuracy.
    """
    shown, card = verification, verification.card
    rows = _SUBSET_WORDS[shown.subset].format(n_test=shown.n_test)
    lines = [
        f"robust at most {shown.upper_bound:.2%} of these {shown.n_examples}, {rows} of the data "
        f"{shown.data}; {shown.n_broken} confirmed broken at {card.norm} {card.eps_value:.6g}",
        f"{shown.n_misclassified} of them are misclassified without an attack "
        f"(clean accuracy {shown.clean_accuracy:.2%})",
    ]
    if shown.n_examples < shown.n_test:
        lines.append(f"of all {shown.n_test} robust at most {shown.test_upper_bound:.2%}")
    if shown.fresh_attack is not None and shown.robust_interval is not None:
        result, (low, high) = shown.fresh_attack, shown.robust_interval
        lines.append(
            f"AutoAttack breaks {result.n_broken} of {result.n_attacked} drawn from the "
            f"{result.n_left} others (seed {result.seed}): robust to it are {low:.2%} to "
            f"{high:.2%} of these {shown.n_examples} (95%)"
        )
    else:
        lines.append("not shown: that the others are robust; --attack N attacks N of them afresh")
    unchecked = ", ".join(card.list_unchecked_fields())
    lines.append(f"not shown: how the model was trained or chosen; {unchecked} of the card")
    return [*lines, shown.signature.description, *shown.notes]
