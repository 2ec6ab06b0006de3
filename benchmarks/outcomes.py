"""Record which examples each candidate attack and full AutoAttack break, on checkpoints of all
methods: the table from which the sweep's default objective is chosen.

    python benchmarks/outcomes.py record --work FOLDER --data DATA --oracle ORACLE
    python benchmarks/outcomes.py collect --work FOLDER --out benchmarks/outcomes.npz

`record` trains small networks on digits (18 methods, two runs of each, an early and a late
checkpoint, and runs that mask their gradients), and adds published robust networks on CIFAR-10 and
MNIST images (DATA) and a robust digits network (ORACLE); both are optional. What is recorded stays
in FOLDER: the same command goes on where it was stopped. `choose_objective.py` reads the table.

A case is a checkpoint with its examples and epsilon. Half of the training runs are for fitting, the
others for the report; a method has one run in each half. The cost of an attack on an example is its
number of passes (forward and backward) until the example breaks; a forward pass alone counts 1/3.
"""

import gzip
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from command_line import create_parser
from measure import describe_machine, read_commit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raysweep.atomic_files import atomic_open
from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    AnyAttack,
    Norm,
    autoattack,
    objective_attacks,
    true_class_margin,
)
from raysweep.attacks.base import (
    project_to_ball,
    sample_on_sphere,
    steepest_ascent_direction,
)
from raysweep.catalog import METHODS
from raysweep.data import Split, load_data
from raysweep.evaluation.attack_model import make_attack_model
from raysweep.models import MODELS, ModelSpec
from raysweep.models.layers import Logits, conv3x3
from raysweep.rng import ExampleRng
from raysweep.spec import apply_overrides
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.trainer import train_model
from raysweep.training.validation import Validation

FORWARD_COST = 1 / 3
N_VAL = N_TEST = 75
SEEDS = (0, 1, 2)
# Steps of a run of MultiTargeted -> how often each target is tried.
RUN_LENGTHS = {5: 4, 10: 4, 20: 2}
EARLY, LATE = 2, 8
# Further runs of methods with settings that mask gradients or overfit to a weak attack.
MASKED: dict[str, tuple[str, dict[str, object]]] = {
    "fgsm": ("at", {"method.attacks.pgd.steps": 1, "method.attacks.pgd.step_size": 0.25}),
    "gairat-lam-3": ("gairat", {"method.terms.pgd.weight.lam": -3.0}),
    "trades-weak": ("trades", {"method.terms.kl.coef": 0.5, "optim.lr": 0.1}),
    "mail-steep": ("mail-at", {"method.terms.pgd.weight.slope": 40.0}),
    "gair-mart-lam-2": ("gair-mart", {"method.terms.pgd.weight.lam": -2.0}),
    "lrat-steep": ("lrat", {"method.terms.*.weight.alpha": 4.0, "method.terms.*.weight.beta": 3.0}),
}
WIDE = ("at", "gair-fat")
PUBLISHED = {
    "wk17a_mipverify": 100,
    "resnet2b": 50,
    "colt_mnist_0.1": 100,
    "sdp_cifar_cnn_a_adv": 100,
    "babattack_mnist_madry_tiny": 100,
    "eran_cifar_conv_small_pgd": 100,
    "sdp_mnist_cnn_a_adv": 100,
    "sdp_cifar_cnn_a_mix4": 100,
    "advertorch_lenet5_adv": 50,
    "resnet4b": 40,
}


def strided_cnn(channels: int, classes: int) -> nn.Module:
    """Two strided convolutions and two linear layers: a twentieth of the cost of `digits_cnn`."""
    return nn.Sequential(
        nn.Sequential(conv3x3(channels, 16, 2), nn.BatchNorm2d(16)), nn.ReLU(),
        nn.Sequential(conv3x3(16, 32, 2), nn.BatchNorm2d(32), nn.Flatten()), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        Logits(64, classes),
    )  # fmt: skip


