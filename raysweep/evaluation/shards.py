"""One attack on one shard of examples.

A shard and its result are plain data, so that a shard can run in any process and its result can be
stored in a file.
"""

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysweep.atomic_files import atomic_open
from raysweep.attacks import (
    SingleAttack,
    fp32_precision,
    maybe_tf32,
    restore_mode,
    set_mode,
    true_class_margin,
)
from raysweep.bounded_files import open_npz
from raysweep.evaluation.attack_model import (
    MIN_BATCH_ROWS,
    FixedSizeBatches,
    hold_buffers,
    make_attack_model,
)
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast
from raysweep.evaluation.result_signatures import derive_evaluation_key, sign_arrays
from raysweep.models.device import get_model_device
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value

logger = logging.getLogger(__name__)

AnyArray = npt.NDArray[np.generic]
_SIGNATURE = "signature"
# Type of each array with one value for each row.
_ROW_KINDS = {
    **{"positions": np.int64, "broken": np.bool_, "predicted": np.int64},
    **{"margin": np.float32, "norm": np.float32, "queries": np.int64},
}
# Number of examples on which the attack model is compared with the original when it is built.
_N_PROBE_EXAMPLES = 32


@dataclass(frozen=True)
class Shard:
    """A unit of work: one attack on some examples.

    Attributes:
        attack_name: Name of the attack in the cascade. The attack's random numbers depend on it.
        attack: The attack; None for the predictions on the clean images.
        positions: Row numbers of the examples, (B,) int64.
    """

    attack_name: str
    attack: SingleAttack | None
    positions: npt.NDArray[np.int64]

    @property
    def file_name(self) -> str:
        """Name of the file of the result."""
        return f"{self.file_prefix}{hashlib.sha256(self.positions.tobytes()).hexdigest()[:16]}.npz"

    @property
    def file_prefix(self) -> str:
        """Start of the file name, which all shards of this attack share."""
        return f"{self.attack_name}-{self.attack.digest() if self.attack else 'clean'}-"


@dataclass(frozen=True)
class ShardResult:
    """Result of one shard of B examples. Predictions are of the original model, in float32.

    The final image of a row is the image that the attack returned; in the clean pass the original.

    Attributes:
        positions: Row numbers of the examples, (B,).
        broken: Whether the final image is a verified adversarial example; in the clean pass whether
            the prediction is wrong, (B,).
        predicted: Predicted class of the final image, (B,).
        margin: z_y - max_{i != y} z_i at the final image, (B,).
        norm: Distance of the final image from the original, in the norm of the attack, (B,).
        queries: Number of forward passes, including the verification, (B,).
        x_adv: Adversarial examples of the broken rows only, in their order, (n_broken, C, H, W).
            Empty for the clean pass.
        classes: Number of logits.
    """

    positions: npt.NDArray[np.int64]
    broken: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    queries: npt.NDArray[np.int64]
    x_adv: npt.NDArray[np.float32]
    classes: int

    def save_npz(self, path: Path, key: bytes) -> None:
        """Write the result into a .npz file, atomically and signed.

        Args:
            path: The file to write.
            key: Key of the evaluation (see `derive_evaluation_key`).

        Raises:
            OSError: If the file cannot be written.
        """
        arrays = self._to_arrays()
        signature = sign_arrays(key, path.name, arrays)
        members: dict[str, Any] = {**arrays, _SIGNATURE: np.frombuffer(signature, np.uint8)}
        with atomic_open(path) as stream:
            np.savez(stream, **members)

    @classmethod
    def load_npz(cls, path: Path, key: bytes) -> "StoredShardResult | None":
        """Read a file that `save_npz` wrote.

        Args:
            path: The file.
            key: Key of the evaluation.

        Returns:
            The result and whether the key has signed it; None if the file is missing, damaged or of
            another kind.
        """
        try:
            with open_npz(path) as data:
                arrays: dict[str, Any] = {f.name: data.read_array(f.name) for f in fields(cls)}
                signature = data.read_array(_SIGNATURE) if _SIGNATURE in data.names else None
            _check_arrays(arrays)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("a damaged result is computed again: %s: %s", path, error)
            return None
        is_own = signature is not None and hmac.compare_digest(
            signature.tobytes(), sign_arrays(key, path.name, arrays)
        )
        return StoredShardResult(cls(**(arrays | {"classes": int(arrays["classes"])})), is_own)

    def _to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what a file has besides the signature."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class StoredShardResult:
    """A result that was read from a file.

    Attributes:
        result: The result.
        is_own: Whether this user's key has signed it.
    """

    result: ShardResult
    is_own: bool


