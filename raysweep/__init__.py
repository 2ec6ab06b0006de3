"""raysweep: distributed sweeps for instance-reweighted adversarial training, proven with AutoAttack."""

__version__ = "0.1.0"