MODELS["strided_cnn"] = strided_cnn


@torch.no_grad()
def to_dense(model: nn.Sequential, shape: tuple[int, ...]) -> nn.Module:
    """Write each affine layer of a `strided_cnn` in eval mode as one matrix: for 8x8 pixels this
    is faster than convolutions.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for layer in model:
        size = int(np.prod(shape))
        zero = torch.zeros(1, *shape)
        result = layer(zero)
        if not isinstance(layer, nn.ReLU):
            basis = torch.eye(size).view(size, *shape)
            dense = nn.Linear(size, result[0].numel())
            dense.weight.copy_((layer(basis) - result).flatten(1).T)
            dense.bias.copy_(result.flatten())
            layers.append(dense)
        else:
            layers.append(nn.ReLU())
        shape = tuple(result.shape[1:])
    return nn.Sequential(*layers).eval()


@dataclass(frozen=True)
class Case:
    """A checkpoint with its examples.

    Attributes:
        name: unique name, also of its files.
        family: training run or published network.
        method: name of the method, or "published".
        stage: "early", "late" or "published".
        half: "fit" or "report".
        eps, norm: threat model of all attacks.
        load: returns the model in eval mode, images, labels, and how many examples are of the
            validation split (the others are test examples).
    """

    name: str
    family: str
    method: str
    stage: str
    half: str
    eps: float
    norm: Norm
    load: Callable[[], tuple[nn.Module, Tensor, Tensor, int]]


class PassCounter(nn.Module):
    """Counts the rows of forward passes with and without a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cost = model, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.cost += len(x) * (1 if x.requires_grad else FORWARD_COST)
        return self.model(x)


@dataclass
class Trace:
    """What a run of steps found, by row.

    Attributes:
        passes: passes until the row broke, or all of them.
        broken: whether it broke.
        margin: least margin z_y - max_{i != y} z_i of an iterate.
        x_best, logits: iterate of least margin, and its logits.
    """

    passes: Tensor
    broken: Tensor
    margin: Tensor
    x_best: Tensor
    logits: Tensor


def trace_steps(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    step_sizes: list[float],
    eps: float,
    norm: Norm,
    target: Tensor | None = None,
    momentum: float = 0.75,
) -> Trace:
    """Ascend the margin loss, z_t - z_y for a target class; a row stops when it is broken."""
    n = len(x)
    rows = torch.arange(n)
    found = Trace(
        torch.full((n,), len(step_sizes) + 1),
        torch.zeros(n, dtype=torch.bool),
        torch.full((n,), torch.inf),
        start.clone(),
        torch.zeros(n, 10),
    )
    now = before = start
    for step in range(len(step_sizes) + 1):
        point = now.detach().requires_grad_()
        logits = model(point)
        margin = true_class_margin(logits, y)
        loss = margin if target is None else (logits.gather(1, torch.stack([y, target], 1)).diff())
        loss = -loss.sum() if target is None else loss.sum()
        (grad,) = torch.autograd.grad(loss, point)
        margin, logits = margin.detach(), logits.detach()
        better = margin < found.margin[rows]
        found.margin[rows[better]] = margin[better]
        found.x_best[rows[better]] = now[better]
        found.logits[rows[better]] = logits[better]
        hit = margin <= 0
        found.broken[rows[hit]] = True
        found.passes[rows[hit]] = step + 1
        if step == len(step_sizes) or hit.all():
            break
        x, y, rows, now, before, grad = (part[~hit] for part in (x, y, rows, now, before, grad))
        target = None if target is None else target[~hit]
        direction = steepest_ascent_direction(grad, norm)
        ahead = project_to_ball(now + step_sizes[step] * direction, x, eps, norm)
        pull = momentum if step else 1.0
        ahead = now + pull * (ahead - now) + (1 - pull) * (now - before)
        now, before = project_to_ball(ahead, x, eps, norm), now
    return found