class ShardMapper(Protocol):
    """Runs shards for `evaluate(..., map=...)`, in this process or in others.

    A plain function is enough. A mapper that runs several shards at the same time should have an
    attribute `width`: their number, an integer of 1 or more (1 if the attribute is missing).
    `evaluate` divides each attack's rows into a multiple of `width` shards, unless the user sets
    the number of shards.
    """

    def __call__(
        self, run_shard: Callable[[Shard], ShardResult], shards: Sequence[Shard], /
    ) -> Iterable[ShardResult]:
        """Run each shard once.

        Args:
            run_shard: Computes one shard, and stores the result of an attack in `resume_dir`, if
                that is set. Picklable if the model is. Its attribute `model` is the model, which
                may be moved to another device.
            shards: The shards to run, at least one.

        Returns:
            One result for each shard, in any order. `evaluate` reports progress after each result,
            so yield results as they finish. An exception ends the evaluation.
        """
        ...


@dataclass
class ShardRunner:
    """Callable that computes shards of one model and data set. Picklable if the model is.

    Results do not depend on the shards or on the batch size. Each adversarial example of an attack
    is verified in float32 on the original model: wrong class, within eps, and in [0, 1].

    Attributes:
        model: The original model.
        x: Images, (N, C, H, W) float32 in [0, 1] or uint8.
        y: Labels, (N,).
        index: Ids of the examples, (N,). The random numbers of an example depend on its id.
        seed: Seed of the attacks.
        batch_size: Examples per attack call.
        fold: Whether attacks run on a faster copy of the model (see `make_attack_model`).
        tile: Compute on batches of exactly this many rows (see `FixedSizeBatches`).
        tf32: Whether attacks compute in TF32. Rows that are broken in TF32 only are attacked a
            second time in float32.
        result_dir: Folder in which results of attacks are stored; None to store nothing. Its name
            is the digest of the model, the data and the settings.
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
    _original_model: nn.Module | None = field(default=None, repr=False)
    _key: bytes = field(default=b"", repr=False)

    def __call__(self, shard: Shard) -> ShardResult:
        """Run one shard, and store the result of an attack in `result_dir`.

        Args:
            shard: The shard; it must have at least one row.

        Returns:
            The result, with the rows in the order of the shard.
        """
        with disable_tf32_and_autocast(get_model_device(self.model)):
            parts = [
                self._evaluate_batch(shard, shard.positions[start : start + self.batch_size])
                for start in range(0, len(shard.positions), self.batch_size)
            ]
        result = _join_results(parts)
        if self.result_dir is not None and shard.attack is not None:
            result.save_npz(self.result_dir / shard.file_name, self.key)
        return result

    @property
    def _min_rows(self) -> int:
        """Least rows of a batch: fewer than usual only if the user asked for smaller batches."""
        return min(MIN_BATCH_ROWS, self.batch_size)

    def __getstate__(self) -> dict[str, object]:
        """Leave the models that are built out of a pickle; each process builds its own.

        Processes on other machines do not have the user's key, so they get the evaluation's.
        """
        key = self.key if self.result_dir is not None else b""
        return self.__dict__ | {"_attack_model": None, "_original_model": None, "_key": key}

    @property
    def key(self) -> bytes:
        """Key that signs the results of this evaluation, which `result_dir` names."""
        if not self._key:
            assert self.result_dir is not None
            self._key = derive_evaluation_key(self.result_dir.name)
        return self._key

    def load_finished_results(self, shard: Shard) -> list[ShardResult]:
        """Load results of an attack that earlier runs stored.

        Of results that this user's key has not signed, only adversarial examples are used that
        the model misclassifies. They are verified, and stored again with a signature.

        Args:
            shard: The attack and the rows that are needed.

        Returns:
            Results for rows of `shard`, each row at most once; rows without a result are missing.
        """
        if self.result_dir is None or not self.result_dir.is_dir():
            return []
        missing = set(shard.positions.tolist())
        results, foreign = [], []
        for path in sorted(self.result_dir.glob(f"{escape_glob(shard.file_prefix)}*.npz")):
            stored = None if path.is_symlink() else ShardResult.load_npz(path, self.key)
            if stored is None:
                continue
            if not stored.is_own:
                foreign.append(stored.result)
            elif result := _select_missing_rows(stored.result, missing):
                results.append(result)
        n_claimed, n_verified = 0, 0
        for claim in foreign:
            if wanted := _select_missing_rows(claim, set(missing)):
                n_claimed += len(wanted.positions)
                if verified := self._verify_claimed_examples(shard, wanted):
                    missing -= set(verified.positions.tolist())
                    n_verified += len(verified.positions)
                    results.append(verified)
        if n_claimed:
            logger.warning(
                "%s: results of %s for %d examples are not signed with your key (another user or "
                "machine, or raysweep before 0.2 stored them): %d adversarial examples are "
                "verified, the other %d examples are attacked again",
                self.result_dir,
                shard.attack_name,
                n_claimed,
                n_verified,
                n_claimed - n_verified,
            )
        return results

    def _verify_claimed_examples(self, shard: Shard, claim: ShardResult) -> ShardResult | None:
        """Return the result for those claimed adversarial examples that are ones; None for none.

        It is stored with a signature.
        """
        assert shard.attack is not None and self.result_dir is not None
        positions = claim.positions[claim.broken]
        if not len(positions) or claim.x_adv.shape[1:] != self.x.shape[1:]:
            return None
        parts = []
        with disable_tf32_and_autocast(get_model_device(self.model)):
            for start in range(0, len(positions), self.batch_size):
                rows = slice(start, start + self.batch_size)
                x, y = self.get_device_tensors(positions[rows])
                x_adv = torch.from_numpy(claim.x_adv[rows]).to(x.device)
                part = self._verify(shard, positions[rows], x, y, x_adv, torch.zeros_like(y))
                parts.append(_select_result_rows(part, part.broken))
        verified = _join_results(parts)
        if not len(verified.positions):
            return None
        own_shard = Shard(shard.attack_name, shard.attack, verified.positions)
        verified.save_npz(self.result_dir / own_shard.file_name, self.key)
        return verified

    def get_device_tensors(self, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return examples as tensors on the device of the model.

        Args:
            positions: Row numbers, (B,).

        Returns:
            Images, (B, C, H, W) float32 in [0, 1], and labels, (B,) int64.
        """
        device = get_model_device(self.model)
        x = torch.from_numpy(self.x[positions]).to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return x, torch.from_numpy(self.y[positions]).to(device)

    def _evaluate_batch(self, shard: Shard, positions: npt.NDArray[np.int64]) -> ShardResult:
        """Attack and verify one batch of a shard."""
        x, y = self.get_device_tensors(positions)
        x_adv, queries = x, torch.zeros_like(y)
        if shard.attack is not None:
            index = torch.from_numpy(self.index[positions]).to(x.device)
            rng = ExampleRng.for_examples(index, self.seed).derive_stream(shard.attack_name)
            x_adv, queries = self._generate_adversarial(shard.attack, x, y, rng)
        return self._verify(shard, positions, x, y, x_adv, queries)

    def _verify(
        self,
        shard: Shard,
        positions: npt.NDArray[np.int64],
        x: Tensor,
        y: Tensor,
        x_adv: Tensor,
        queries: Tensor,
    ) -> ShardResult:
        """Classify final images with the original model, and check that they are in the ball."""
        logits = self._compute_logits(x_adv)
        norm = shard.attack.norm if shard.attack else "Linf"
        distance = compute_perturbation_norms(x_adv, x, norm)
        predicted = logits.argmax(1)
        # A row with infinite or nan logits counts as misclassified.
        broken = (predicted != y) | ~torch.isfinite(logits).all(1)
        if shard.attack is not None:
            limit = compute_norm_limit(resolved_value(shard.attack.eps), norm)
            broken &= (distance <= limit) & is_in_unit_range(x_adv)
        return ShardResult(
            positions=positions,
            broken=broken.cpu().numpy(),
            predicted=predicted.cpu().numpy(),
            margin=true_class_margin(logits, y).float().cpu().numpy(),
            norm=distance.float().cpu().numpy(),
            queries=(queries + 1).cpu().numpy(),
            x_adv=x_adv[broken].cpu().numpy() if shard.attack else x_adv[:0].cpu().numpy(),
            classes=logits.shape[1],
        )

    def _generate_adversarial(
        self, attack: SingleAttack, x: Tensor, y: Tensor, rng: ExampleRng
    ) -> tuple[Tensor, Tensor]:
        """Return adversarial examples in float32, not yet verified, and the queries per row."""
        model = self._get_attack_model()
        with maybe_tf32(self.tf32):
            result = attack(model, x, y, rng)
        x_adv, queries = result.x_adv.float(), result.queries
        if self.tf32:
            rows = _find_tf32_only_rows(model, x_adv, y)
            if len(rows):
                retry = attack(model, x[rows], y[rows], rng.select_rows(rows))
                x_adv[rows], queries[rows] = retry.x_adv.float(), queries[rows] + retry.queries
        return x_adv, queries

    def _compute_logits(self, x: Tensor) -> Tensor:
        """Return float32 logits of the original model in eval mode; restore its state."""
        flags = [(module, module.training) for module in self.model.modules()]
        set_mode(self.model, False)
        try:
            if self._original_model is None:
                probe, _ = self.get_device_tensors(self._get_probe_rows())
                batches = FixedSizeBatches(self.model, self.tile, self._min_rows).eval()
                self._original_model = hold_buffers(batches, probe)
            with torch.no_grad():
                logits: Tensor = self._original_model(x)
            return logits.float()
        finally:
            restore_mode(self.model, flags)

    def _get_probe_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows on which models are tried."""
        n_probe = min(len(self.y), _N_PROBE_EXAMPLES, max(self.batch_size, self._min_rows))
        return np.arange(n_probe)

    def _get_attack_model(self) -> nn.Module:
        """Return the copy of the model that attacks run on; build it at the first call."""
        if self._attack_model is None:
            probe, _ = self.get_device_tensors(self._get_probe_rows())
            self._attack_model = make_attack_model(
                self.model, probe, self.fold, self.tile, self._min_rows
            )
        return self._attack_model


def escape_glob(text: str) -> str:
    """Escape the special characters of a glob pattern.

    Args:
        text: A name that may hold `*`, `?` or `[`.

    Returns:
        A pattern that matches only `text`.
    """
    return re.sub(r"[*?[]", r"[\g<0>]", text)


def _find_tf32_only_rows(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """Return the numbers of rows that are correct in float32 and wrong in TF32."""
    with torch.no_grad():
        is_correct = model(x_adv).argmax(1) == y
        with fp32_precision("tf32"):
            is_wrong_in_tf32 = model(x_adv).argmax(1) != y
    rows: Tensor = (is_correct & is_wrong_in_tf32).nonzero()[:, 0]
    return rows


def compute_perturbation_norms(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Compute the distance of each adversarial example from its image.

    Args:
        x_adv: Adversarial examples, (N, C, H, W).
        x: Images, (N, C, H, W).
        norm: "Linf" or "L2".

    Returns:
        Distances, (N,) float64.
    """
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


