"""Verification of a bundle: what its files show, and which of its claims are false.

A bundle can show that examples are broken, and so an upper bound of the robust accuracy on the
examples that it has. It cannot show that the other examples are robust.
"""

import math
import secrets
from dataclasses import dataclass
from pathlib import Path

from raysweep.checkpoint_evaluation import resolve_threat_model
from raysweep.data import SUBSET_CHOICES
from raysweep.robustness_bundle.card import BundleCard, find_text_problems
from raysweep.robustness_bundle.evidence import Evidence, find_subset
from raysweep.robustness_bundle.files import MANIFEST_FILE, quote_text, shorten_list
from raysweep.robustness_bundle.fresh_attack import FreshAttackResult, attack_sample
from raysweep.robustness_bundle.loading import LoadedBundle, load_bundle
from raysweep.robustness_bundle.manifest import find_manifest_problems
from raysweep.robustness_bundle.signature import SignatureReport, check_signature
from raysweep.spec import JsonDict
from raysweep.training.model_loading import EvaluationTarget

# Below this radius the rounding of float32 decides what is within it.
_MIN_EPS = 1e-5
# Other random numbers of an attack break a few more examples.
_MAX_BROKEN_SHARE = 0.01


@dataclass(frozen=True)
class BundleVerification:
    """What a bundle shows.

    Attributes:
        card: Its claims; `problems` says which are false.
        problems: One line for each false claim.
        n_examples: Number of examples of the bundle.
        n_test: Number of test examples of the verifier's data.
        subset: How the examples were chosen: "all", "first", "balanced" or "proportional"; None
            if they were selected in another way.
        data: The verifier's data set, in words.
        n_misclassified: Number of examples that are misclassified without an attack.
        n_broken: Number of examples that are misclassified, without an attack or at their stored
            adversarial example, which is within the radius and in [0, 1].
        signature: What its signature shows.
        network_code: SHA-256 of the file with its network; None for a network of raysweep.
        notes: Other facts, one line each.
        fresh_attack: Result of the fresh attack, if there was one.
        attack_finding: One line if the fresh attack broke more of the rows that are claimed robust
            than other random numbers can explain; else "". It is no proof of a false claim: the
            author may have used a weaker attack in good faith.
    """

    card: BundleCard
    problems: list[str]
    n_examples: int
    n_test: int
    subset: str | None
    data: str
    n_misclassified: int
    n_broken: int
    signature: SignatureReport
    network_code: str | None
    notes: list[str]
    fresh_attack: FreshAttackResult | None = None
    attack_finding: str = ""

    @property
    def upper_bound(self) -> float:
        """Largest possible robust accuracy on the examples of the bundle, in [0, 1]."""
        return (self.n_examples - self._n_found) / self.n_examples

    @property
    def test_upper_bound(self) -> float:
        """Largest possible robust accuracy on all test examples, in [0, 1]."""
        return (self.n_test - self._n_found) / self.n_test

    @property
    def clean_accuracy(self) -> float:
        """Fraction of the examples that are classified correctly without an attack."""
        return (self.n_examples - self.n_misclassified) / self.n_examples

    @property
    def robust_interval(self) -> tuple[float, float] | None:
        """95% interval of the accuracy under AutoAttack on these examples; None if not attacked."""
        if self.fresh_attack is None:
            return None
        result = self.fresh_attack
        return result.robust_low / self.n_examples, result.robust_high / self.n_examples

    @property
    def _n_found(self) -> int:
        """Number of examples that are broken, by the bundle or by the fresh attack."""
        return self.n_broken + (self.fresh_attack.n_broken if self.fresh_attack else 0)

    def summary(self) -> JsonDict:
        """Return plain data for JSON."""
        return {
            "problems": self.problems,
            "robust_accuracy_at_most": self.upper_bound,
            "norm": self.card.norm,
            "eps": self.card.eps_value,
            "examples": self.n_examples,
            "subset": self.subset,
            "test_examples": self.n_test,
            "data": self.data,
            "confirmed_broken": self.n_broken,
            "misclassified": self.n_misclassified,
            "clean_accuracy": self.clean_accuracy,
            "test_robust_accuracy_at_most": self.test_upper_bound,
            "fresh_attack": vars(self.fresh_attack) if self.fresh_attack else None,
            "attack_finding": self.attack_finding,
            "robust_interval": self.robust_interval,
            "signature": vars(self.signature),
            "notes": self.notes,
            "unchecked": self.card.list_unchecked_fields(),
            "card": self.card.model_dump(mode="json"),
        }


