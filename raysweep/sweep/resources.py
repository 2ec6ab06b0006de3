"""What one trial holds, and how many fit a cluster."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raysweep.spec import SpecError

# What the waiting trial itself holds: Ray wants more than nothing.
DRIVER_CPUS = 0.01


@dataclass(frozen=True)
class Resources:
    """What one trial holds, in Ray's logical units; several workers share it equally.

    gpus: None for one for each worker, if the cluster has any.
    """

    cpus: float = 1
    gpus: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        each = self.n_gpus / self.workers
        if each > 1 and each != int(each):
            wants = f"{self.n_gpus:g} GPUs for {self.workers} workers"
            raise SpecError(
                f"--gpus-per-trial: {wants} is {each:g} each: give each a whole number, or one or less"
            )
        if self.cpus <= 0:
            raise SpecError(f"--cpus-per-trial {self.cpus:g}: must be more than 0, for example 0.5")
        if self.workers > 1 and self.worker_resources["CPU"] <= 0:
            raise SpecError(
                f"--cpus-per-trial: {self.cpus:g} CPUs are not enough for {self.workers} workers"
            )

    def resolve(self, cluster: dict[str, float]) -> "Resources":
        """These resources with the GPUs decided."""
        return (
            self
            if self.gpus is not None
            else replace(self, gpus=float(self.workers) if cluster.get("GPU") else 0.0)
        )

    @property
    def n_gpus(self) -> float:
        return self.gpus or 0.0

    @property
    def threads_per_worker(self) -> int:
        """Of each worker's computation."""
        return max(1, int(self.cpus / self.workers))

    @property
    def trial_resources(self) -> dict[str, float]:
        """Held by the trial's own process, which trains if it is the only worker and waits if not."""
        return {"CPU": self.cpus, "GPU": self.n_gpus} if self.workers == 1 else {"CPU": DRIVER_CPUS}

    @property
    def worker_resources(self) -> dict[str, float]:
        """Held by each of several workers: its share, less what lets the trial's own process stand
        beside it.

        Ray counts in ten thousandths; what is rounded up might not fit.
        """
        shares = {"CPU": self.cpus / self.workers - DRIVER_CPUS, "GPU": self.n_gpus / self.workers}
        return {name: math.floor(share * 10_000) / 10_000 for name, share in shares.items()}

    def max_concurrent_trials(
        self, cluster: dict[str, float], nodes: Sequence[dict[str, float]] = ()
    ) -> int:
        """How many trials run at once. Raises SpecError if not even one fits.

        nodes: what each node has; several workers may sit on different ones, each of them on one.
        """
        fits = [cluster.get("CPU", 0) / self.cpus]
        if self.n_gpus:
            fits.append(cluster.get("GPU", 0) / self.n_gpus)
        if not _floor_ratio(min(fits)):
            have = f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
            raise SpecError(
                f"a trial wants {self.cpus:g} CPUs and {self.n_gpus:g} GPUs, the cluster has {have}"
            )
        if self.workers == 1:
            return _floor_ratio(min(fits))
        places = sum(
            min(_floor_ratio(node.get(k, 0) / v) for k, v in self.worker_resources.items() if v)
            for node in nodes
        )
        if places < self.workers:
            each = f"{self.cpus / self.workers:g} CPUs and {self.n_gpus / self.workers:g} GPUs"
            raise SpecError(
                f"a trial wants {self.workers} workers of {each} each, the cluster's nodes hold {places}"
            )
        return min(_floor_ratio(min(fits)), places // self.workers)


def _floor_ratio(ratio: float) -> int:
    """Round a ratio down to a whole number, with room for rounding errors: 33 / 1.1 is
    29.999999999999996 in floats.
    """
    return int(ratio + 1e-9)