def cosine_steps(steps: int, first: float) -> list[float]:
    """Return step sizes that fall from `first` to almost 0 along half a cosine."""
    return [float(first * (1 + np.cos(np.pi * step / steps)) / 2) for step in range(steps)]


def trace_targets(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    starts: list[Tensor],
    ranking: Tensor,
    steps: list[float],
    eps: float,
    norm: Norm,
) -> Trace:
    """Attack one target after the other, in the order of `ranking` (N, classes), each from its
    start.
    """
    n = len(x)
    total = torch.zeros(n, dtype=torch.long)
    broken = torch.zeros(n, dtype=torch.bool)
    best = torch.full((n,), torch.inf)
    others = ranking[ranking != y[:, None]].view(n, -1)
    for rank, start in enumerate(starts):
        live = (~broken).nonzero()[:, 0]
        if not len(live):
            break
        run = trace_steps(
            model, x[live], y[live], start[live], steps, eps, norm, others[live, rank]
        )
        total[live] += run.passes
        broken[live] = run.broken
        best[live] = torch.minimum(best[live], run.margin)
    return Trace(total, broken, best, x, x)


def record_candidates(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, np.ndarray]:
    """Run each candidate on all correct rows: NAME.broken and NAME.passes, (N,)."""
    with torch.no_grad():
        clean_logits = model(x)
    clean = clean_logits.argmax(1) == y
    correct = clean.nonzero()[:, 0]
    outcome = {"clean": clean.numpy(), "clean.margin": true_class_margin(clean_logits, y).numpy()}
    problem = (model, x[correct], y[correct], ids[correct], eps, norm)
    for name, values in {**run_package_attacks(*problem), **run_step_traces(*problem)}.items():
        spread = torch.zeros(len(x), dtype=values.dtype)
        spread[correct] = values
        outcome[name] = spread.numpy()
    return outcome | record_former_default(model, x, y, correct, ids, eps, norm)


def run_package_attacks(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, Tensor]:
    """Run the candidates that are attacks of raysweep."""
    step = {"eps": eps, "norm": norm}
    pgd = PGD(**step, step_size=eps / 4, steps=20)
    attacks: dict[str, AnyAttack] = {
        "pgd20": pgd,
        "cw20": pgd.replace(loss="cw"),
        "apgd-ce-20": APGD(**step, steps=20),
        "apgd-dlr-20": APGD(**step, steps=20, loss="dlr"),
        "apgd-t-20x9": APGD(**step, steps=20, loss="dlr-targeted"),
        "fab-t-10x3": FAB(**step, steps=10, targets=3),
    }
    outcome = {}
    for name, attack in attacks.items():
        counted = PassCounter(model)
        result = attack(counted, x, y, ExampleRng.for_examples(ids, 0, "candidates", name))
        with torch.no_grad():
            outcome[f"{name}.broken"] = model(result.x_adv).argmax(1) != y
        passes = result.queries - (1 if isinstance(attack, APGD) else 0)
        if isinstance(attack, FAB):
            passes = torch.full_like(y, round(counted.cost / max(len(y), 1)))
        outcome[f"{name}.passes"] = passes.short()
    return outcome


def run_step_traces(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, Tensor]:
    """Run the candidates that ascend margins with steps that decay: untargeted from two starts,
    and towards targets in the order of their logits where the first start ended.
    """

    def start(name: str) -> Tensor:
        rng = ExampleRng.for_examples(ids, 0, "candidates", name)
        return sample_in_ball(x, eps, norm, rng)

    runs = {
        f"margin-cos-20-{restart}": trace_steps(
            model, x, y, start(f"margin-cos-20-{restart}"), cosine_steps(20, 2 * eps), eps, norm
        )
        for restart in range(2)
    }
    first = runs["margin-cos-20-0"]
    ranking = first.logits.argsort(1, descending=True)
    for name, steps, warm, n_targets in (
        ("targets-cos-10x9", 10, False, 9),
        ("targets-cos-20x4", 20, False, 4),
        ("targets-cos-10x4-warm", 10, True, 4),
    ):
        starts = [first.x_best if warm else start(f"{name}-{rank}") for rank in range(n_targets)]
        step_sizes = cosine_steps(steps, eps if warm else 2 * eps)
        runs[name] = trace_targets(model, x, y, starts, ranking, step_sizes, eps, norm)
    outcome = {"margin-cos-20-0.margin": first.margin}
    for name, run in runs.items():
        outcome[f"{name}.broken"], outcome[f"{name}.passes"] = run.broken, run.passes.short()
    return outcome


