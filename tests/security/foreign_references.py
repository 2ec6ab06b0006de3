"""Paths and settings in files of others that lead elsewhere (point 6)."""

import json
import os
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from attack_table import attack, refusal_of
from conftest import tiny
from rich.console import Console

from raysweep import load
from raysweep.cli import build_parser
from raysweep.commands.tune import TuneRequest, _load_checked_space, _load_dataset
from raysweep.data import DataSpec, load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.data.dataset_loaders import DATASET_LOADERS
from raysweep.pipeline.pipeline import load_pipeline
from raysweep.pipeline.stage import StageContext, TrainingOverrides
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.training.checkpoint import TrainingState, save_checkpoint


def write_checkpoint(folder: Path, data: dict[str, object]) -> Path:
    """Write a checkpoint whose data settings are an attacker's."""
    config = tiny("at")
    model = config.model.build_model(1, 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    path = folder / "epoch-0001"
    save_checkpoint(
        path, config, TrainingState.copy_from(model, optimizer), [{"epoch": 1.0}], "0" * 16
    )
    change_meta(path, {}, data)
    return path


def change_meta(
    path: Path, changes: dict[str, object], data: dict[str, object] | None = None
) -> None:
    """Change what a checkpoint says of itself, and its data settings."""
    meta = json.loads((path / "meta.json").read_text()) | changes
    meta["config"]["data"] |= data or {}
    (path / "meta.json").write_text(json.dumps(meta))


class Downloads:
    """Records what data sets are asked for, in place of the network."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path | None, bool]] = []

    def __call__(self, data_dir: Path | None, download: bool) -> object:
        self.calls.append((data_dir, download))
        if download and data_dir is not None:
            data_dir.mkdir(parents=True)
        raise SpecError("there are no such files")


def without_network(loader: Downloads) -> AbstractContextManager[object]:
    return patch.dict(DATASET_LOADERS, {"cifar10": loader})


@attack(
    6, "a checkpoint with data_dir elsewhere and download: true", "folders made, download begun"
)
def checkpoint_that_downloads(folder: Path) -> str:
    victim = folder / "victim"
    data = {"name": "cifar10", "data_dir": str(victim / "new"), "download": True}
    path, loader = write_checkpoint(folder, data), Downloads()
    with without_network(loader):
        line = refusal_of(lambda: load(path))
    assert not victim.exists() and not loader.calls
    return line


@attack(6, "a checkpoint whose data are read in a pipe or a device")
def checkpoint_that_reads_elsewhere(folder: Path) -> str:
    path = write_checkpoint(folder, {"name": "arrays", "data_dir": "/dev"})
    return refusal_of(lambda: load(path))


@attack(6, "a checkpoint with a file of unlabelled images elsewhere")
def checkpoint_with_unlabelled_images(folder: Path) -> str:
    images = folder / "images.npz"
    os.mkfifo(images)
    path = write_checkpoint(folder, {"unlabeled": str(images)})
    change_meta(path, {"data_fingerprint": load_data(tiny("at").data).fingerprint})
    load(path)
    return "not read"


@attack(6, "a sweep with download: true that is resumed")
def sweep_that_downloads(folder: Path) -> str:
    victim = folder / "victim"
    base = {"data.name": "cifar10", "data.data_dir": str(victim / "new"), "data.download": True}
    content = {"method": "at", "base": base, "space": {"optim.lr": {"float": [0.01, 0.5]}}}
    Ledger.create(folder / "runs/s", SearchSpace.from_data(content))
    arguments = ["tune", "--resume", "s", "--out", str(folder)]
    request = TuneRequest.from_args(build_parser().parse_args(arguments))
    loader = Downloads()
    with without_network(loader):
        ledger = Ledger.open(folder / "runs/s")
        space = _load_checked_space(request, ledger)
        refusal_of(lambda: _load_dataset(request, space, ledger))
    assert not victim.exists() and not any(download for _, download in loader.calls)
    return "looked for the folder, made none, loaded nothing down"


@attack(6, "trials of a resumed sweep with download: true, on a node that lacks the data")
def trial_that_downloads(folder: Path) -> str:
    """The driver has the data, and did not say that anything may be downloaded."""
    victim = folder / "victim"
    data = DataSpec(name="cifar10", data_dir=victim / "new", download=True)
    drivers = CachedDataset(data.replace(download=False), "0" * 16)
    loader = Downloads()
    with without_network(loader):
        for spec in (data, data.replace(val_size=99), data.replace(data_dir=victim / "other")):
            refusal_of(lambda spec=spec: drivers.load_shared(spec))
    assert not victim.exists() and len(loader.calls) == 3
    assert not any(download for _, download in loader.calls)
    return "looked for the folder, made none, loaded nothing down"


def make_context(folder: Path) -> StageContext:
    out = folder / "out"
    out.mkdir()
    context = StageContext(
        "p",
        out,
        out / "runs/pipelines/p",
        open_path(out / "runs"),
        TrainingOverrides({}, {}),
        Console(),
        None,
        ExitStack(),
    )
    context.storage = open_path(folder / "storage")
    return context


OUTSIDE = (
    *("../victim", "runs/../../victim", "runs/..", "/etc", "~/.ssh", "a/./b", "a//b", "..", "."),
    *("s3://stranger/x", "s3://bucket/../x", "gs://stranger/x", "file:///etc", "//host/x", "a\0b"),
    *("runs/link/x", "link/x", "linked-folder/x"),
)


@attack(6, "artifact.json that refers to '..', absolute paths, buckets and links", "followed")
def references_that_lead_out(folder: Path) -> str:
    context = make_context(folder)
    (folder / "victim").mkdir()
    (context.out / "runs").mkdir()
    for name in ("runs/link", "link", "linked-folder"):
        (context.out / name).symlink_to(folder / "victim")
    followed = []
    for reference in OUTSIDE:
        try:
            path = context.resolve_reference(reference)
            local = path.working_path
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        if not local.resolve().is_relative_to(context.out.resolve()):
            followed.append(reference)
    assert not followed, followed
    return f"none of {len(OUTSIDE)} references leads out of --out and the storage"


@attack(6, "artifact.json that refers to a folder beside the storage, whose name begins alike")
def reference_beside_the_storage(folder: Path) -> str:
    context = make_context(folder)
    inside = folder / "storage/s/epoch-0001"
    assert context.resolve_reference(str(inside)).local_path == inside
    return refusal_of(lambda: context.resolve_reference(f"{folder}/storage-of-others/s"))


@attack(6, "pipeline files that are called ...yaml, .yaml, ..yml", "the pipeline was called ..")
def pipeline_called_dots(folder: Path) -> str:
    for name in ("...yaml", "..yml", ".yaml", " .yaml", "-\n.yaml"):
        file = folder / name
        file.write_text("stages: [{kind: train, rows: []}]")
        line = refusal_of(lambda file=file: load_pipeline(str(file), {}))
    return line
