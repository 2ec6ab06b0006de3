"""kill -9 in every stage of a pipeline, while it works and while it writes: finished work stays,
the rest resumes.
"""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import forked_processes
import psutil
import pytest
import ray
from conftest import draw_nothing
from forked_processes import ForkedProcess

from raysweep.logs import read_log
from raysweep.pipeline.artifact import ARTIFACT_FILE, Artifact
from raysweep.sweep.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STAGES = ["tune", "train", "promote", "autoattack", "register", "report"]
PIPELINE = """\
set: {epochs: 2, data.val_size: 50, data.train_size: 64, batch_size: 32, "*.attacks.*.steps": 2,
      "validation.finish.*.steps": 1, "validation.finish.*.runs": 1}
stages:
  - {kind: tune, space: at, trials: 1, set: {finalists: 0}}
  - {kind: train, runs: {AT: {method: at}}, seeds: [3]}
  - {kind: promote, top: 1, seeds: [4], set: {batch_size: 16}}
  - {kind: autoattack, attacks: {PGD: pgd20, APGD: apgd-ce}, n: 20, batch_size: 10}
  - {kind: register, name: killed}
  - {kind: report}
"""
_MARK = "RAYSWEEP_TEST_OF_KILLS"


def _die(*args: object, **more: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_an_epoch(_: object, trial: object, metrics: object) -> None:
    if metrics is not None:
        _die()


def _arm(stage: str, when: str) -> None:
    """Let this process die in `stage`: amid its work, or when half of its artifact is written."""
    from raysweep.pipeline import autoattack, pipeline, promote, register, train, tune
    from raysweep.pipeline.report import contents
    from raysweep.pipeline.report.stage import ReportStage
    from raysweep.terminal import SweepDisplay
    from raysweep.tracking import Tracker

    write = Artifact.write

    def die_halfway(
        self: Artifact, folder: Path, write_files: Callable[[Path], None] | None = None
    ) -> None:
        def then_die(partial: Path) -> None:
            if write_files is not None:
                write_files(partial)
            (partial / ARTIFACT_FILE).write_text('{"kind": "')
            _die()

        write(self, folder, then_die if self.kind == stage else write_files)

    if when == "writing":
        pipeline.Artifact.write = die_halfway
        return
    sweeps = (SweepDisplay, "on_trial_update", _after_an_epoch)
    owners = {
        "tune": (tune.TuneStage, sweeps),
        "train": (train.TrainStage, sweeps),
        "promote": (promote.PromoteStage, sweeps),
        "autoattack": (autoattack.AutoAttackStage, (autoattack, "save_evaluation_files", _die)),
        "register": (register.RegisterStage, (Tracker, "set_model_alias", _die)),
        "report": (ReportStage, (contents, "draw_training_figures", _die)),
    }
    kind, (owner, name, deadly) = owners[stage]
    run_stage = kind.run_stage

    def armed(self, context, upstream):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*_attribute(owner, name), deadly)
            return run_stage(self, context, upstream)

    kind.run_stage = armed


def _attribute(owner: object, dotted: str) -> tuple[object, str]:
    *path, last = dotted.split(".")
    for name in path:
        owner = getattr(owner, name)
    return owner, last


def _drive(stage: str | None, when: str) -> int:
    """`raysweep run killed.yaml` in a process of its own."""
    from raysweep.cli import main
    from raysweep.text_figure import TextFigure

    TextFigure.draw = draw_nothing
    if (stage, when) != ("autoattack", "working"):
        # One run spreads its attacks over processes of its own, which must end with it.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if stage is not None:
        _arm(stage, when)
    return main(["run", "killed.yaml"])


@pytest.fixture
def folder(ray_cluster, empty_store, tmp_path: Path) -> Path:
    empty_store(tmp_path / "mlflow.db")
    (tmp_path / "killed.yaml").write_text(PIPELINE)
    return tmp_path


def run(folder: Path, stage: str | None = None, when: str = "") -> ForkedProcess:
    """Run the pipeline to its end, or kill it at `stage` and `when`; check that no process it
    started is left.
    """
    environment = {_MARK: str(folder)}
    if stage in ("tune", "train", "promote"):
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    process = forked_processes.start_function(
        _drive,
        stage,
        when,
        folder=folder,
        environment=environment,
        imports=forked_processes.COMMANDS,
    )
    process.wait()
    assert not psutil.wait_procs(_started_by(folder), timeout=600)[1], (
        "workers outlive their driver"
    )
    return process


