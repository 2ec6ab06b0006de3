"""Bundles of robustness results that others can verify.

A bundle is a folder with the card (claimed numbers and settings), the checkpoint, the adversarial
example of each broken test example, a manifest of all files, and perhaps its signature.
"""

from raysweep.robustness_bundle.fresh_attack import FreshAttackResult, compute_robust_interval
from raysweep.robustness_bundle.signature import SignatureReport, check_signing_key
from raysweep.robustness_bundle.verification import BundleVerification, verify_bundle
from raysweep.robustness_bundle.writing import write_bundle

__all__ = [
    "BundleVerification",
    "FreshAttackResult",
    "SignatureReport",
    "check_signing_key",
    "compute_robust_interval",
    "verify_bundle",
    "write_bundle",
]
