# ruff: noqa: E402
"""Writes `runs/` and `expected.json` beside this file. Only for the code of commit d5c5dbc, whose
names it uses.

    cd EMPTY_FOLDER && PYTHONPATH=CHECKOUT_OF_d5c5dbc python THIS_FILE

It works in the current folder and copies what is kept; with --numbers it only computes an
`expected.json` there. The files of `yaml/` are written by hand.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from contextlib import suppress
from pathlib import Path

HERE, OUT = Path(__file__).resolve().parent, Path.cwd()
# Ray's workers know the small network too, and nothing is computed by more threads than one.
SHIM = """
import importlib.abc, importlib.util, sys

class Also(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "raysweep.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def and_then(module):
            run(module)
            from torch import nn
            module.MODELS["tiny"] = lambda channels, classes: nn.Sequential(
                nn.Conv2d(channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                nn.Linear(64, classes),
            )
        spec.loader.exec_module = and_then
        return spec

sys.meta_path.insert(0, Also())
"""
shim = OUT / "shim"
shim.mkdir()
(shim / "sitecustomize.py").write_text(SHIM)
os.environ["PYTHONPATH"] = f"{shim}:{os.environ['PYTHONPATH']}"
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
    "RAYSWEEP_CACHE": str(OUT / "cache"),
}
os.environ.pop("MLFLOW_TRACKING_URI", None)
exec(SHIM)

import numpy as np
import torch
from pydantic import TypeAdapter
from raysweep.pipeline.paper import paper_table
from raysweep.pipeline.shipped import pipelines
from raysweep.results import load_report, load_sweep
from raysweep.sweep.space import SearchSpace, load_space, spaces
from raysweep.training.pause import Interrupted

import raysweep
from raysweep.attacks import ATTACKS, AnyAttack
from raysweep.catalog import METHODS
from raysweep.cli import main
from raysweep.data import DataSpec, load
from raysweep.models import MODELS
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Pipeline, load_pipeline, steps
from raysweep.rng import Rng
from raysweep.spec import Spec, read_yaml, shipped
from raysweep.tracking import run_tags, train_tags
from raysweep.training.checkpoint import Run, environment, read
from raysweep.training.config import RunConfig, run_config
from raysweep.training.presets import preset, presets, resolve
from raysweep.training.trainer import fit

torch.set_num_threads(1)
os.sched_getaffinity = lambda pid: {0}  # attacks run in this process

TINY = {
    "epochs": 2,
    "data.train_size": 64,
    "data.val_size": 50,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
    "validation.finish.*.steps": 2,
}
SMALL = TINY | {"model.name": "tiny", "data.train_size": 600, "epochs": 3}
SHRUNK = {
    "data.name": "digits",
    "data.unlabeled": None,
    "data.train_size": 64,
    "data.val_size": 50,
    "model.name": "digits_cnn",
    "epochs": 2,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
}
# Attacks on 16 images, as plain data.
SINGLE = {
    "pgd": {"kind": "pgd", "eps": 0.1, "step_size": 0.03, "steps": 5},
    "pgd-cw-tau": {
        "kind": "pgd",
        "eps": 0.1,
        "step_size": 0.03,
        "steps": 5,
        "loss": "cw",
        "tau": 1,
    },
    "pgd-kl-l2": {
        "kind": "pgd",
        "eps": 0.5,
        "step_size": 0.2,
        "steps": 5,
        "loss": "kl",
        "norm": "L2",
        "start": "gaussian",
    },
    "minimal": {"kind": "minimal", "d_max": 0.2, "steps": 5},
    "apgd-dlr": {"kind": "apgd", "eps": 0.1, "steps": 10, "loss": "dlr"},
    "apgd-l2": {"kind": "apgd", "eps": 0.5, "steps": 10, "norm": "L2", "restarts": 2},
    "fab": {"kind": "fab", "eps": 0.1, "steps": 10, "targets": None, "restarts": 2},
    "square": {"kind": "square", "eps": 0.1, "queries": 50},
    "square-l2": {"kind": "square", "eps": 0.5, "queries": 50, "norm": "L2"},
    "worst": {
        "kind": "worst_case",
        "attacks": {
            "a": {"eps": 0.1, "steps": 3},
            "b": {"kind": "square", "eps": 0.1, "queries": 20},
        },
    },
}


def sha_of_state(model):
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def sketch(model):
    """Of each tensor: shape, sum, Euclidean norm and the first values, which is enough to compare
    by.
    """
    found = {}
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().double().flatten()
        found[name] = [list(value.shape), float(flat.sum()), float(flat.norm()), flat[:8].tolist()]
    return found


def machine():
    """What decides which kernels compute, and so the last bits."""
    wanted = ("vendor_id", "cpu family", "model", "flags")
    lines = (
        line.partition(":")
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    cpu = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    known = [
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        sorted(cpu.items()),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def untimed(history):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in history]


def command(line, settings=None):
    more = [
        part
        for key, value in (settings or {}).items()
        for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    assert main([*line.split(), *more]) == 0


def write_runs():
    small = {"model.name": "tiny", "data.train_size": 600, "epochs": 3}
    stages = {"stages.tune.trials": 2, "stages.promote.top": 1, "stages.autoattack.n": 10}
    last = "runs/train/epoch-0003"
    command("tune gairat --trials 3 --name sweep --cpus-per-trial 1", SMALL | {"epochs": 5})
    command("train lrat --name train", SMALL)
    command(f"eval {last} --attack pgd20 --n 12 --keep-adversarial")
    command(f"eval {last} --attack pgd20 --n 10 --bundle bundle")
    command("run digits", SHRUNK | small | stages)
    np.savez("images.npz", x=load(DataSpec()).test.x[:6].numpy())
    command(f"eval {last} --pseudo-label images.npz")
    # A network that holds out against some attacks.
    longer = {
        "epochs": 12,
        "data.train_size": 600,
        "data.val_size": 50,
        "batch_size": 32,
        "model.name": "tiny",
    }
    robust = longer | {"method.attacks.pgd.eps": 0.1, "validation.*.steps": 2}
    fit(run_config("at", robust), OUT / "runs" / "robust")
    # A run that was told to end in the middle of its second epoch.
    asked = iter([*[False] * 21, True])  # of 19 steps an epoch
    with suppress(Interrupted):
        fit(
            run_config("gairat", SMALL, {"*.burn_in": 1}),
            OUT / "runs" / "half",
            interrupted=lambda: next(asked),
        )
    assert (OUT / "runs" / "half" / "half").is_dir()


def keep():
    """Copies what readers need: no locks, prefixes, HTML, nor Ray's own files, which nothing reads."""
    left_out = ("lock", ".*", "report.html", "ray")
    for name in ("runs", "bundle"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(OUT / name, HERE / name, ignore=shutil.ignore_patterns(*left_out))
    shutil.copy2(OUT / "images-labelled.npz", HERE)


def sixteen():
    split = load(DataSpec(name="digits", val_size=50)).test
    rows = slice(0, 16)
    return split.images(rows), split.y[rows]


def trainings():
    found = {}
    for name in ("gairat", "lrat", "mart"):
        changes = {"*.burn_in": 1} if name == "gairat" else {}
        config = run_config(name, TINY, changes, {"seed": 0})
        fitted = fit(config, OUT / "numbers" / name)
        model = fitted.last.load_model(config.model.build(1, 10, 0))
        found[name] = {
            "settings": TINY | changes | {"seed": 0},
            "digest": config.digest(),
            "sha256": sha_of_state(model),
            "weights": sketch(model),
            "history": untimed(fitted.last.history),
        }
    shutil.copytree(HERE / "runs" / "half", OUT / "numbers" / "half")
    config = run_config("gairat", SMALL, {"*.burn_in": 1})
    fitted = fit(config, OUT / "numbers" / "half")
    model = fitted.last.load_model(config.model.build(1, 10, 0))
    found["half"] = {
        "sha256": sha_of_state(model),
        "weights": sketch(model),
        "history": untimed(fitted.last.history),
    }
    return found


def first_steps():
    """The loss of one step of every method, on the same batch and the initial weights of one seed."""
    data = load(DataSpec(name="digits", val_size=50, train_size=64))
    x, y, index = data.train.images(slice(0, 32)), data.train.y[:32], data.train.index[:32]
    found = {}
    for name in METHODS:
        config = run_config(name, {"*.attacks.*.steps": 3}).at(7)
        model = config.model.build(1, 10, 0)
        step = config.method(model, x, y, Rng.for_examples(index, 0))
        weights = {key: float(value.double().sum()) for key, value in step.weights.items()}
        found[name] = {"loss": float(step.loss.detach()), "weights": weights}
    return found


def attacked():
    model, (x, y) = raysweep.load(HERE / "runs" / "robust"), sixteen()
    rng = Rng.for_examples(torch.arange(16), 0)
    found = {}
    for name, data in SINGLE.items():
        result = TypeAdapter(AnyAttack).validate_python(data)(model, x, y, rng.stream(name))
        found[name] = {
            "settings": data,
            "broken": (model(result.x).argmax(1) != y).int().tolist(),
            "queries": result.queries.tolist(),
            "kappa": None if result.kappa is None else result.kappa.tolist(),
            "sum": float(result.x.double().sum()),
        }
    return found


def evaluated():
    model, (x, y) = raysweep.load(HERE / "runs" / "robust"), sixteen()
    asked = {
        "standard": {"eps": 0.1},
        "standard-L2": {"eps": 0.6, "norm": "L2"},
        "plus": {"eps": 0.1, "version": "plus"},
        "rand": {"eps": 0.1, "version": "rand"},
    }
    found = {}
    for name, options in asked.items():
        report = raysweep.evaluate(model, x, y, attack="autoattack", **options)
        found[name] = {
            "options": options,
            "robust": report.robust.tolist(),
            "broken_by": [str(by) for by in report.broken_by],
            "margin_before": report.margin_before.tolist(),
            "margin_after": report.margin_after.tolist(),
            "queries": report.queries.tolist(),
            "is_autoattack": report.is_autoattack,
            "columns": list(report.columns()),
            "summary": list(report.summary()),
            "card": list(report.card()),
        }
    return found


def digests():
    """In the root folder, for a preset's relative paths are made absolute."""
    os.chdir("/")
    shrunk = {}
    papers = sorted(path.stem for path in (shipped("pipelines") / "paper").glob("*.yaml"))
    for name in pipelines():
        _, pipeline, settings = load_pipeline(name, SHRUNK)
        shrunk[name] = [step.digest for step in steps(pipeline, settings, OUT, "")]
    found = {
        "methods": {name: run_config(name).digest() for name in METHODS},
        "presets": {name: run_config(*preset(name)).digest() for name in presets()},
        "spaces": {name: load_space(name, {}).digest() for name in spaces()},
        "pipelines": {name: load_pipeline(name, {})[1].digest() for name in pipelines()},
        "steps of shrunk pipelines": shrunk,
        "papers": {name: paper_table(name).digest() for name in papers},
    }
    os.chdir(OUT)
    return found


def architectures():
    """Of every network: names and shapes of its weights, and what is printed of it, which names
    shards.
    """
    found = {}
    for name in MODELS:
        if name == "tiny":
            continue
        with torch.device("meta"):
            model = MODELS[name](3, 10)
        listed = [[key, list(value.shape)] for key, value in model.state_dict().items()]
        found[name] = {
            "weights": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16],
            "printed": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        }
    return found


def read_back():
    """What this code reads in the files that it has written, and in those written by hand."""
    sweep = load_sweep(HERE / "runs" / "sweep")
    table, epochs = sweep.trials, sweep.epochs
    checkpoints = {}
    for meta in sorted(HERE.rglob("meta.json")):
        saved = read(meta.parent)
        checkpoints[meta.parent.relative_to(HERE).as_posix()] = {
            "digest": saved.config.digest(),
            "epoch": saved.epoch,
            "metrics": saved.metrics,
            "weights": sha_of_state(saved.load_model(saved.config.model.build(1, 10, 0))),
        }
    reports = {}
    for file in sorted(HERE.rglob("examples.parquet")):
        frame = load_report(file)
        reports[file.relative_to(HERE).as_posix()] = {
            "attrs": frame.attrs,
            "columns": {
                key: frame[key].astype(object).where(frame[key].notna(), None).tolist()
                for key in frame
            },
        }
    os.chdir(HERE / "yaml")
    yaml = {}
    for name in ("space", "front", "grid"):
        space = load_space("", {}, Path(f"{name}.yaml"))
        yaml[name] = {
            "digest": space.digest(),
            "space": space.json_dict(),
            "queue": space.queue,
            "total": space.total,
        }
    yaml["space for svhn"] = {
        "digest": load_space("", {"data.name": "svhn"}, Path("space.yaml")).digest()
    }
    for name in ("method", "extends"):
        config = resolve(f"{name}.yaml", {})
        yaml[name] = {"digest": config.digest(), "config": config.json_dict()}
    _, pipeline, settings = load_pipeline("pipeline.yaml", {})
    yaml["pipeline"] = {
        "digest": pipeline.digest(),
        "pipeline": pipeline.json_dict(),
        "configs": [
            [config.digest() for config in stage.configs(settings, before)]
            for stage, before in pipeline.planned(settings)
        ],
    }
    os.chdir(OUT)
    return {
        "sweep": {
            "space": sweep.ledger.space.digest(),
            "key": sweep.ledger.key,
            "ranked": [trial.number for trial in sweep.ledger.ranked()],
            "trials": {
                str(t.number): [t.settings, t.state, t.epoch, t.best, t.curve]
                for t in sweep.ledger.trials()
            },
            "columns": list(table.columns),
            "epochs": list(epochs.columns),
            "best": sweep.best.relative_to(HERE).as_posix(),
            "advice": sweep.advice(0),
        },
        "artifacts": {
            file.parent.relative_to(HERE).as_posix(): Artifact.read(file.parent).json_dict()
            for file in sorted(HERE.rglob("artifact.json"))
        },
        "checkpoints": checkpoints,
        "reports": reports,
        "yaml": yaml,
        "tags in MLflow": {
            "train": train_tags(Run(HERE / "runs" / "train")),
            "trial": run_tags(read(sweep.best)),
        },
    }


def covered():
    """Raises AssertionError unless the files of `yaml/` use every setting that there is."""
    used: dict[type, set[str]] = {}

    def look(value):
        if isinstance(value, Spec):
            used.setdefault(type(value), set()).update(value.model_fields_set)
            for name in type(value).model_fields:
                look(getattr(value, name))
        elif isinstance(value, dict):
            [look(part) for part in value.values()]
        elif isinstance(value, list | tuple):
            [look(part) for part in value]

    paths: set[str] = set()
    for file in sorted((HERE / "yaml").glob("*.yaml")):
        data = read_yaml(file)
        if "stages" in data:
            look(Pipeline.load(data))
        elif "space" in data:
            paths |= set(data.get("base", {}))
            data.pop("for", None)
            look(SearchSpace.load(data))
        elif "method" in data:
            look(RunConfig.load({"method": data["method"]}).method)
            paths |= set(data)
            number = TypeAdapter(RunConfig.model_fields["optim"].annotation)
            for key in ("lr", "weight_decay"):
                look(number.validate_python({key: data[f"optim.{key}"]}))
    for path in paths:
        part, where = RunConfig, path.split(".")
        for name in where:
            used.setdefault(part, set()).add(name)
            part = part.model_fields[name].annotation if name in part.model_fields else None
            if not (isinstance(part, type) and issubclass(part, Spec)):
                break

    def classes(base):
        for one in base.__subclasses__():
            yield one
            yield from classes(one)

    inside = (
        "Candidate",
        "Judgement",
        "Artifact",
        "Value",
        "Protocol",
        "PaperTable",
        "Stage",
        "Varying",
    )
    for one in set(classes(Spec)):
        if one.__name__ not in inside and not one.__name__.startswith("_"):
            assert (lack := set(one.model_fields) - used.get(one, set())) == set(), (
                one.__name__,
                lack,
            )


if __name__ == "__main__":
    revision = str(environment()["git_revision"])
    assert revision == "d5c5dbc" + revision[7:] and not revision.endswith("-dirty"), revision
    covered()
    if "--numbers" not in sys.argv:
        write_runs()
        keep()
    expected = {
        "revision": revision,
        "versions": {name: environment()[name] for name in ("torch", "numpy")},
        "machine": machine(),
        "trainings": trainings(),
        "first steps": first_steps(),
        "attacks": attacked(),
        "evaluations": evaluated(),
        "digests": digests(),
        "architectures": architectures(),
        "read back": read_back(),
        "presets of attacks": list(ATTACKS),
    }
    target = OUT / "expected.json" if "--numbers" in sys.argv else HERE / "expected.json"
    target.write_text(
        json.dumps(expected, indent=None, separators=(",", ":"), sort_keys=True, default=str) + "\n"
    )
