"""evaluate: attack after attack over shards of the examples that are still robust."""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysweep.attacks import APGD, FAB, PGD, Norm, SingleAttack, Square, Version, WorstCase, preset
from raysweep.evaluation import checks
from raysweep.evaluation.copies import device_of, full_precision, has_tf32
from raysweep.evaluation.progress import Progress
from raysweep.evaluation.report import Cost, RobustnessReport
from raysweep.evaluation.shards import Array, AttackShards, Outcome, Shard
from raysweep.rng import Rng
from raysweep.schedules import now
from raysweep.spec import SpecError, digest

Map = Callable[[Callable[[Shard], Outcome], Sequence[Shard]], Iterable[Outcome]]
# Examples that the checks before the attacks look at.
LOOKED_AT = 256
# Where the number of shards is left to us: several for each worker, so that a slow one does not hold up the rest, but
# none of fewer rows than make up for what a step costs however many there are.
SHARDS_A_WORKER, LEAST_SHARD = 4, 256


def evaluate(
    model: nn.Module,
    x: Tensor | Array,
    y: Tensor | Array,
    attack: str | SingleAttack | WorstCase = "autoattack",
    eps: float = 8 / 255,
    norm: Norm = "Linf",
    version: Version = "standard",
    *,
    batch_size: int = 500,
    shards: int | None = None,
    seed: int = 0,
    index: Tensor | Array | None = None,
    resume_dir: str | Path | None = None,
    map: Map | None = None,
    progress: Callable[[Progress], None] | None = None,
    fold: bool = True,
    tile: int | None = None,
    keep_adversarial: bool = False,
) -> RobustnessReport:
    """Robust accuracy of `model` (images in [0, 1], (N, C, H, W) -> logits) on x, float in [0, 1] or uint8, and y.

    attack: a preset (`autoattack` in its `version`, `pgd20`, `pgd+`, `cw20`, ...) at eps and norm, names of official
    attacks joined by commas, or an attack with settings of its own. index: lasting ids of the examples, which name
    their random numbers. map: runs shards (a function of Ray's, say), in this process by default; shards: into how many
    each attack's rows are cut, by default as batch size and `map.width` suggest. tile: compute on
    exactly so many rows, for verdicts independent of the batch on devices whose kernels change with the batch size.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module from images to logits, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise SpecError("model is TorchScript, which cannot be copied: give the nn.Module that it was made of")
    for name, number in (("batch_size", batch_size), ("shards", shards)):
        if number is not None and number < 1:
            raise SpecError(f"{name} must be 1 or more, got {number}")
    spec = preset(attack, eps, norm, version) if isinstance(attack, str) else attack
    if not isinstance(spec, PGD | APGD | FAB | Square | WorstCase):
        raise SpecError(
            "attack must be a name of `raysweep list` or a PGD, APGD, FAB, Square or WorstCase, "
            f"got {type(spec).__name__}"
        )
    attacks: dict[str, SingleAttack] = spec.attacks if isinstance(spec, WorstCase) else {spec.kind: spec}
    eps, norm = _threat(attacks)
    tf32, device = isinstance(spec, WorstCase) and spec.tf32, device_of(model)
    if tf32 and not has_tf32(device):
        raise SpecError(f"tf32: there is no TF32 on {device.type}; use version 'standard'")
    arrays = _arrays(x, y, index)
    work = AttackShards(model, *arrays, seed=seed, batch_size=batch_size, fold=fold, tile=tile, tf32=tf32)
    if resume_dir is not None:
        work.folder = Path(resume_dir) / _key(work)
    run = _Run(work, map or _in_this_process, shards, progress)
    nature = run.look(eps, attacks.values())
    checks.fitting(work.y, nature.classes)
    warnings = list(nature.warnings)

    clean = run.clean(random=nature.random)
    warnings += filter(None, [checks.collapsed(clean.predicted, work.y)])
    robust_after: dict[str, npt.NDArray[np.bool_]] = {}
    ran: dict[str, SingleAttack] = {}
    costs: dict[str, Cost] = {}
    for name, planned in attacks.items():
        before = float(run.robust.mean())
        suited, told = checks.suited(planned, nature)
        if told is not None:
            warnings.append(f"{name}: {told}")
        if suited is not None:
            ran[name], costs[name] = suited, run.attack(name, suited)
        robust_after[name] = run.robust.copy()
        if isinstance(planned, Square) and not all(isinstance(a, Square) for a in ran.values()):
            warnings += filter(None, [checks.square_beats_gradients(before, float(run.robust.mean()))])

    return RobustnessReport(
        attack=(spec if ran == attacks else WorstCase.model_construct(attacks=ran, tf32=tf32)).json_dict(),
        eps=eps,
        norm=norm,
        seed=seed,
        index=work.index,
        labels=work.y,
        predicted=clean.predicted,
        robust_after=robust_after,
        broken_by=run.broken_by,
        margin_before=clean.margin,
        margin_after=run.margin,
        perturbation=run.size,
        queries=run.queries,
        cost=costs,
        warnings=tuple(warnings),
        masking_gap=_masking_gap(ran, robust_after),
        x_adv=run.adversarial() if keep_adversarial else None,
    )


class _Run:
    """The state of one evaluation: what is known of every example so far."""

    def __init__(
        self, work: AttackShards, map: Map, shards: int | None, progress: Callable[[Progress], None] | None
    ) -> None:
        count = len(work.y)
        self.work, self.map, self.shards, self.progress = work, map, shards, progress
        self.broken_by = np.full(count, "", dtype=f"<U{64}")
        self.size = np.zeros(count, np.float32)
        self.margin = np.zeros(count, np.float32)
        self.queries = np.zeros(count, np.int64)
        self.found: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def robust(self) -> npt.NDArray[np.bool_]:
        robust: npt.NDArray[np.bool_] = self.broken_by == ""
        return robust

    def look(self, eps: float, attacks: Collection[SingleAttack]) -> checks.Nature:
        rows = np.arange(min(len(self.work.y), LOOKED_AT))
        x, y = self.work.tensors(rows)
        rng = Rng.for_examples(torch.from_numpy(self.work.index[rows]).to(x.device), self.work.seed, "checks")
        with full_precision(x.device):
            return checks.examine(self.work.model, x, y, rng, eps, attacks)

    def clean(self, random: bool) -> Outcome:
        """The clean pass; rows that are wrong already are done. Refuses to resume what another model left."""
        clean = _join(list(self._outcomes("clean", None, np.arange(len(self.work.y)))))
        self._take("clean", clean)
        if self.work.folder is not None:
            kept = Outcome.load(self.work.folder / "clean.npz")
            if kept is None:
                clean.save(self.work.folder / "clean.npz")
            elif not random and not _agree(kept.margin, clean.margin):
                raise SpecError(
                    f"{self.work.folder} holds the results of a model with the same weights that answers differently; "
                    "choose another folder"
                )
        return clean

    def attack(self, name: str, attack: SingleAttack) -> Cost:
        """Run one attack on what is still robust, taking over what an earlier run has finished."""
        began, live = time.monotonic(), np.flatnonzero(self.robust)
        queries = 0
        for outcome in self._outcomes(name, attack, live):
            self._take(name, outcome)
            queries += int(outcome.queries.sum())
        return Cost(len(live), queries, time.monotonic() - began)

    def adversarial(self) -> npt.NDArray[np.float32]:
        """x, and in its place the adversarial example where there is one."""
        x: npt.NDArray[np.float32] = self.work.x.astype(np.float32)
        x = x / np.float32(255) if self.work.x.dtype == np.uint8 else x
        for position, x_adv in self.found.items():
            x[position] = x_adv
        return x

    def _outcomes(self, name: str, attack: SingleAttack | None, positions: npt.NDArray[np.int64]) -> Iterable[Outcome]:
        done = 0
        if attack is not None:
            for outcome in self.work.finished(Shard(name, attack, positions)):
                done += len(outcome.positions)
                yield outcome
                positions = np.setdiff1d(positions, outcome.positions)
        total = done + len(positions)
        if not len(positions):
            return
        items = [Shard(name, attack, part) for part in np.array_split(positions, self._parts(len(positions)))]
        for outcome in self.map(self.work, items):
            yield outcome
            done += len(outcome.positions)
            if self.progress is not None:
                self.progress(Progress(name, done, total, int(self.robust.sum()), len(self.robust)))

    def _parts(self, rows: int) -> int:
        """As many shards as were asked for; else none above a batch, and each worker of `map` (its `width`) as many."""
        if self.shards is not None:
            return min(self.shards, rows)
        width = getattr(self.map, "width", 1)
        turns = min(SHARDS_A_WORKER, rows // (LEAST_SHARD * width)) if width > 1 else 1
        return min(rows, width * max(1, turns, math.ceil(rows / (self.work.batch_size * width))))

    def _take(self, name: str, outcome: Outcome) -> None:
        at = outcome.positions
        self.queries[at] += outcome.queries
        worse = outcome.broken | (outcome.margin < self.margin[at]) | (name == "clean")
        self.margin[at[worse]], self.size[at[worse]] = outcome.margin[worse], outcome.norm[worse]
        self.broken_by[at[outcome.broken]] = name
        if len(outcome.x_adv):
            self.found |= dict(zip(at[outcome.broken].tolist(), outcome.x_adv, strict=True))


def _in_this_process(run: Callable[[Shard], Outcome], shards: Sequence[Shard]) -> Iterable[Outcome]:
    return (run(shard) for shard in shards)


def _arrays(
    x: Tensor | Array, y: Tensor | Array, index: Tensor | Array | None
) -> tuple[Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images, labels and ids as plain arrays. Raises SpecError for what cannot be images in [0, 1]."""
    images, labels = (np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a) for a in (x, y))
    ids = np.arange(len(labels)) if index is None else np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    problems = []
    if images.ndim != 4:
        problems.append(f"x must be (N, C, H, W), got shape {images.shape}")
    if labels.shape != images.shape[:1] or ids.shape != labels.shape:
        problems.append(f"x, y and index must have the same length, got {len(images)}, {labels.shape}, {ids.shape}")
    if not (np.issubdtype(labels.dtype, np.number) and np.array_equal(labels, labels.astype(np.int64))):
        problems.append("y must be whole numbers, one class for each example")
    if not len(images):
        problems.append("there are no examples to evaluate on")
    elif images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        problems.append(f"x must lie in [0, 1] (or be uint8), got {images.min():g} to {images.max():g}")
    if problems:
        raise SpecError(problems)
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    return np.ascontiguousarray(images), labels.astype(np.int64), ids.astype(np.int64)