def record_runs(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, np.ndarray]:
    """Run all runs of MultiTargeted that a row could take, on the rows that PGD-20 and CW-20 leave.

    `uS` is the untargeted run of S steps, `tS.R.K` the R-th run towards the target of rank K. `.p`
    are the passes until the row broke, 0 if it did not; `.m` is the least margin.
    """
    step = {"eps": eps, "norm": norm}
    pgd = PGD(**step, step_size=eps / 4, steps=20)
    with torch.no_grad():
        stands = model(x).argmax(1) == y
    for name, attack in (("pgd20", pgd), ("cw20", pgd.replace(loss="cw"))):
        rows = stands.nonzero()[:, 0]
        result = attack(
            model, x[rows], y[rows], ExampleRng.for_examples(ids[rows], 0, "candidates", name)
        )
        with torch.no_grad():
            stands[rows] = model(result.x_adv).argmax(1) == y[rows]
    rows = stands.nonzero()[:, 0]
    x, y = x[rows], y[rows]
    with torch.no_grad():
        margin = true_class_margin(model(x), y)
    outcome = {"rows": rows.numpy(), "m0": margin.numpy()}

    def run(name: str, steps: int, target: Tensor | None = None) -> Trace:
        start = sample_in_ball(x, eps, norm, ExampleRng.for_examples(rows, 7, name))
        found = trace_steps(model, x, y, start, cosine_steps(steps, 2 * eps), eps, norm, target)
        outcome[f"{name}.p"] = (found.passes * found.broken).short().numpy()
        outcome[f"{name}.m"] = found.margin.half().numpy()
        return found

    for steps, n_repeats in RUN_LENGTHS.items():
        ranking = run(f"u{steps}", steps).logits.argsort(1, descending=True)
        others = ranking[ranking != y[:, None]].view(len(y), -1)
        for repeat in range(n_repeats):
            for rank in range(others.shape[1]):
                run(f"t{steps}.{repeat}.{rank}", steps, others[:, rank])
    return outcome


def record_default(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, np.ndarray]:
    """Run today's default objective; `kept` is the share of its margin that each row keeps."""
    attacks = objective_attacks(eps, norm)
    measured = {name: attacks.pop(name) for name in ("pgd", "cw")}
    counted = PassCounter(model)
    validation = Validation(attacks=measured, finish=attacks, scales=(), batch_size=len(x))
    found = validation._validate_batch(counted, Split(x, y, ids, 1.0), slice(0, len(x)))
    # The passes over the natural images and the verdicts are those of the former default, too.
    n_correct = int(found["clean"].sum())
    overhead = len(x) + FORWARD_COST * (2 * n_correct + int((found["pgd"] & found["cw"]).sum()))
    return {
        **{name: found[name].numpy() for name in ("clean", "pgd", "cw", "robust_worst")},
        "kept": found["robust_margin"].numpy(),
        "cost": np.array(counted.cost - overhead),
    }


def sample_in_ball(x: Tensor, eps: float, norm: Norm, rng: ExampleRng) -> Tensor:
    """Return random points of the balls around `x`."""
    if norm == "L2":
        return sample_on_sphere(x, eps, norm, rng)
    return (x + eps * rng.symmetric_uniform(tuple(x.shape[1:]), x.dtype)).clamp(0, 1)


