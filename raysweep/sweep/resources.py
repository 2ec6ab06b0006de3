"""Resources of a trial, and how many trials fit into a cluster."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raysweep.errors import InfrastructureError
from raysweep.spec import SpecError

DRIVER_CPUS = 0.01
"""CPUs of a trial's own process while its workers train; Ray does not allow 0."""


@dataclass(frozen=True)
class Resources:
    """What one trial holds, in Ray's logical units.

    Attributes:
        cpus: CPUs of the trial, above 0; several workers share them equally.
        gpus: GPUs of the trial, which workers share equally too: each gets a whole number, or at
            most 1. None means one per worker if the cluster has any, see `resolve`.
        workers: Number of processes that train the trial together.

    Raises:
        SpecError: If the values do not fit together.
    """

    cpus: float = 1
    gpus: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        gpus_per_worker = self.n_gpus / self.workers
        if gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
            raise SpecError(
                f"--gpus-per-trial: {self.n_gpus:g} GPUs for {self.workers} workers is "
                f"{gpus_per_worker:g} each: give each a whole number, or one or less"
            )
        if self.cpus <= 0:
            raise SpecError(f"--cpus-per-trial {self.cpus:g}: must be more than 0, for example 0.5")
        if self.workers > 1 and self.worker_resources["CPU"] <= 0:
            raise SpecError(
                f"--cpus-per-trial: {self.cpus:g} CPUs are not enough for {self.workers} workers"
            )

    def resolve(self, cluster: dict[str, float]) -> "Resources":
        """Return these resources with the number of GPUs set.

        Args:
            cluster: Resources of the cluster, by Ray's names.
        """
        if self.gpus is not None:
            return self
        return replace(self, gpus=float(self.workers) if cluster.get("GPU") else 0.0)

    @property
    def n_gpus(self) -> float:
        """GPUs of the trial; 0 while they are not resolved."""
        return self.gpus or 0.0

    @property
    def threads_per_worker(self) -> int:
        """Threads of each worker's computation, at least 1."""
        return max(1, int(self.cpus / self.workers))

    @property
    def trial_resources(self) -> dict[str, float]:
        """What the trial's own process holds, by Ray's names.

        A single worker is that process. Several workers hold `worker_resources` beside it.
        """
        return {"CPU": self.cpus, "GPU": self.n_gpus} if self.workers == 1 else {"CPU": DRIVER_CPUS}

    @property
    def worker_resources(self) -> dict[str, float]:
        """What each of several workers holds, by Ray's names.

        That is its share, minus `DRIVER_CPUS` for the trial's own process. Ray counts in units of
        1 / 10000, so shares are rounded down: all workers together must fit.
        """
        shares = {"CPU": self.cpus / self.workers - DRIVER_CPUS, "GPU": self.n_gpus / self.workers}
        return {name: math.floor(share * 10_000) / 10_000 for name, share in shares.items()}

    def max_concurrent_trials(
        self, cluster: dict[str, float], nodes: Sequence[dict[str, float]] = ()
    ) -> int:
        """Compute how many trials run at the same time.

        Args:
            cluster: Resources of all nodes together, by Ray's names.
            nodes: Resources of each node. Workers of a trial may run on different nodes, but each
                worker must fit on one.

        Returns:
            The number of trials, at least 1.

        Raises:
            InfrastructureError: If not even one trial fits.
        """
        ratios = [cluster.get("CPU", 0) / self.cpus]
        if self.n_gpus:
            ratios.append(cluster.get("GPU", 0) / self.n_gpus)
        n_fitting_trials = _floor_ratio(min(ratios))
        if not n_fitting_trials:
            raise InfrastructureError(
                f"a trial needs {self.cpus:g} CPUs and {self.n_gpus:g} GPUs, the cluster has "
                f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
            )
        if self.workers == 1:
            return n_fitting_trials
        n_fitting_workers = sum(map(self._count_fitting_workers, nodes))
        if n_fitting_workers < self.workers:
            raise InfrastructureError(
                f"a trial needs {self.workers} workers of {self.cpus / self.workers:g} CPUs and "
                f"{self.n_gpus / self.workers:g} GPUs each, the cluster's nodes hold "
                f"{n_fitting_workers}"
            )
        return min(n_fitting_trials, n_fitting_workers // self.workers)

    def _count_fitting_workers(self, node: dict[str, float]) -> int:
        """Return how many workers fit on a node."""
        amounts = self.worker_resources
        return min(_floor_ratio(node.get(kind, 0) / n) for kind, n in amounts.items() if n)


def _floor_ratio(ratio: float) -> int:
    """Round a ratio down to an integer, with tolerance for rounding errors of floats.

    For example 33 / 1.1 is 29.999999999999996.
    """
    return int(ratio + 1e-9)
