"""Files that the first version wrote can be read, and its numbers come out again.

`data/written_by_0_1` says what there is. Digests, verdicts and names are compared exactly. Weights
are compared bit for bit on the kind of machine that made them (see `machine`), and elsewhere up to
`TOLERANCE`: other CPUs add in another order, and the sign of a gradient near zero turns with it.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

import raysweep
from raysweep.attacks import ATTACK_DESCRIPTIONS, AnyAttack
from raysweep.catalog import METHODS
from raysweep.checkpoint_evaluation import choose_evaluation_folder, evaluate_checkpoint
from raysweep.data import DataSpec, load_data
from raysweep.data.unlabeled import read_unlabeled_file as read_unlabeled
from raysweep.evaluation.shards import ShardRunner
from raysweep.models import MODELS
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.pipeline.paired_comparison import compare_shared_examples
from raysweep.pipeline.pipeline import load_pipeline, plan_stages
from raysweep.pipeline.published_results import PaperTable, load_paper_table
from raysweep.result_loading import load_report, load_sweep
from raysweep.rng import ExampleRng
from raysweep.robustness_bundle import verify_bundle
from raysweep.spec import find_builtin_folder
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, list_builtin_spaces, load_space
from raysweep.training import config as config_module
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory, read_checkpoint
from raysweep.training.config import (
    TrainingConfig,
    build_training_config,
    build_training_config_of_0_1,
)
from raysweep.training.diagnostics import read_histograms
from raysweep.training.model_loading import load_checkpoint_target
from raysweep.training.presets import list_presets, load_preset, resolve_training_config
from raysweep.training.trainer import check_resumable, train_model
from raysweep.yaml_files import read_yaml

DATA = Path(__file__).parent / "data" / "written_by_0_1"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
READ: dict[str, Any] = EXPECTED["read back"]
TOLERANCE = 1e-5
SHRUNK: dict[str, Any] = {
    "data.name": "digits",
    "data.unlabeled": None,
    "data.train_size": 64,
    "data.val_size": 50,
    "model.name": "digits_cnn",
    "epochs": 2,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
}
SMALL: dict[str, Any] = {
    "epochs": 3,
    "data.train_size": 600,
    "data.val_size": 50,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
    "validation.finish.apgd_t.steps": 2,
    "model.name": "tiny",
}

# Presets that changed on purpose: names -> settings with which they are those of 0.1 again.
# "At epoch 60" is the 60th epoch in the code of GAIRAT, TRADES and MART; in 0.1 it was the 61st.
_G_DROPS = {"optim.lr.boundaries": [30, 60]}
_L_DROPS = {"optim.lr.boundaries": [60, 90]}
_L_BURN_IN = {"method.terms.pgd.weight.burn_in": 60}
_MAIL = {
    "epochs": 100,
    "optim.lr": {"boundaries": [75, 90], "values": [0.01, 0.001, 0.0001]},
    "validation.attacks.*.step_size": 0.00775,
}
CHANGED_PRESETS: dict[str, dict[str, Any]] = {
    "gairat-fig4*": _G_DROPS,
    "gairat-fig1[024567]*": _G_DROPS,
    "gairat-fig13": _G_DROPS,
    "gairat-fig18*": _G_DROPS,
    "gairat-table1": {"optim.lr.boundaries": [60, 90, 110]},
    "gairat-table1-*at": {"optim.lr.boundaries": [60, 90, 110]},
    "gairat-table2*": {"optim.lr.boundaries": [75, 90]},
    "gairat-fig19*": {"optim.lr.boundaries": [75, 90, 100]},
    "gairat-fig20": {"optim.lr.boundaries": [75, 90, 100]},
    # "From Epoch 75 onward".
    "gairat-fig19": {"method.terms.pgd.weight.burn_in": 75},
    "gairat-fig2[0]": {"method.terms.kl.weight.burn_in": 75},
    # One radius in a validation, and the settings of MMA's code.
    "gairat-fig19-mma": {
        "optim.lr.boundaries": [51, 77, 102],
        "optim.weight_decay": 0.0005,
        "method.attacks.minimal.loss": "ce",
        "method.attacks.minimal.search_factor": 1.0,
        "validation.finish.apgd_t.eps": 8 / 255,
    },
    # Rice et al. change these rates after every step.
    "gairat-fig11-[cl]*": {"optim.lr_per_step": False},
    # The 100th epoch is the first with weights in the code.
    "gairat-table3": {"method.terms.kl.weight.burn_in": 100},
    "gairat-table3-official": {"method.terms.kl.weight.burn_in": 100},
    "lrat-*": _L_DROPS,
    # The table is read after 60 epochs.
    "lrat-table[15]*-gairat": _L_BURN_IN,
    "lrat-fig5": _L_BURN_IN,
    "lrat-table2*-gair-trades": {"method.terms.natural.weight.burn_in": 60},
    # L section 5.2: a random start in training.
    "lrat-table2*-*trades": {"method.attacks.kl.start": "gaussian"},
    # A row at chance has a number.
    "lrat-table2*-literal": {"collapse_after": 20},
    # The authors' code: 120 epochs, counted from 0, and weights after epoch 75.
    "mail-at-official": {**_MAIL, "method.terms.pgd.weight.burn_in": 75},
    "mail-mart-official": {**_MAIL, "method.terms.pgd.weight.burn_in": 75},
    "mail-trades-official": {**_MAIL, "method.terms.kl.weight.burn_in": 75},
}
# Tables with rows, notes or radii that 0.1 did not have: beside LRAT the reading of eq. 5 and of
# table 3, beside LRAT-TRADES the literal algorithm 4; for GAIR-RST the last epoch and rows for
# reference; rows whose best epoch is chosen on the test images.
CHANGED_TABLES = {
    *(f"gairat-table{number}" for number in (1, 2, 3)),
    *(f"lrat-table{number}" for number in (1, 2, 4, 5)),
}


def table_of_0_1(name: str) -> PaperTable:
    """A table without what 0.1 did not have."""
    table = load_paper_table(name)
    parts = {
        part: {
            row: value
            for row, value in getattr(table, part).items()
            if " (" not in row and "literal" not in row
        }
        for part in ("rows", "models", "epochs")
    }
    notes = list(table.notes)
    if name == "lrat-table1":
        # Now a note of its row.
        (slip,) = table.row_notes["GAIRAT WRN"]
        notes.insert(1, f"GAIRAT WRN: {slip}.")
    return table.replace(**parts, notes=tuple(notes), row_notes={})


def settings_of_0_1(preset: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pattern, changes in CHANGED_PRESETS.items():
        if fnmatch(preset, pattern):
            settings |= changes
    return settings


def tiny(channels: int, classes: int) -> nn.Module:
    """The network of the files."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