def verify_bundle(
    folder: Path, data_dir: Path | None = None, *, n_attacked: int = 0, seed: int | None = None
) -> BundleVerification:
    """Derive what a bundle claims from its own files and the verifier's test set.

    Each stored example is compared with its test image and classified by the model. Nothing is
    unpickled.

    Args:
        folder: The bundle.
        data_dir: Folder of the data set's files on this machine; None for `digits`.
        n_attacked: Number of the examples that are left to attack afresh; 0 for none.
        seed: Seed of the sample and of the fresh attack; None for a random one, which whoever made
            the bundle could not know.

    Returns:
        What the bundle shows, with a line for each false claim.

    Raises:
        SpecError: If `folder` is not a bundle, the data set is not there, or its network is a
            function of a file that was not given (see `code_files`).
        DamagedFileError: If a file of the bundle is damaged or missing.
    """
    bundle = load_bundle(folder, data_dir)
    evidence = Evidence.collect(bundle)
    subset, signature = find_subset(bundle), check_signature(folder, bundle.file_names)
    problems = [
        *_find_manifest_problems(bundle, signature),
        *_find_eps_problems(bundle),
        *evidence.find_problems(),
        *find_text_problems(bundle.card, bundle.checkpoint, subset),
        *_find_selection_problems(bundle, subset),
    ]
    fresh_attack, attack_finding = None, ""
    if n_attacked and not bool(evidence.is_broken.all()):
        fresh_attack = attack_sample(
            bundle.model,
            bundle.test,
            bundle.rows[~evidence.is_broken],
            n_attacked,
            secrets.randbits(32) if seed is None else seed,
            eps=bundle.card.eps_value,
            norm=bundle.card.norm,
        )
        attack_finding = _describe_broken_rows(fresh_attack, bundle.card)
    return BundleVerification(
        card=bundle.card,
        problems=shorten_list(problems),
        n_examples=len(bundle.rows),
        n_test=len(bundle.test),
        subset=subset,
        data=bundle.data,
        n_misclassified=int((~evidence.clean.is_correct).sum()),
        n_broken=int(evidence.is_broken.sum()),
        signature=signature,
        network_code=bundle.checkpoint.config.model.code,
        notes=_collect_notes(bundle),
        fresh_attack=fresh_attack,
        attack_finding=attack_finding,
    )


def _find_manifest_problems(bundle: LoadedBundle, signature: SignatureReport) -> list[str]:
    """Return what is wrong with the manifest and its signature."""
    problems = [signature.problem] if signature.problem else []
    if bundle.manifest is None:
        return problems
    name = bundle.card.dataset_name
    fingerprint = bundle.checkpoint.meta["data_fingerprint"]
    return problems + find_manifest_problems(
        bundle.manifest, bundle.folder, bundle.file_names, name, fingerprint, bundle.test
    )


def _find_eps_problems(bundle: LoadedBundle) -> list[str]:
    """Return a line if the radius is so small or large that it means nothing."""
    norm, eps = bundle.card.norm, bundle.card.eps_value
    largest = 1.0 if norm == "Linf" else math.sqrt(bundle.test.x[0].numel())
    if _MIN_EPS <= eps <= largest:
        return []
    return [f"eps {eps:.6g} means nothing in {norm}: allowed are {_MIN_EPS:g} to {largest:.6g}"]


def _find_selection_problems(bundle: LoadedBundle, subset: str | None) -> list[str]:
    """Return a line if the examples were selected in a way that raysweep has not."""
    if subset is not None:
        return []
    choices = ", ".join(SUBSET_CHOICES)
    return [
        f"its {len(bundle.rows)} examples are a selection, none of the subsets {choices}; "
        "a selection can have any accuracy"
    ]


def _describe_broken_rows(result: FreshAttackResult, card: BundleCard) -> str:
    """Describe a fresh attack that breaks more rows than other random numbers can explain.

    Returns "" if it breaks no more.
    """
    if result.min_broken_share <= _MAX_BROKEN_SHARE:
        return ""
    attack = "a fresh AutoAttack" if card.claims_autoattack else "a stronger attack, AutoAttack"
    claimed_attacks = ", ".join(shorten_list(list(map(quote_text, card.attacks)))) or "no attack"
    return (
        f"{result.n_broken} of {result.n_attacked} of the claimed robust rows fell to {attack} "
        f"(seed {result.seed}); the card says {card.robust_accuracy:.2%} under {claimed_attacks}"
    )


def _collect_notes(bundle: LoadedBundle) -> list[str]:
    """Return facts that are no false claims, one line each."""
    card, notes = bundle.card, []
    if bundle.manifest is None:
        notes.append(f"no {MANIFEST_FILE} (raysweep 0.1): nothing names the code and the test data")
    else:
        versions = bundle.manifest.versions
        version, torch, device = (
            quote_text(str(versions.get(name))) for name in ("raysweep", "torch", "device")
        )
        revision = quote_text(str(bundle.manifest.code_revision))
        notes.append(
            f"evaluated by raysweep {version}, revision {revision}, torch {torch}, on {device}, "
            "by its own words"
        )
    target = EvaluationTarget(bundle.model, "", bundle.checkpoint)
    trained_eps, trained_norm = resolve_threat_model(target, card.dataset_name)
    if (trained_eps, trained_norm) != (card.eps_value, card.norm):
        notes.append(f"the model was trained for {trained_norm} {trained_eps:.6g}")
    return notes