def record_former_default(
    model: nn.Module, x: Tensor, y: Tensor, correct: Tensor, ids: Tensor, eps: float, norm: Norm
) -> dict[str, np.ndarray]:
    """Run the default objective of raysweep 0.2: PGD-20, CW-20, then APGD-T 20x3 on the rest."""
    counted = PassCounter(model)
    stands = torch.zeros(len(x), dtype=torch.bool)
    stands[correct] = True
    step = {"eps": eps, "norm": norm}
    pgd = PGD(**step, step_size=eps / 4, steps=20)
    apgd_t = APGD(**step, steps=20, loss="dlr-targeted", targets=3)
    attacks = {"pgd": pgd, "cw": pgd.replace(loss="cw"), "apgd_t": apgd_t}
    position = torch.full((len(x),), -1)
    position[correct] = torch.arange(len(correct))
    for name, attack in attacks.items():
        rows = correct if name != "apgd_t" else stands.nonzero()[:, 0]
        if not len(rows):
            break
        rng = ExampleRng.for_examples(ids[position[rows]], 0, "validation", name)
        result = attack(counted, x[rows], y[rows], rng)
        with torch.no_grad():
            stands[rows] &= model(result.x_adv).argmax(1) == y[rows]
    cost = np.array(counted.cost)
    return {"former.broken": ~stands.numpy(), "former.cost": cost}


def record_autoattack(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, eps: float, norm: Norm, seed: int
) -> dict[str, np.ndarray]:
    """Run full AutoAttack; ATTACK.robust are the rows that stand after it."""
    cascade = autoattack(eps, norm)
    result = cascade(model, x, y, ExampleRng.for_examples(ids, seed, "autoattack"))
    return {name: rows.numpy() for name, rows in result.robust_after.items()}


def list_cases(work: Path, data: Path | None, oracle: Path | None) -> Iterator[Case]:
    """List all cases; published networks come between the trained ones, in case time is short."""
    trained = list(_list_trained_cases(work))
    first = [case for case in trained if case.family.endswith("-0")]
    rest = [case for case in trained if not case.family.endswith("-0")]
    others = [*_list_oracle_cases(oracle), *_list_published_cases(data)]
    for position, case in enumerate([*sorted(first, key=_is_early), *rest]):
        yield case
        if position % 4 == 3 and others:
            yield others.pop(0)
    yield from others


def _is_early(case: Case) -> bool:
    return case.stage == "early"


def _list_trained_cases(work: Path) -> Iterator[Case]:
    for index, method in enumerate(METHODS):
        for run in (0, 1):
            eps = 0.15 if not run else (0.2, 0.1)[index % 2]
            if method == "standard":
                eps = (0.05, 0.03)[run]
            half = ("fit", "report")[(index + run) % 2]
            network = "digits_cnn" if run and method in WIDE else "strided_cnn"
            stages = (("early", EARLY), ("late", LATE))
            for stage, epochs in stages if not run else stages[1:]:
                yield _trained_case(
                    work, f"{method}-{run}", method, stage, epochs, half, eps, network, {}, run
                )
    for index, (name, (method, settings)) in enumerate(MASKED.items()):
        half = ("fit", "report")[index % 2]
        eps = 0.2 if name == "fgsm" else 0.15
        yield _trained_case(
            work, name, method, "late", LATE, half, eps, "strided_cnn", settings, 2 + index
        )
    for index, method in enumerate(("at", "gairat")):
        half = ("fit", "report")[index % 2]
        settings = {"*.norm": "L2", "*.step_size": 0.15}
        yield _trained_case(
            work, f"{method}-L2", method, "late", LATE, half, 0.6, "strided_cnn", settings, 9
        )