# Tests of what keeps its objective although the default is another one now.
KEEP_THEIR_OBJECTIVE = (
    "test_a_sweep", "test_a_training_run_is", "test_digests_of_stages", "test_a_pipeline_that"
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_then(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The files' network is known, the default objective is that of 0.1, one thread computes."""
    monkeypatch.setitem(MODELS, "tiny", tiny)
    if not request.node.name.startswith(KEEP_THEIR_OBJECTIVE):
        monkeypatch.setattr(config_module, "find_objective_defaults", lambda changes: {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A copy of the files, which readers may write into."""
    shutil.copytree(DATA, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def in_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA / "yaml")


@pytest.fixture
def spaces_of_0_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped search spaces with the settings of 0.1, of which later versions search others."""
    folders = {"search_spaces": DATA.parent / "search_spaces_of_0_1"}
    monkeypatch.setattr(
        "raysweep.sweep.search_space.find_builtin_folder",
        lambda name: folders.get(name) or find_builtin_folder(name),
    )


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in presets become absolute."""
    monkeypatch.chdir("/")


def machine_digest() -> str:
    """What decides which kernels compute, and so the last bits."""
    wanted = ("vendor_id", "cpu family", "model", "flags")
    file = Path("/proc/cpuinfo")
    first = file.read_text().split("\n\n")[0] if file.is_file() else ""
    lines = (line.partition(":") for line in first.splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    known = [
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        sorted(cpu.items()),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def same_machine() -> bool:
    return machine_digest() == EXPECTED["machine"] and os.environ.get("OMP_NUM_THREADS") == "1"


def sha_of_state(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_trained(
    model: nn.Module, history: list[dict[str, float]], expected: dict[str, Any]
) -> None:
    """Weights and metrics: to the last bit where that can be asked for."""
    state = {name: value.detach().double().flatten() for name, value in model.state_dict().items()}
    assert sorted(state) == sorted(expected["weights"])
    for name, (shape, total, norm, first) in expected["weights"].items():
        assert list(model.state_dict()[name].shape) == shape
        found = [
            float(state[name].sum()) / len(state[name]),
            float(state[name].norm()),
            *state[name][:8].tolist(),
        ]
        assert found == pytest.approx(
            [total / len(state[name]), norm, *first], rel=TOLERANCE, abs=TOLERANCE
        ), name
    rows = []
    for row in history:
        kept = {key: value for key, value in row.items() if "seconds" not in key}
        for name in ("val/chance_limit", "robust_margin"):
            kept.pop(name, None)  # 0.1 had none
        rows.append(kept)
    assert [list(row) for row in map(sorted, rows)] == [
        list(row) for row in map(sorted, expected["history"])
    ]
    for mine, theirs in zip(rows, expected["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    if same_machine():
        assert sha_of_state(model) == expected["sha256"]
        assert rows == expected["history"]


def first_sixteen_rows() -> tuple[torch.Tensor, torch.Tensor]:
    split = load_data(DataSpec(name="digits", val_size=50)).test
    return split.get_float_images(slice(0, 16)), split.y[:16]


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("what is there already was done again")


# What was written.


def test_a_sweep(out: Path) -> None:
    wanted = READ["sweep"]
    ledger = Ledger.open(out / "runs" / "sweep")
    assert ledger.key == wanted["key"] and isinstance(ledger.space, SearchSpace)
    assert ledger.space.digest() == wanted["space"]
    found = {
        str(t.number): [t.params, t.state, t.epoch, t.best, t.curve] for t in ledger.load_trials()
    }
    assert found == wanted["trials"]
    assert [trial.number for trial in ledger.rank_trials()] == wanted["ranked"]
    for trial in ledger.load_trials():
        assert read_checkpoint(
            ledger.best_checkpoint_path(trial)
        ).config == ledger.space.trial_config(trial.params)
        assert read_histograms(ledger.trial_path(trial.number)).keys() <= set(
            range(1, trial.epoch + 1)
        )
    sweep = load_sweep(out / "runs" / "sweep")
    assert [name for name in sweep.trials.columns if name != "choice"] == wanted[
        "columns"
    ] and list(sweep.epochs.columns) == wanted["epochs"]
    assert sweep.best == open_path(out / wanted["best"]), "the recorded best stands"
    assert sweep.trials.choice[0] == "best before its weights acted"
    assert any("reweighting made this worse" in line for line in sweep.advice(0))
    assert len(sweep.epochs) == sum(trial.epoch for trial in ledger.load_trials())
    assert raysweep.load(sweep.best)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_sweep_can_grow(out: Path) -> None:
    ledger = Ledger.open(out / "runs" / "sweep")
    ledger.extend_space(ledger.space.model_copy(update={"trials": 5}).with_overrides({"epochs": 7}))
    again = Ledger.open(out / "runs" / "sweep")
    assert again.space.n_trials == 5 and again.key == READ["sweep"]["key"]
    done = [
        trial
        for trial in again.load_trials()
        if READ["sweep"]["trials"][str(trial.number)][1] == "finished"
    ]
    assert done and all(trial.state == "running" for trial in done)


def test_a_sweep_as_a_study_of_optuna(out: Path) -> None:
    pytest.importorskip("optuna")
    from raysweep.sweep.optuna_study import build_study

    ledger = Ledger.open(out / "runs" / "sweep")
    found = build_study(ledger).trials
    assert [trial.values[0] for trial in found] == [
        t.score("robust_worst") for t in ledger.load_trials()
    ]


@pytest.mark.parametrize("place", sorted(READ["checkpoints"]))
def test_a_checkpoint(out: Path, place: str) -> None:
    wanted = READ["checkpoints"][place]
    saved = read_checkpoint(out / place)
    assert (saved.config.digest(), saved.epoch, saved.last_metrics) == (
        wanted["digest"],
        wanted["epoch"],
        wanted["metrics"],
    )
    assert saved.meta["digest"] == saved.config.digest() and len(saved.history) == saved.epoch
    assert sha_of_state(load_checkpoint_target(out / place, {}).model) == wanted["weights"]
    model = saved.config.model.build_model(1, 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saved.load_training_state(model, optimizer)
    assert sha_of_state(model) == wanted["weights"] and len(optimizer.state) == len(
        list(model.parameters())
    )


def test_a_training_run_is_gone_on_with(out: Path) -> None:
    """The same command goes on, with more epochs too, and trains nothing again."""
    run = RunDirectory(out / "runs" / "train")
    last = run.read_last_checkpoint()
    assert last is not None and last.epoch == 3
    check_resumable(last, resolve_training_config("lrat", SMALL), last.meta["data_fingerprint"])
    told: list[float] = []
    fitted = train_model(
        resolve_training_config("lrat", SMALL | {"epochs": 4}),
        run.path,
        FunctionCallback(lambda row, saved: told.append(row["epoch"])),
    )
    assert told == [1, 2, 3, 4] and fitted.last_checkpoint.history[:3] == last.history


def test_a_run_that_was_left_in_the_middle_of_an_epoch(out: Path) -> None:
    """It goes on after the steps that were done."""
    expected, stepped = EXPECTED["trainings"]["half"], []
    config = build_training_config("gairat", SMALL, {"*.burn_in": 1})
    fitted = train_model(
        config,
        out / "runs" / "half",
        FunctionCallback(on_step_end=lambda epoch, steps: stepped.append((epoch, steps))),
    )
    assert stepped[0] == (2, 4)
    check_trained(
        fitted.last_checkpoint.load_weights(config.model.build_model(1, 10, 0)),
        fitted.last_checkpoint.history,
        expected,
    )


@pytest.mark.parametrize("place", sorted(READ["artifacts"]))
def test_an_artifact_of_a_stage(out: Path, place: str) -> None:
    artifact = Artifact.read_if_finished(out / place)
    assert artifact is not None and artifact.to_stored_dict() == READ["artifacts"][place]
    assert place.endswith(f"-{artifact.kind}-{artifact.key}")
    for candidate in artifact.candidates:
        assert read_checkpoint(out / candidate.checkpoint).config.method.name == candidate.method
    for judgement in artifact.evaluations:
        assert load_report(out / judgement.folder).attrs["robust_accuracy"] == judgement.robust
    for reported in artifact.facts.get("sweeps", []):
        assert Ledger.open(out / reported["path"]).load_trials()


@pytest.mark.usefixtures("spaces_of_0_1")
def test_a_pipeline_that_was_run_has_nothing_to_do(out: Path) -> None:
    small = {"model.name": "tiny", "data.train_size": 600, "epochs": 3}
    stages = {"stages.tune.trials": 2, "stages.promote.top": 1, "stages.autoattack.n": 10}
    name, pipeline, settings = load_pipeline("digits", SHRUNK | small | stages)
    planned = plan_stages(
        pipeline, settings, out / "runs" / "pipelines" / name, pipeline.compute_rerun_key()
    )
    assert [step.folder.relative_to(out).as_posix() for step in planned] == sorted(
        READ["artifacts"]
    )


@pytest.mark.parametrize("place", sorted(READ["reports"]))
def test_the_examples_of_an_evaluation(out: Path, place: str) -> None:
    wanted = READ["reports"][place]
    frame = load_report(out / place)
    assert frame.attrs == wanted["attrs"]
    found = {
        key: frame[key].astype(object).where(frame[key].notna(), None).tolist() for key in frame
    }
    assert found == wanted["columns"]
    card = json.loads((out / place).with_name("card.json").read_text()) if "eval-" in place else {}
    assert not card or card["clean_acc"] == f"{100 * frame.attrs['clean_accuracy']:.2f}"


def test_two_files_of_examples_are_compared(out: Path) -> None:
    files = sorted((out / "runs" / "pipelines").rglob("examples.parquet"))
    test = compare_shared_examples(files[0], files[1])
    assert test is not None and (test.examples, test.gained, test.lost) == (10, 0, 0)


@pytest.mark.parametrize("count", [10, 12])
def test_an_evaluation_is_resumed_from_its_shards(
    out: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that it was in. Nobody has signed its results: adversarial examples are used
    again, and robust examples are attacked again.
    """
    from raysweep.attacks import build_named_attack as attack_preset

    subject = load_checkpoint_target(out / "runs" / "train" / "epoch-0003", {})
    assert subject.config is not None and subject.data is not None
    attack = attack_preset("pgd20", 0.15)
    folder = choose_evaluation_folder(out, subject, attack, subject.config.data, count)
    assert folder.is_dir()
    wanted = READ["reports"][(folder / "examples.parquet").relative_to(out).as_posix()]["columns"]
    n_attacked: list[int] = []
    attack_model = ShardRunner._generate_adversarial

    def count_rows(runner: ShardRunner, attack: Any, x: Any, y: Any, rng: Any) -> Any:
        n_attacked.append(len(x))
        return attack_model(runner, attack, x, y, rng)

    monkeypatch.setattr(ShardRunner, "_generate_adversarial", count_rows)
    report = evaluate_checkpoint(subject, subject.data, attack, count, folder, None)
    assert sum(n_attacked) == wanted["broken_by"].count(None)
    assert [str(by) or None for by in report.broken_by] == wanted["broken_by"]


def test_a_bundle(out: Path) -> None:
    shown = verify_bundle(out / "bundle")
    assert shown.problems == [] and shown.n_examples == 10 and shown.upper_bound == 0.5
    assert shown.subset == "first" and "no manifest.json" in shown.notes[0]


def test_labelled_images(out: Path) -> None:
    x, y = read_unlabeled(out / "images-labelled.npz")
    assert y is not None and np.array_equal(x, load_data(DataSpec()).test.x[:6].numpy())
    data = load_data(DataSpec(val_size=50, unlabeled=out / "images-labelled.npz"))
    assert data.unlabeled is not None and len(data.unlabeled) == 6


def test_runs_in_mlflow_are_found(out: Path) -> None:
    pytest.importorskip("mlflow")
    from raysweep.tracking import checkpoint_run_tags, training_run_tags

    tags = READ["tags in MLflow"]
    assert training_run_tags(RunDirectory(out / "runs" / "train")) == tags["train"]
    assert checkpoint_run_tags(read_checkpoint(out / READ["sweep"]["best"])) == tags["trial"]


# What people wrote.


def without_later_settings(space: SearchSpace) -> SearchSpace:
    """Leave out what a new sweep has beside its file: its finalists, runs of the base
    method, and its defaults.
    """
    return space.replace(dataset_defaults=None, finalists=None, base_runs=None, score_epochs=None)


@pytest.mark.usefixtures("in_yaml")
@pytest.mark.parametrize("name", ["space", "front", "grid"])
def test_a_file_of_a_search_space(name: str) -> None:
    wanted = READ["yaml"][name]
    space = load_space("", {}, Path(f"{name}.yaml"))
    # Only the method that is written out has other settings than in 0.1: those that it has.
    assert (space.dataset_defaults is not None) == (name == "front")
    as_then = without_later_settings(space)
    assert as_then.to_stored_dict() == wanted["space"] and as_then.digest() == wanted["digest"]
    assert (
        json.loads(json.dumps(space.initial_points)) == wanted["queue"]
        and space.n_trials == wanted["total"]
    )


@pytest.mark.usefixtures("in_yaml")
def test_the_section_for_a_data_set() -> None:
    found = without_later_settings(load_space("", {"data.name": "svhn"}, Path("space.yaml")))
    assert found.digest() == READ["yaml"]["space for svhn"]["digest"]


@pytest.mark.usefixtures("in_yaml")
@pytest.mark.parametrize("name", ["method", "extends"])
def test_a_file_of_a_method(name: str) -> None:
    content = read_yaml(Path(f"{name}.yaml"))
    if name == "method":
        # What is written in the file wins now over the defaults of the data set.
        config = build_training_config_of_0_1(content.pop("method"), content)
    else:
        # The preset that the file extends has changed, and `*.burn_in` of the file wins now over
        # the preset's path without `*`.
        undo = {"method.terms.pgd.weight.burn_in": 60} | settings_of_0_1("gairat-table1")
        config = resolve_training_config(f"{name}.yaml", undo)
    assert (
        config.to_stored_dict() == READ["yaml"][name]["config"]
        and config.digest() == READ["yaml"][name]["digest"]
    )


@pytest.mark.usefixtures("in_yaml")
def test_a_file_of_a_pipeline() -> None:
    wanted = READ["yaml"]["pipeline"]
    _, pipeline, settings = load_pipeline("pipeline.yaml", {})
    assert pipeline.to_stored_dict() == wanted["pipeline"] and pipeline.digest() == wanted["digest"]
    undo = {"epochs": 2, **settings_of_0_1("lrat-table5")}
    _, pipeline, settings = load_pipeline("pipeline.yaml", {"stages.train.runs.LRAT.set": undo})
    planned = pipeline.iter_stages_with_received_configs(settings)
    assert [
        [c.digest() for c in stage.list_training_configs(settings, before)]
        for stage, before in planned
    ] == wanted["configs"]


# Names of values: what differs here is trained, attacked or reported again.


def list_old_names(what: str) -> dict[str, Any]:
    """The things of a kind that there were, all of which there must still be."""
    found: dict[str, Any] = EXPECTED["digests"][what]
    known: dict[str, Any] = {
        "methods": METHODS,
        "presets": list_presets(),
        "spaces": list_builtin_spaces(),
        "pipelines": list_builtin_pipelines(),
    }
    assert set(found) <= set(known.get(what, found))
    return found


@pytest.mark.usefixtures("in_root")
def test_digests_of_methods_and_presets() -> None:
    assert {
        name: build_training_config(name).digest() for name in list_old_names("methods")
    } == list_old_names("methods")
    presets = list_old_names("presets")
    assert {
        name: build_training_config(*load_preset(name), settings_of_0_1(name)).digest()
        for name in presets
    } == presets
    for name in presets:
        is_unchanged = build_training_config(*load_preset(name)).digest() == presets[name]
        assert is_unchanged == (not settings_of_0_1(name)), name


@pytest.mark.usefixtures("in_root", "spaces_of_0_1")
def test_digests_of_spaces_pipelines_and_papers() -> None:
    assert {
        name: without_later_settings(load_space(name, {})).digest()
        for name in list_old_names("spaces")
    } == list_old_names("spaces")
    pipelines, papers = list_old_names("pipelines"), list_old_names("papers")
    loaded = {name: load_pipeline(name, {})[1] for name in pipelines}
    assert {name for name in pipelines if loaded[name].digest() != pipelines[name]} == {
        *(f"gairat-fig{number}" for number in range(11, 19)),
        *CHANGED_TABLES,
        # It says that it takes the first test images, which was the only way. Its stages' digests
        # are those of 0.1: see below.
        "digits",
    }
    assert {
        name for name in papers if load_paper_table(name).digest() != papers[name]
    } == CHANGED_TABLES
    for name in CHANGED_TABLES:
        table = load_paper_table(name)
        runs = loaded[name].stages[0].runs
        assert runs.keys() == table.rows.keys() == table.models.keys()
        if name != "gairat-table3":
            assert table_of_0_1(name).digest() == papers[name]


@pytest.mark.usefixtures("in_root", "spaces_of_0_1")
@pytest.mark.parametrize("name", sorted(EXPECTED["digests"]["steps of shrunk pipelines"]))
def test_digests_of_stages(name: str, tmp_path: Path) -> None:
    _, pipeline, settings = load_pipeline(name, SHRUNK)
    found = [step.stage_digest for step in plan_stages(pipeline, settings, tmp_path, "")]
    expected = EXPECTED["digests"]["steps of shrunk pipelines"][name]
    if name == "nightly":
        # `*.attacks.*.steps` fixes now what the space of AT searches.
        found, expected = found[1:3], expected[1:3]
    is_unchanged = found == expected
    # The rows of the papers' pipelines have presets that changed: see CHANGED_PRESETS.
    rows = [row for stage in pipeline.stages for row in getattr(stage, "runs", {}).values()]
    assert is_unchanged == (not any(settings_of_0_1(row.preset) for row in rows))


@pytest.mark.parametrize("name", sorted(EXPECTED["architectures"]))
def test_names_of_weights(name: str) -> None:
    """Weights go by these names; by what is printed of a network, shards of its evaluations."""
    with torch.device("meta"):
        model = MODELS[name](3, 10)
    listed = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert (
        hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        == EXPECTED["architectures"][name]["weights"]
    )
    printed = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    assert printed == EXPECTED["architectures"][name]["printed"], (
        "an evaluation that was interrupted starts again"
    )


# Numbers.


@pytest.mark.parametrize("name", ["gairat", "lrat", "mart"])
def test_training(name: str, tmp_path: Path) -> None:
    expected = EXPECTED["trainings"][name]
    config = build_training_config(name, expected["settings"])
    assert isinstance(config, TrainingConfig) and config.digest() == expected["digest"]
    fitted = train_model(config, tmp_path)
    check_trained(
        fitted.last_checkpoint.load_weights(config.model.build_model(1, 10, 0)),
        fitted.last_checkpoint.history,
        expected,
    )


@pytest.mark.parametrize("name", sorted(EXPECTED["first steps"]))
def test_a_step_of_each_method(name: str) -> None:
    data = load_data(DataSpec(name="digits", val_size=50, train_size=64))
    x, y, index = (
        data.train.get_float_images(slice(0, 32)),
        data.train.y[:32],
        data.train.index[:32],
    )
    config = build_training_config(name, {"*.attacks.*.steps": 3}).resolve_at(7)
    step = config.method(
        config.model.build_model(1, 10, 0), x, y, ExampleRng.for_examples(index, 0)
    )
    found = {
        "loss": float(step.loss.detach()),
        **{f"weight {key}": float(value.double().sum()) for key, value in step.weights.items()},
    }
    expected = EXPECTED["first steps"][name]
    wanted = {
        "loss": expected["loss"],
        **{f"weight {key}": value for key, value in expected["weights"].items()},
    }
    # Attacks that start next to the image see gradients of nearly zero, whose signs are those of
    # rounding.
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found == wanted or not same_machine()


@pytest.mark.parametrize("name", sorted(EXPECTED["attacks"]))
def test_attacks(name: str, out: Path) -> None:
    expected = EXPECTED["attacks"][name]
    model, (x, y) = raysweep.load(out / "runs" / "robust"), first_sixteen_rows()
    attack: Any = TypeAdapter(AnyAttack).validate_python(expected["settings"])
    found = attack(model, x, y, ExampleRng.for_examples(torch.arange(16), 0).derive_stream(name))
    assert (model(found.x_adv).argmax(1) != y).int().tolist() == expected["broken"]
    assert found.queries.tolist() == expected["queries"]
    assert (None if found.kappa is None else found.kappa.tolist()) == expected["kappa"]
    assert float(found.x_adv.double().sum()) == pytest.approx(expected["sum"], rel=1e-3)
    assert float(found.x_adv.double().sum()) == expected["sum"] or not same_machine()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished attacks: what several evaluations have in common is attacked once."""
    return tmp_path_factory.mktemp("attacked")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED["evaluations"]))
def test_autoattack(name: str, out: Path, attacked: Path) -> None:
    expected = EXPECTED["evaluations"][name]
    model, (x, y) = raysweep.load(out / "runs" / "robust"), first_sixteen_rows()
    report = raysweep.evaluate(
        model, x, y, attack="autoattack", resume_dir=attacked, **expected["options"]
    )
    assert report.robust.tolist() == expected["robust"]
    assert [str(by) for by in report.broken_by] == expected["broken_by"]
    assert report.is_autoattack == expected["is_autoattack"]
    assert report.margin_before.tolist() == pytest.approx(
        expected["margin_before"], rel=1e-4, abs=1e-4
    )
    # The worst point found is one of several about as bad, on another CPU another.
    assert report.margin_after.tolist() == pytest.approx(
        expected["margin_after"], rel=0.05, abs=0.05
    )
    if same_machine():
        assert report.margin_before.tolist() == expected["margin_before"]
        assert report.margin_after.tolist() == expected["margin_after"]
        assert report.queries.tolist() == expected["queries"]
    assert list(report.columns()) == expected["columns"]
    assert list(report.summary()) == expected["summary"] and list(report.card()) == expected["card"]


def test_attacks_that_have_a_name() -> None:
    assert set(EXPECTED["presets of attacks"]) <= set(ATTACK_DESCRIPTIONS)
