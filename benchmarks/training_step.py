"""Time one training step of GAIRAT and LRAT, adding one optimization after another, against a plain
step in the style of public code.

    python benchmarks/training_step.py --method gairat lrat --batch 32 --rounds 3 --threads 1
    python benchmarks/training_step.py --digits

The plain steps follow the papers' algorithms in the common style: the attack calls backward(),
which also computes the gradients of all parameters; kappa and weights are computed example by
example; tensors are contiguous. GAIRAT's published code takes kappa from the forward pass that it
differentiates, other public code does another forward pass: both are measured. All variants share
weights, batch and random start, so kappa, loss and gradient must agree. The benchmark uses a GPU
if there is one, then also with compilation and CUDA graphs, and with TF32 in float32 as in
training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import create_parser
from measure import (
    DEVICE,
    Flops,
    Ratio,
    describe_machine,
    format_table,
    measure_matrix_rate,
    medians,
    time_rounds,
)
from torch import Tensor, nn

from raysweep.attacks import PGD
from raysweep.data import Batch
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value
from raysweep.training.config import build_training_config
from raysweep.training.model_variants import ModelVariants
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.trainer import compute_step_gradients

PLAIN = {"channels_last": False, "fold": False, "tf32": False}
# Each adds to the one before.
PATHS: dict[str, dict[str, Any]] = {
    "ours, all off": {},
    "+ channels last": {"channels_last": True},
    "+ folded batch norms (default)": {"fold": True, "tf32": "auto"},
    "+ bf16 attack": {"attack": "bf16"},
    "+ bf16 training": {"train": "bf16"},
    "+ compile": {"compile": True},
}
FLOAT32, BF16, COMPILED = "+ folded batch norms (default)", "+ bf16 training", "+ compile"


@dataclass(frozen=True)
class StepOutcome:
    """Result of a step: the loss, all gradients in one vector, and kappa of the PGD attack."""

    loss: float
    grad: Tensor
    kappa: Tensor


@dataclass(frozen=True)
class Subject:
    """Method, model, batch and random numbers that all variants start from."""

    method: Method
    model: nn.Module
    batch: Batch
    rng: ExampleRng

    def copy(self) -> nn.Module:
        model = ModelSpec(name=self.name).build_model(self.batch.x.shape[1], 10, 0).to(DEVICE)
        model.load_state_dict(self.model.state_dict())
        return model.train()

    @property
    def name(self) -> str:
        return "digits_cnn" if self.batch.x.shape[1] == 1 else "resnet18"

    def start(self, attack: str) -> Tensor:
        spec = self.method.attacks[attack]
        assert isinstance(spec, PGD)
        return spec._sample_start(self.batch.x, self.rng.derive_stream("attack", attack))


def plain_attack(
    model: nn.Module, spec: PGD, start: Tensor, x: Tensor, y: Tensor, own_forward: bool
) -> tuple[Tensor, Tensor]:
    """Run PGD or CW (G alg. 1, L alg. 2-3); return x~, and kappa from a loop over examples."""
    model.eval()
    x_adv, kappa = start.detach(), torch.zeros(len(x), device=DEVICE)
    for _ in range(spec.steps):
        if own_forward:
            with torch.no_grad():
                predicted = model(x_adv).argmax(1)
        x_adv.requires_grad_()
        logits = model(x_adv)
        if not own_forward:
            predicted = logits.argmax(1)
        for i in range(len(x)):
            if predicted[i] == y[i]:
                kappa[i] += 1
        model.zero_grad()
        if spec.loss == "cw":
            true = logits[torch.arange(len(y)), y]
            other = (logits - 1e9 * F.one_hot(y, logits.shape[1])).amax(1)
            loss = -torch.clamp(true - other + spec.confidence, min=0).sum()
        else:
            loss = F.cross_entropy(logits, y)
        loss.backward()
        x_adv = x_adv.detach() + resolved_value(spec.step_size) * x_adv.grad.sign()
        x_adv = torch.min(
            torch.max(x_adv, x - resolved_value(spec.eps)), x + resolved_value(spec.eps)
        ).clamp(0, 1)
    model.train()
    return x_adv, kappa


def plain_gairat(model: nn.Module, subject: Subject, own_forward: bool) -> StepOutcome:
    """Do a GAIRAT step (G alg. 1-2 with eq. 6), example by example."""
    x, y, spec = subject.batch.x, subject.batch.y, subject.method.attacks["pgd"]
    x_adv, kappa = plain_attack(model, spec, subject.start("pgd"), x, y, own_forward)
    lam = resolved_value(subject.method.terms["pgd"].weight.lam)
    weight = torch.zeros(len(x), device=DEVICE)
    for i in range(len(x)):
        weight[i] = (1 + torch.tanh(lam + 5 * (1 - 2 * kappa[i] / spec.steps))) / 2
    weight = weight * len(x) / weight.sum()
    loss = (weight * F.cross_entropy(model(x_adv), y, reduction="none")).mean()
    model.zero_grad()
    loss.backward()
    return StepOutcome(loss.item(), gradient(model), kappa)


def plain_lrat(model: nn.Module, subject: Subject, own_forward: bool) -> StepOutcome:
    """Do an LRAT step (L alg. 1, eq. 5, 8-10, 17) by example; kappa needs no forward pass."""
    x, y, method = subject.batch.x, subject.batch.y, subject.method
    made = {}
    for name, spec in method.attacks.items():
        made[name] = plain_attack(model, spec, subject.start(name), x, y, False)
    logits = {"natural": model(x), **{name: model(x_adv) for name, (x_adv, _) in made.items()}}
    weights = {name: torch.zeros(len(x), device=DEVICE) for name in ("pgd", "cw", "natural")}
    alpha, beta = (
        resolved_value(getattr(method.terms["pgd"].weight, name)) for name in ("alpha", "beta")
    )
    for i in range(len(x)):
        p_pgd, p_cw = (F.softmax(logits[name][i].detach(), 0) for name in ("pgd", "cw"))
        others = torch.cat([p_cw[: y[i]], p_cw[y[i] + 1 :]])
        weights["pgd"][i] = alpha * (1 - p_pgd[y[i]]) ** beta
        weights["cw"][i] = alpha * (1 - (p_cw[y[i]] - others.max())) ** beta
        rest = (
            resolved_value(method.terms["bound"].weight.total)
            - weights["pgd"][i]
            - weights["cw"][i]
        )
        weights["natural"][i] = rest.clamp(min=0)
    total = sum(
        (weights[k] * F.cross_entropy(logits[k], y, reduction="none")).sum() for k in weights
    )
    loss = total / sum(w.sum() for w in weights.values())
    model.zero_grad()
    loss.backward()
    return StepOutcome(loss.item(), gradient(model), made["pgd"][1])


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1).float() for p in model.parameters()])


def build_our_step(subject: Subject, changes: dict[str, Any]) -> Callable[[], StepOutcome]:
    """Build our step with `changes` to the plain settings; it includes the update."""
    compute = ComputeSpec.from_data({**PLAIN, **changes})
    faces = ModelVariants(subject.copy(), subject.batch.x[:1], compute.resolve(DEVICE))
    optimizer = sgd(faces.model)

    def run() -> StepOutcome:
        with faces.training_precision():
            step = compute_step_gradients(subject.method, faces, subject.batch, subject.rng)
        optimizer.step()
        return StepOutcome(
            step.loss.item(), gradient(faces.model), step.attack_results["pgd"].kappa
        )

    return run


def build_plain_step(subject: Subject, own_forward: bool) -> Callable[[], StepOutcome]:
    model = subject.copy()
    optimizer = sgd(model)
    step = {"gairat": plain_gairat, "lrat": plain_lrat}[subject.method.name]

    def run() -> StepOutcome:
        found = step(model, subject, own_forward)
        optimizer.step()
        return found

    return run


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Build an optimizer of rate 0: it does its work, but the weights stay the same."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def prepare_subject(
    name: str, batch: int, small: bool, network: Path | None = None, warm_up: int = 15
) -> Subject:
    """Build a method, a batch, and a network trained for `warm_up` steps.

    If the file `network` is given, the network is loaded from it, if it exists, and stored in it.
    The images are ten random patterns with noise; their arithmetic costs the same as photographs'.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 8) if small else (3, 32, 32)
    coarse = torch.rand(10, shape[0], 4, 4, generator=generator)
    patterns = F.interpolate(coarse, shape[1:], mode="bilinear")

    def images(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 10, (count,), generator=generator)
        noise = torch.randn(count, *shape, generator=generator)
        return (0.3 + 0.3 * patterns[y] + 0.1 * noise).clamp(0, 1), y

    x, y = images(batch)
    model = (
        ModelSpec(name="digits_cnn" if small else "resnet18").build_model(shape[0], 10, 0).train()
    )
    if network is not None and network.exists():
        model.load_state_dict(torch.load(network, weights_only=True))
    else:
        train_briefly(model, images, warm_up)
    if network is not None:
        torch.save(model.state_dict(), network)
    config = build_training_config(
        name, {"data.name": "cifar10", **({"*.burn_in": 0} if name == "gairat" else {})}
    )
    index = torch.arange(batch, device=DEVICE)
    rng = ExampleRng.for_examples(index, 0, "train", 0)
    return Subject(
        config.resolve_at(0).method, model.to(DEVICE), Batch(x.to(DEVICE), y.to(DEVICE), index), rng
    )