def _trained_case(
    work: Path,
    family: str,
    method: str,
    stage: str,
    epochs: int,
    half: str,
    eps: float,
    network: str,
    settings: dict[str, object],
    seed: int,
) -> Case:
    boundaries = [5, 7]
    train_eps = 0.15 if method == "standard" else eps
    config = build_training_config(
        method,
        {
            "epochs": epochs,
            "seed": seed,
            "optim.lr": {
                "kind": "piecewise",
                "boundaries": boundaries,
                "values": [0.05, 0.01, 0.002],
            },
            "validation.attacks": {"pgd": {"steps": 1}},
            "validation.finish": {},
            "validation.scales": [],
            "validation.every": LATE,
        },
    )
    config = apply_overrides(
        config,
        {
            "method.*.eps": train_eps,
            "method.*.step_size": train_eps / 4,
            "method.*.d_max": 1.5 * train_eps,
            "method.*.burn_in": 1,
            "method.*.tau.boundaries": [3, 5],
        },
        on_missing="ignore",
    )
    config = apply_overrides(config, settings, on_missing="ignore")
    norm: Norm = "L2" if settings.get("*.norm") == "L2" else "Linf"

    def load() -> tuple[nn.Module, Tensor, Tensor, int]:
        data = load_data(config.data)
        model = MODELS[network](1, 10)
        model.load_state_dict(load_file(_train(work, family, config, network)))
        model.eval()
        if network == "strided_cnn":
            model = to_dense(model, (1, 8, 8))
        x = torch.cat(
            [
                data.val.get_float_images(slice(0, N_VAL)),
                data.test.get_float_images(slice(0, N_TEST)),
            ]
        )
        return model, x, torch.cat([data.val.y[:N_VAL], data.test.y[:N_TEST]]), N_VAL

    return Case(f"{family}-{stage}", family, method, stage, half, eps, norm, load)


def _train(work: Path, family: str, config: TrainingConfig, network: str) -> Path:
    """Return the file of a run's weights after `config.epochs`, trained first if it is missing."""
    folder = work / "weights"
    folder.mkdir(exist_ok=True, parents=True)
    for epochs in (EARLY, LATE):
        path = folder / f"{family}-{epochs}.safetensors"
        if not path.exists():
            part = config.replace(model=ModelSpec(name=network), epochs=epochs)
            result = train_model(part, work / "runs" / family)
            model = result.last_checkpoint.load_weights(part.model.build_model(1, 10, 0))
            save_file(
                {key: value.contiguous() for key, value in model[0].state_dict().items()}, path
            )
    return folder / f"{family}-{config.epochs}.safetensors"


def _list_oracle_cases(oracle: Path | None) -> Iterator[Case]:
    if oracle is None:
        return
    arrays = np.load(oracle / "aa" / "model_and_test.npz")

    def load() -> tuple[nn.Module, Tensor, Tensor, int]:
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
        keys = [key for key in arrays.files if key.startswith("param.")]
        values = {key.removeprefix("param."): torch.tensor(arrays[key]) for key in keys}
        layers = dict(zip(("conv1", "conv2", "conv3", "fc1", "fc2"), (0, 2, 4, 7, 9), strict=True))
        network.load_state_dict(
            {
                f"{layers[name]}.{kind}": value
                for (name, kind), value in (
                    (key.split("."), value) for key, value in values.items()
                )
            }
        )
        x, y = torch.tensor(arrays["x_test"]).float(), torch.tensor(arrays["y_test"]).long()
        return network.eval(), x.view(-1, 1, 8, 8), y, len(y)

    yield Case("oracle", "oracle", "published", "published", "report", 0.2, "Linf", load)


def _list_published_cases(data: Path | None) -> Iterator[Case]:
    if data is None:
        return
    sys.path.insert(0, str(data / "models"))
    import archs

    for index, (name, count) in enumerate(PUBLISHED.items()):
        dataset, eps, build = archs.Z[name]

        def load(
            dataset: str = dataset, build: Callable[[], nn.Module] = build, count: int = count
        ) -> tuple[nn.Module, Tensor, Tensor, int]:
            x, y = _read_images(data, dataset, count)
            return build(), x, y, count

        half = ("fit", "report")[index % 2]
        yield Case(name, name, "published", "published", half, eps, "Linf", load)


