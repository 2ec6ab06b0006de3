"""Build candidates and evaluation results of a pipeline for tests, with ordinary defaults."""

from typing import Any

from raysweep.pipeline.artifact import Candidate, EvaluationResult

PROTOCOL: dict[str, Any] = {
    "data": "cifar10",
    "model": "resnet18",
    "epochs": 100,
    "train_size": None,
    "batch_size": 128,
    "eps": 8 / 255,
    "norm": "Linf",
    "examples": 10_000,
    "fingerprint": "f00d",
}


def build_candidate(label: str, robust: float | None = None, **more: Any) -> Candidate:
    """Build a candidate. The scores `robust` (robust_worst), `gap`, `clean`, `pgd` and `cw` may be
    passed by name.
    """
    scores = {"robust_worst": robust, "masking_gap": more.pop("gap", None)}
    scores |= {name: more.pop(name) for name in ("clean", "pgd", "cw") if name in more}
    more.setdefault("method", label)
    more.setdefault(
        "checkpoint", "-".join([label, str(more.get("seed", 0)), more.get("which", "best")])
    )
    metrics = {name: score for name, score in scores.items() if score is not None}
    return Candidate(label=label, metrics=metrics, **{"epoch": 90, "epochs": 100, **more})


def build_evaluation_result(candidate: Candidate, robust: float, **more: Any) -> EvaluationResult:
    """Build the result of AutoAttack on the whole test set of CIFAR-10; settings of `protocol` may
    be passed by name.
    """
    protocol = PROTOCOL | {
        name: more.pop(name) for name in ("data", "model", "epochs", "train_size") if name in more
    }
    examples, eps, norm = (
        more.get("examples", 10_000),
        more.get("eps", 8 / 255),
        more.get("norm", "Linf"),
    )
    protocol |= {
        "examples": examples,
        "eps": eps,
        "norm": norm,
        "fingerprint": more.pop("fingerprint", "f00d"),
    }
    rest = {
        "attack": "AA",
        "standard": True,
        "examples": examples,
        "test_examples": 10_000,
        "eps": eps,
        "norm": norm,
        "clean": 0.9,
        "intervals": {"robust": (robust - 0.01, robust + 0.01)},
        "after": {},
        "per_class": {},
        "masking_gap": None,
        "seconds": 1.0,
        "queries": 10,
        "warnings": (),
        "run": "run",
        "folder": "folder",
        "protocol": protocol,
        **more,
    }
    return EvaluationResult(candidate=candidate, robust=robust, **rest)