def compute_norm_limit(eps: float, norm: str) -> float:
    """Return the largest distance that counts as within eps.

    It is slightly more than eps, because each coordinate of x ± eps is rounded to float32, with an
    error of up to 2^-25.

    Args:
        eps: Radius of the attack, in pixels of [0, 1].
        norm: "Linf" or "L2".

    Returns:
        The limit, for distances from `compute_perturbation_norms`.
    """
    return eps * (1 + 1e-6) + (2**-25 if norm == "Linf" else 0)


def is_in_unit_range(x_adv: Tensor) -> Tensor:
    """Return whether all pixels of a row lie in [0, 1].

    Args:
        x_adv: Images, (N, C, H, W).

    Returns:
        (N,) bool; False for rows with NaN.
    """
    return ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def _check_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise ValueError unless the arrays of a file have the types and shapes of a result."""
    n_rows = len(arrays["positions"]) if arrays["positions"].ndim == 1 else -1
    for name, kind in _ROW_KINDS.items():
        array = arrays[name]
        if array.shape != (n_rows,) or array.dtype != kind:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    if len(np.unique(arrays["positions"])) != n_rows:
        raise ValueError("positions has a row twice")
    x_adv, classes = arrays["x_adv"], arrays["classes"]
    if x_adv.ndim != 4 or x_adv.dtype != np.float32:
        raise ValueError(f"x_adv is {x_adv.dtype} of shape {x_adv.shape}")
    if len(x_adv) not in (0, int(arrays["broken"].sum())):
        raise ValueError(f"x_adv has {len(x_adv)} images, not one for each broken row")
    if classes.shape != () or classes.dtype.kind not in "iu":
        raise ValueError(f"classes is {classes.dtype} of shape {classes.shape}")


def _join_results(parts: Sequence[ShardResult]) -> ShardResult:
    """Join the results of batches, in their order."""
    joined = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(ShardResult)
        if f.name != "classes"
    }
    return ShardResult(**joined, classes=parts[0].classes)


def _select_missing_rows(result: ShardResult, missing: set[int]) -> ShardResult | None:
    """Return the rows of a result that are missing, and remove them from `missing`; None if none.

    A result without its adversarial examples has no rows.
    """
    if len(result.x_adv) != result.broken.sum():
        return None
    row_mask = np.array([p in missing for p in result.positions.tolist()], dtype=np.bool_)
    if not row_mask.any():
        return None
    result = _select_result_rows(result, row_mask)
    missing -= set(result.positions.tolist())
    return result


def _select_result_rows(result: ShardResult, row_mask: npt.NDArray[np.bool_]) -> ShardResult:
    """Return the rows of a result where `row_mask`, (B,), is True."""
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    for name in ("positions", "broken", "predicted", "margin", "norm", "queries"):
        values[name] = values[name][row_mask]
    values["x_adv"] = result.x_adv[row_mask[result.broken]]
    return ShardResult(**values)