def _agree(kept: npt.NDArray[np.float32], now: npt.NDArray[np.float32]) -> bool:
    """Whether these are margins of one model on the same rows, but for rounding; some may be no numbers."""
    close = 1e-3 * float(np.ptp(now[np.isfinite(now)]))
    return np.allclose(kept, now, rtol=1e-3, atol=close, equal_nan=True)


def _threat(attacks: dict[str, SingleAttack]) -> tuple[float, Norm]:
    """The one threat model of all attacks."""
    threats = {(now(attack.eps), attack.norm) for attack in attacks.values()}
    if len(threats) > 1:
        raise SpecError(f"the attacks of one evaluation must share eps and norm, got {sorted(threats)}")
    return threats.pop()


def _key(work: AttackShards) -> str:
    """Names everything that outcomes depend on, but the attack."""
    weights, data = hashlib.sha256(repr(work.model).encode()), hashlib.sha256()
    for name, value in work.model.state_dict().items():
        if isinstance(value, Tensor):
            weights.update(name.encode() + str(value.dtype).encode() + str(tuple(value.shape)).encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            # A module's extra state may be anything.
            weights.update(name.encode() + repr(value).encode())
    for array in (work.x, work.y, work.index):
        data.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    settings = [work.seed, work.fold, work.tile, work.tf32, device_of(work.model).type]
    return digest([weights.hexdigest(), data.hexdigest(), settings])


def _join(outcomes: list[Outcome]) -> Outcome:
    """Outcomes of a whole pass as one, in the order of the rows."""
    order = np.argsort(np.concatenate([o.positions for o in outcomes]))
    rows = {
        name: np.concatenate([getattr(o, name) for o in outcomes])[order]
        for name in ("positions", "broken", "predicted", "margin", "norm", "queries")
    }
    return Outcome(**rows, x_adv=outcomes[0].x_adv, classes=outcomes[0].classes)


def _masking_gap(attacks: dict[str, SingleAttack], robust_after: dict[str, npt.NDArray[np.bool_]]) -> float | None:
    """Accuracy under (A)PGD on the cross-entropy, if that comes first of several, minus the worst case."""
    first = next(iter(robust_after))
    attack = attacks.get(first)
    if len(robust_after) == 1 or not (isinstance(attack, PGD | APGD) and attack.loss == "ce"):
        return None
    return float(robust_after[first].mean() - list(robust_after.values())[-1].mean())