def _read_images(data: Path, dataset: str, count: int) -> tuple[Tensor, Tensor]:
    if dataset == "cifar10":
        arrays = np.load(data / "cifar10" / "cifar10_test_mixed.npz")
        x, y = arrays["x"][:count], arrays["y"][:count]
    else:
        parts = []
        for name, offset in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
            content = gzip.decompress((data / "mnist" / name).read_bytes())
            parts.append(np.frombuffer(content, np.uint8, offset=offset))
        x, y = parts[0].reshape(-1, 1, 28, 28)[:count], parts[1][:count]
    return torch.tensor(x).float() / 255, torch.tensor(y).long()


RECORDERS = {
    "candidates": record_candidates,
    "runs": record_runs,
    "default": record_default,
    **{f"autoattack-{seed}": partial(record_autoattack, seed=seed) for seed in SEEDS},
}


def record(cases: list[Case], parts: Collection[str], work: Path) -> None:
    """Record the parts of each case that are missing in `work`."""
    (work / "parts").mkdir(parents=True, exist_ok=True)
    for case in cases:
        for part in parts:
            path = work / "parts" / f"{case.name}.{part}.npz"
            if path.exists() or (part == "runs" and case.half == "report"):
                continue
            began = time.process_time()
            model, x, y, n_val = case.load()
            model = make_attack_model(model, x[:16]).model.requires_grad_(False)
            ids = torch.arange(len(x))
            found = RECORDERS[part](model, x, y, ids, eps=case.eps, norm=case.norm)
            keys = ("name", "family", "method", "stage", "half", "eps", "norm")
            facts = {key: getattr(case, key) for key in keys}
            seconds = time.process_time() - began
            facts |= {"n_val": n_val, "seconds": seconds}
            facts |= {"machine": describe_machine(), "commit": read_commit()}
            with atomic_open(path) as file:
                np.savez_compressed(file, **found, facts=np.array(json.dumps(facts)))
            print(f"{case.name} {part}: {seconds:.1f} s", flush=True)


def collect(work: Path, out: Path) -> None:
    """Add all parts of the cases that AutoAttack has attacked to the file, which is made if it is
    missing.
    """
    arrays: dict[str, np.ndarray] = {}
    if out.exists():
        with np.load(out) as file:
            arrays = dict(file)
    names = sorted(path.name.split(".autoattack-0")[0] for path in (work / "parts").glob("*-0.npz"))
    for name in names:
        for part in RECORDERS:
            path = work / "parts" / f"{name}.{part}.npz"
            if path.exists():
                with np.load(path) as file:
                    values = {f"{name}/{part}/{key}": _shrink(file[key]) for key in file.files}
                arrays |= values
    with atomic_open(out) as file:
        np.savez_compressed(file, **arrays)
    print(f"{out}: {len(names)} cases, {out.stat().st_size / 1024:.0f} KiB")


def _shrink(values: np.ndarray) -> np.ndarray:
    """Return floats as float16, and whole numbers as uint16."""
    if values.dtype.kind == "f" and values.ndim:
        return values.astype(np.float16)
    return values.astype(np.uint16) if values.dtype.kind in "iu" and values.ndim else values


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("action", choices=["record", "collect"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--oracle", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(RECORDERS), choices=RECORDERS)
    parser.add_argument("--only", nargs="+", default=(), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".npz"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "collect":
        collect(args.work, args.out)
        return
    cases = list(list_cases(args.work, args.data, args.oracle))
    record(
        [case for case in cases if case.name in (args.only or [case.name])], args.parts, args.work
    )


if __name__ == "__main__":
    main()