def _started_by(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == str(folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def artifacts(folder: Path) -> dict[str, Artifact]:
    """Every artifact under its proper name is whole."""
    found = sorted((folder / "runs" / "pipelines" / "killed").glob("[0-9]*"))
    return {path.name[3:-17]: Artifact.read_if_finished(path) for path in found}


def done(folder: Path) -> dict[Path, int]:
    """When each file was written that belongs to a finished stage: its artifact, its trials."""
    paths = list((folder / "runs" / "pipelines" / "killed").glob("[0-9]*/*"))
    for artifact in artifacts(folder).values():
        for sweep in artifact.facts.get("sweeps", []):
            paths += (folder / sweep["path"]).glob("trials/*/trial.json")
    return {path: path.stat().st_mtime_ns for path in paths}


def kill(folder: Path, stage: str, when: str) -> None:
    """Kill a run in `stage`, and check what it leaves."""
    before, shards = (
        done(folder),
        {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/shards/*/*.npz")},
    )
    assert bool(shards) == (
        STAGES.index(stage) > 3 or (stage, when) == ("autoattack", "writing")
    ), "attacks are stage 3"
    process = run(folder, stage, when)
    assert process.poll() == -signal.SIGKILL, f"{stage}, {when}: {process.err}"
    assert list(artifacts(folder)) == STAGES[: STAGES.index(stage)], (
        "all before it, whole; of itself nothing"
    )
    after = done(folder)
    assert {path: after[path] for path in before} == before, "what was finished was left alone"
    assert all(path.stat().st_mtime_ns == then for path, then in shards.items()), "no attack again"


def check_log(pipeline_folder: Path) -> None:
    """Every start is there, the end of the only run that was not killed, and why stages ran."""
    entries = read_log(pipeline_folder)
    starts = [index for index, entry in enumerate(entries) if entry.get("event") == "start"]
    assert len(starts) == 2 * len(STAGES) + 1
    assert [entry["exit_code"] for entry in entries if entry.get("event") == "end"] == [0]
    last = [entry for entry in entries[starts[-1] :] if entry.get("event") == "stage_start"]
    assert [entry["kind"] for entry in last] == STAGES
    assert [entry["is_from_artifact"] for entry in last] == [True] * 5 + [False]
    ran = [entry["kind"] for entry in entries if entry.get("event") == "stage_end"]
    assert ran == STAGES, "each was finished once"
    halves = [entry for entry in entries if entry["message"].startswith("deleted half")]
    assert len(halves) == len(STAGES) and {entry["level"] for entry in halves} == {"WARNING"}


def test_a_run_that_is_killed_at_every_point_has_everything_once_in_the_end(folder: Path) -> None:
    """Each run carries on where the one before it was killed."""
    for stage, when in itertools.product(STAGES, ["working", "writing"]):
        kill(folder, stage, when)
    last = run(folder)
    assert last.poll() == 0, last.err
    found = artifacts(folder)
    assert list(found) == STAGES
    assert not list((folder / "runs" / "pipelines" / "killed").glob(".[0-9]*")), (
        "halves are swept up"
    )
    check_log(folder / "runs" / "pipelines" / "killed")
    sweeps = [sweep for artifact in found.values() for sweep in artifact.facts.get("sweeps", [])]
    ledgers = [Ledger.open(folder / sweep["path"]) for sweep in sweeps]
    for ledger in ledgers:
        assert all([epoch for epoch, _ in trial.curve] == [1, 2] for trial in ledger.load_trials())

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    trials = [
        f"{trial.number:04d} {ledger.name}" for ledger in ledgers for trial in ledger.load_trials()
    ]
    names = [*(ledger.name for ledger in ledgers), *trials, "killed report"]
    assert sorted(one.info.run_name for one in runs) == sorted(names)
    assert {one.info.status for one in runs} == {"FINISHED"}
    for one in runs:
        if one.info.run_name in trials:
            history = client.get_metric_history(one.info.run_id, "robust_worst")
            assert sorted({point.step for point in history}) == [1, 2]
            assert len({(point.step, point.value) for point in history}) == 2, (
                "an epoch has one value"
            )
    (version,) = client.search_model_versions("name='killed'")
    assert client.get_registered_model("killed").aliases == {"candidate": version.version}