def train_briefly(
    model: nn.Module, images: Callable[[int], tuple[Tensor, Tensor]], steps: int
) -> None:
    """Train for a few steps, then update the batch norms' statistics, which lag behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        x, y = images(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    reset_batch_norm_statistics(model, images(64)[0])


def reset_batch_norm_statistics(model: nn.Module, x: Tensor) -> None:
    """Replace the statistics of batch norms by those of x."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1


def count_step_flops(subject: Subject) -> tuple[float, float]:
    """Count the FLOP of our step's attacks and of the rest of the step."""
    faces = ModelVariants(subject.copy(), subject.batch.x[:1], ComputeSpec().resolve(DEVICE))
    few = Subject(
        subject.method,
        subject.model,
        Batch(*(t[:4] for t in vars(subject.batch).values())),
        subject.rng,
    )
    rng = ExampleRng.for_examples(few.batch.index, 0)
    with Flops() as whole:
        compute_step_gradients(few.method, faces, few.batch, rng)
    with Flops() as attacks:
        for attack in few.method.attacks.values():
            attack(faces.attack_module, few.batch.x, few.batch.y, rng)
    scale = len(subject.batch.y) / len(few.batch.y)
    return attacks.total * scale, (whole.total - attacks.total) * scale


def measure(
    name: str,
    batch: int,
    n: int,
    small: bool,
    paths: list[str],
    warm_up: bool = True,
    network: Path | None = None,
) -> list[Ratio]:
    """Print the table of one method and batch size; return the ratios that have goals."""
    subject = prepare_subject(name, batch, small, network)
    variants = (
        {"plain, a forward for kappa": build_plain_step(subject, True)} if name == "gairat" else {}
    )
    variants["plain, one forward"] = build_plain_step(subject, False)
    changes: dict[str, Any] = {}
    for path, change in PATHS.items():
        changes |= change
        if path in paths:
            variants[path] = build_our_step(subject, dict(changes))
    found: dict[str, StepOutcome] = {}
    seconds = time_rounds(
        {k: lambda k=k, run=run: found.update({k: run()}) for k, run in variants.items()},
        n,
        warm_up,
    )
    time_of = medians(seconds)
    attack, rest = count_step_flops(subject)
    size = {"tries": 2, "size": 256} if small else {}
    rates = {dtype: measure_matrix_rate(dtype, **size) for dtype in (torch.float32, torch.bfloat16)}
    reference = next(iter(variants))
    base = found.get("ours, all off", found[reference])
    rows = []
    for variant in variants:
        limit = (
            ""
            if variant.startswith("plain")
            else f"{_limit(variant, attack, rest, rates) / time_of[variant]:.0%}"
        )
        took, one_forward = time_of[variant], time_of["plain, one forward"]
        rows.append([
            variant, f"{took:.3f}", f"{batch / took:.0f}", f"{time_of[reference] / took:.2f}",
            f"{one_forward / took:.2f}", limit, *_agreement(found[variant], base),
        ])  # fmt: skip
    head = [
        "step",
        "s, median",
        "images / s",
        "speedup over plain",
        "speedup over plain, one forward",
        "share of the limit",
        "rows with another kappa",
        "relative error of the loss",
        "of the gradient",
    ]
    print(
        f"\n{name}, PGD-10, {subject.name}, batch {batch}; {n} interleaved rounds; "
        f"{describe_machine()}"
    )
    print(
        f"kappa of {len(base.kappa.unique())} sizes, mean {base.kappa.float().mean():.1f};", end=" "
    )
    print(
        f"{(attack + rest) / 1e9:.0f} GFLOP a step, {attack / (attack + rest):.0%} in attacks; "
        "matrix products reach"
    )
    print(
        f"{rates[torch.float32] / 1e9:.0f} GFLOP/s in float32, {rates[torch.bfloat16] / 1e9:.0f} "
        "in bf16\n"
    )
    print(format_table(head, rows), flush=True)
    goals = {FLOAT32: "2 (float32)", BF16: "3.5 (bf16)", COMPILED: "5 (GPU)"}
    return [
        Ratio(f"training step, {name}, batch {batch}: {path.strip('+ ')}",
              f"{time_of[reference] / time_of[path]:.2f}"
              f" ({time_of['plain, one forward'] / time_of[path]:.2f} over one forward)", goal,
              f"{n} rounds")
        for path, goal in goals.items() if path in paths
    ]  # fmt: skip


