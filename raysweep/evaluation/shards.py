"""One attack on one shard of examples: plain data in and out, so that shards may run anywhere, and
are kept on disk.
"""

import hashlib
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysweep.atomic_files import atomic_open
from raysweep.attacks import SingleAttack, fp32_precision, maybe_tf32, true_class_margin
from raysweep.evaluation.attack_model import FixedSizeBatches, make_attack_model
from raysweep.evaluation.device_precision import disable_tf32_and_autocast, get_model_device
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value

AnyArray = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Shard:
    """What to run: an attack (None: the clean pass) by its name in the cascade, on the rows at
    `positions`.
    """

    attack_name: str
    attack: SingleAttack | None
    positions: npt.NDArray[np.int64]

    @property
    def file_name(self) -> str:
        return f"{self.file_prefix}{hashlib.sha256(self.positions.tobytes()).hexdigest()[:16]}.npz"

    @property
    def file_prefix(self) -> str:
        """Begins the file of every shard of this attack, however the rows were packed."""
        return f"{self.attack_name}-{self.attack.digest() if self.attack else 'clean'}-"


@dataclass(frozen=True)
class ShardResult:
    """A row for each position. margin: z_y - max z_i of the original model at the point found;
    norm: of the move.

    x_adv: the verified adversarial examples only, in the order of the broken rows.
    """

    positions: npt.NDArray[np.int64]
    broken: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    queries: npt.NDArray[np.int64]
    x_adv: npt.NDArray[np.float32]
    classes: int

    def save_npz(self, path: Path) -> None:
        """Write the file whole or not at all."""
        with atomic_open(path) as stream:
            np.savez(stream, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load_npz(cls, path: Path) -> "ShardResult | None":
        """None if the file is not one of ours."""
        try:
            with np.load(path, allow_pickle=False) as data:
                values = {f.name: data[f.name] for f in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None
        return cls(**(values | {"classes": int(values["classes"])}))


@dataclass
class ShardRunner:
    """Shard -> Outcome, for one model and data set. Picklable; results do not depend on shard or
    batch size.

    Each claimed adversarial example is verified in float32 on the model as given: wrong class, in
    the ball, in [0, 1]. tf32: attacks compute in TF32, and rows that are broken in it alone are
    attacked again in float32.
    """

    model: nn.Module
    x: AnyArray
    y: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    seed: int = 0
    batch_size: int = 500
    fold: bool = True
    tile: int | None = None
    tf32: bool = False
    result_dir: Path | None = None
    _attack_model: nn.Module | None = field(default=None, repr=False)

    def __call__(self, shard: Shard) -> ShardResult:
        with disable_tf32_and_autocast(get_model_device(self.model)):
            parts = [
                self._evaluate_batch(shard, shard.positions[start : start + self.batch_size])
                for start in range(0, len(shard.positions), self.batch_size)
            ]
        joined = {
            f.name: np.concatenate([getattr(part, f.name) for part in parts])
            for f in fields(ShardResult)
            if f.name != "classes"
        }
        outcome = ShardResult(**joined, classes=parts[0].classes)
        if self.result_dir is not None and shard.attack is not None:
            outcome.save_npz(self.result_dir / shard.file_name)
        return outcome

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_copy": None}

    def load_finished_results(self, shard: Shard) -> list[ShardResult]:
        """What earlier calls left of this attack on some of these rows, each row once."""
        if self.result_dir is None or not self.result_dir.is_dir():
            return []
        wanted = set(shard.positions.tolist())
        found = []
        for path in sorted(self.result_dir.glob(f"{escape_glob(shard.file_prefix)}*.npz")):
            outcome = ShardResult.load_npz(path)
            if (
                outcome is not None
                and (new := [p in wanted for p in outcome.positions.tolist()])
                and any(new)
            ):
                outcome = _select_result_rows(outcome, np.array(new))
                wanted -= set(outcome.positions.tolist())
                found.append(outcome)
        return found

    def get_device_tensors(self, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """x (N, C, H, W) float32 in [0, 1] and y (N,), on the model's device."""
        device = get_model_device(self.model)
        x = torch.from_numpy(self.x[positions]).to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return x, torch.from_numpy(self.y[positions]).to(device)

    def _evaluate_batch(self, shard: Shard, positions: npt.NDArray[np.int64]) -> ShardResult:
        x, y = self.get_device_tensors(positions)
        x_adv, queries = x, torch.zeros_like(y)
        if shard.attack is not None:
            index = torch.from_numpy(self.index[positions]).to(x.device)
            rng = ExampleRng.for_examples(index, self.seed).derive_stream(shard.attack_name)
            x_adv, queries = self._generate_adversarial(shard.attack, x, y, rng)
        logits = _compute_logits(self.model, x_adv, self.tile)
        norm = shard.attack.norm if shard.attack else "Linf"
        size = compute_perturbation_norms(x_adv, x, norm)
        predicted = logits.argmax(1)
        # What is not a number is not the right class.
        broken = (predicted != y) | ~torch.isfinite(logits).all(1)
        if shard.attack is not None:
            broken &= (
                size <= compute_norm_limit(resolved_value(shard.attack.eps), norm)
            ) & is_in_unit_range(x_adv)
        return ShardResult(
            positions=positions,
            broken=broken.cpu().numpy(),
            predicted=predicted.cpu().numpy(),
            margin=true_class_margin(logits, y).float().cpu().numpy(),
            norm=size.float().cpu().numpy(),
            queries=(queries + 1).cpu().numpy(),
            x_adv=x_adv[broken].cpu().numpy() if shard.attack else x_adv[:0].cpu().numpy(),
            classes=logits.shape[1],
        )

    def _generate_adversarial(
        self, attack: SingleAttack, x: Tensor, y: Tensor, rng: ExampleRng
    ) -> tuple[Tensor, Tensor]:
        """x~ in float32 and the queries spent."""
        model = self._get_attack_model()
        with maybe_tf32(self.tf32):
            found = attack(model, x, y, rng)
        x_adv, queries = found.x_adv.float(), found.queries
        if self.tf32:
            with torch.no_grad():
                right = model(x_adv).argmax(1) == y
                with fp32_precision("tf32"):
                    rows = (right & (model(x_adv).argmax(1) != y)).nonzero()[:, 0]
            if len(rows):
                again = attack(model, x[rows], y[rows], rng.select_rows(rows))
                x_adv[rows], queries[rows] = again.x_adv.float(), queries[rows] + again.queries
        return x_adv, queries

    def _get_attack_model(self) -> nn.Module:
        if self._attack_model is None:
            probe, _ = self.get_device_tensors(np.arange(min(len(self.y), 32)))
            self._attack_model = make_attack_model(self.model, probe, self.fold, self.tile)
        return self._attack_model


def escape_glob(text: str) -> str:
    """Names are the user's: no character of theirs is a pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _compute_logits(model: nn.Module, x: Tensor, tile: int | None) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = FixedSizeBatches(model, tile).eval()(x)
        return logits.float()
    finally:
        for module, training in modes:
            module.training = training


def compute_perturbation_norms(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Length of the move of each row, in float64."""
    move = (x_adv.double() - x.double()).flatten(1)
    return move.abs().amax(1) if norm == "Linf" else move.norm(dim=1)


def compute_norm_limit(eps: float, norm: str) -> float:
    """The longest move that counts as one of eps: a coordinate of x ± eps is rounded to float32, by
    up to 2^-25.
    """
    return eps * (1 + 1e-6) + (2**-25 if norm == "Linf" else 0)


def is_in_unit_range(x_adv: Tensor) -> Tensor:
    """Rows (N,) whose every pixel lies in [0, 1]."""
    return ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def _select_result_rows(result: ShardResult, row_mask: npt.NDArray[np.bool_]) -> ShardResult:
    kept = {f.name: getattr(result, f.name) for f in fields(result)}
    for name in ("positions", "broken", "predicted", "margin", "norm", "queries"):
        kept[name] = kept[name][row_mask]
    return ShardResult(**(kept | {"x_adv": result.x_adv[row_mask[result.broken]]}))
