"""The price of a finalist: full AutoAttack on the validation images, beside an epoch of a trial.

    python benchmarks/finalists.py --method lrat

Trains the starting point of the method's search space on digits in this process, on one core, and
attacks its best epoch as the end of a sweep does. Prints processor seconds of an epoch with its
validation and of the attack, and what the attacks on finalists and base runs add to a sweep.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import describe_machine

from raysweep.attacks import build_named_attack
from raysweep.data import load_data
from raysweep.evaluation import evaluate
from raysweep.sweep.search_space import load_space
from raysweep.training.model_loading import load_trained_model
from raysweep.training.trainer import train_model


def measure(method: str, overrides: dict[str, object], n_sweep_epochs: int) -> None:
    """Print the price of a method's finalists."""
    space = load_space(method, overrides)
    config = space.trial_config(space.initial_points[0] if space.initial_points else {})
    data = load_data(config.data)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = train_model(config, Path(folder), data=data)
        epoch_seconds = (time.process_time() - began) / config.epochs
        model = load_trained_model(result.best_checkpoint, data)
    validation = config.resolve_at(config.epochs - 1).validation
    images = validation.select_split(data)
    threat_model = validation.find_threat_model()
    assert threat_model is not None
    began = time.process_time()
    report = evaluate(
        model,
        images.get_float_images(slice(None)),
        images.y,
        build_named_attack("autoattack", *threat_model),
        index=images.index,
    )
    attack_seconds = time.process_time() - began
    objective = result.best_checkpoint.last_metrics[config.validation.objective]
    print(f"{describe_machine()}; processor seconds on one core")
    print(f"{method}: {config.epochs} epochs, {len(images)} validation images at {threat_model}")
    print(f"epoch with validation {epoch_seconds:.2f} s; AutoAttack {attack_seconds:.1f} s")
    print(f"objective {objective:.4f}, AutoAttack {report.robust_accuracy:.4f}")
    n_attacks = (space.finalists or 0) + (space.base_runs or 0)
    share = n_attacks * attack_seconds / (epoch_seconds * n_sweep_epochs)
    print(f"{n_attacks} attacks add {share:.0%} to a sweep of {n_sweep_epochs} epochs")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="lrat")
    parser.add_argument("--epochs", type=int, help="epochs of the trial (default: the space's)")
    parser.add_argument("--sweep-epochs", type=int, default=86, help="trained epochs of the sweep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    overrides: dict[str, object] = {} if args.epochs is None else {"epochs": args.epochs}
    measure(args.method, overrides, args.sweep_epochs)


if __name__ == "__main__":
    main()