def _limit(variant: str, attack: float, rest: float, rates: dict[torch.dtype, float]) -> float:
    """Return the seconds that the step's matrix products take at the machine's best rate."""
    order = list(PATHS)
    in_bf16 = [
        order.index(variant) >= order.index(f"+ bf16 {part}") for part in ("attack", "training")
    ]
    return sum(
        w / rates[torch.bfloat16 if low else torch.float32]
        for w, low in zip((attack, rest), in_bf16, strict=True)
    )


def _agreement(one: StepOutcome, other: StepOutcome) -> list[str]:
    """Return cells: share of rows with another kappa, relative errors of loss and gradient."""
    differs = f"{(one.kappa != other.kappa).float().mean():.1%}"
    apart = (one.grad - other.grad).norm() / other.grad.norm()
    return [differs, f"{abs(one.loss / other.loss - 1):.0e}", f"{apart:.0e}"]


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    batch, n = (128, 2) if full else (16, 1)
    paths = faster_paths(full)
    return [
        r
        for name in ("gairat", "lrat")
        for r in measure(name, batch, n, not full, paths, warm_up=full)
    ]


def faster_paths(full: bool) -> list[str]:
    """List the code paths to measure.

    With `full`, bf16 is left out where it is slower than float32: a processor without bf16 units
    would take minutes.
    """
    if DEVICE.type == "cuda":
        return list(PATHS)
    paths = [path for path in PATHS if path != COMPILED]
    if full and measure_matrix_rate(torch.bfloat16) < measure_matrix_rate(torch.float32):
        print("bf16 is left out: this processor computes it more slowly than float32")
        return [path for path in paths if "bf16" not in path]
    return paths


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument(
        "--method", nargs="+", choices=["gairat", "lrat"], default=["gairat", "lrat"]
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cold", action="store_true", help="count the first round too")
    parser.add_argument(
        "--network", type=Path, help="weights to start from; written here if there are none"
    )
    parser.add_argument("--digits", action="store_true", help="the small network on 8 x 8 images")
    parser.add_argument(
        "--paths", nargs="+", choices=list(PATHS), help="default: those that are faster here"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.method:
        measure(
            name,
            args.batch,
            args.rounds,
            args.digits,
            args.paths or faster_paths(True),
            not args.cold,
            args.network,
        )


if __name__ == "__main__":
    main()
