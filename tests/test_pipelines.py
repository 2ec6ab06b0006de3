"""Pipelines: the shipped ones are sound, stages run once, a killed run goes on, a regression is
noticed.
"""

import datetime
import json
import math
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked_processes
import joblib
import numpy as np
import pytest
import torch
import yaml
from conftest import draw_nothing, tiny
from forked_processes import ForkedProcess
from mlflow_server import MlflowServer

from raysweep.cli import build_parser, main
from raysweep.data import load_data
from raysweep.leases import hold_pipeline_lock
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.pipeline.pipeline import check_rankings, load_pipeline, plan_stages
from raysweep.pipeline.published_results import load_paper_table
from raysweep.pipeline.stage import StageContext
from raysweep.pipeline.sweep_retention import get_today_date, prune_nightly_sweeps
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.epoch_timing import estimate_epoch_seconds
from raysweep.sweep.resources import Resources
from raysweep.training.config import TrainingConfig
from raysweep.training.trainer import train_model

SHRUNK = {
    "data.name": "digits",
    "data.unlabeled": None,
    "data.train_size": 64,
    "data.val_size": 50,
    "model.name": "digits_cnn",
    "epochs": 2,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
    "validation.finish.*.steps": 2,
    "validation.finish.*.runs": 1,
}
SET = [part for key, value in SHRUNK.items() for part in ("--set", f"{key}={json.dumps(value)}")]
TINY = [*SET, "--set", "stages.tune.trials=2", "--set", "stages.autoattack.n=10"]
NEEDS_RAY = pytest.mark.needs_ray
LAM = "method.terms.pgd.weight.lam"
CHEAP = """\
set:
  {epochs: 4, data.val_size: 50, data.train_size: 400, batch_size: 32, "*.eps": 0.02,
   "*.attacks.*.steps": 2, "validation.finish.*.steps": 2, "validation.finish.*.runs": 1}
stages:
  - {kind: train, runs: {AT: {method: at}}, seeds: [0]}
  - {kind: autoattack, attacks: {PGD: {kind: pgd, steps: 5, step_size: 0.01, eps: 0.02}}, n: 60}
  - {kind: report}
"""


@pytest.mark.parametrize("name", list_builtin_pipelines())
def test_shipped_pipelines_are_sound(name, workdir: Path) -> None:
    """Spaces, presets, both ends of every range and the paper's table, as shipped; then shrunk and
    planned.
    """
    _, pipeline, settings = load_pipeline(name, {})
    assert pipeline.about and all(stage.describe_stage(settings) for stage in pipeline.stages)
    for stage in pipeline.stages:
        for config in stage.list_training_configs(settings):
            # Rows with the paper's protocol choose on test images, which is warned of.
            is_of_paper = config.validation.split == "test"
            # Some rows are read before the last drop of their paper's schedule.
            warnings = [line for line in config.list_warnings() if "it never becomes" not in line]
            assert len(warnings) == is_of_paper, warnings
    _, small, around = load_pipeline(name, SHRUNK)
    planned = plan_stages(small, around, workdir, small.compute_rerun_key())
    assert len({step.stage_digest for step in planned}) == len(small.stages)
    configs = [config for stage in small.stages for config in stage.list_training_configs(around)]
    assert configs and all(
        config.epochs == 2 and config.data.name == "digits" for config in configs
    )


SPACE = "method: at\ntrials: {trials}\nspace: {{optim.weight_decay: {{float: [1.0e-5, {high}]}}}}\n"
NAMING = """\
stages:
  - {kind: tune, space: sp.yaml}
  - {kind: train, runs: {LRAT: {preset: lrat-table5}}, seeds: [0]}
  - {kind: autoattack}
  - {kind: report, paper: lrat-table5}
"""


def test_a_digest_holds_what_the_named_files_say_and_not_where_the_data_lie(
    workdir: Path, monkeypatch
) -> None:
    """An edited search space, preset or table of a paper is another stage; data that moved are the
    same data.
    """
    shutil.copytree(_root() / "pipelines", workdir / "pipelines")
    monkeypatch.setattr(
        "raysweep.training.presets.find_builtin_folder", lambda folder: workdir / folder
    )
    monkeypatch.setattr(
        "raysweep.pipeline.published_results.find_builtin_folder", lambda folder: workdir / folder
    )
    Path("naming.yaml").write_text(NAMING)
    for place in ("here", "there"):
        Path(place).mkdir()
        for split in ("train", "test"):
            x, y = np.zeros((80, 3, 8, 8), np.uint8), np.arange(80) % 10
            np.savez(Path(place) / f"{split}.npz", x=x, y=y)

    def digests(place: str = "here") -> list[str]:
        changes = {
            "data.name": "arrays",
            "data.data_dir": str(workdir / place),
            "data.val_size": 10,
        }
        _, pipeline, settings = load_pipeline("naming.yaml", changes)
        return [step.stage_digest for step in plan_stages(pipeline, settings, workdir, "")]

    def changed(edit: Callable[[], object]) -> list[bool]:
        before = digests()
        edit()
        return [one != other for one, other in zip(before, digests(), strict=True)]

    def sub(file: str, old: str, new: str) -> None:
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, new))

    Path("sp.yaml").write_text(SPACE.format(trials=4, high="1.0e-2"))
    assert digests() == digests() == digests("there")
    assert changed(lambda: sub("sp.yaml", "trials: 4", "trials: 9")) == [True, False, True, True]
    assert changed(lambda: sub("sp.yaml", "e-2", "e-3")) == [True, False, True, True]
    preset = "pipelines/presets/lrat-table5.yaml"
    assert changed(lambda: sub(preset, "data.name", "epochs: 90\ndata.name")) == [
        False,
        True,
        True,
        True,
    ]
    assert changed(lambda: sub("pipelines/paper/lrat-table5.yaml", "92.30", "92.40")) == [
        False,
        False,
        False,
        True,
    ]


TABLES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "pipelines" / "paper").glob("*.yaml")
)


@pytest.mark.parametrize("name", TABLES)
def test_a_papers_table_is_asked_for_as_it_stands(name) -> None:
    """Each row and metric of the table has its run, its epoch and its attack, under the table's
    protocol.
    """
    table = load_paper_table(name)
    _, pipeline, settings = load_pipeline(name, {})
    train, attack, report = pipeline.stages
    assert report.paper == name and train.seeds == (0, 1, 2, 3, 4)
    assert set(train.runs) == set(table.rows) == set(table.models)
    assert {which for row in table.rows.values() for which in row} == set(train.checkpoints)
    metrics = {
        metric for row in table.rows.values() for values in row.values() for metric in values
    }
    assert metrics <= {"Natural", *attack.attacks} and "AA" in attack.attacks
    for label, config in zip(train.runs, train.list_training_configs(settings), strict=True):
        assert config.model.name == table.models[label]
        assert config.data.name == table.protocol.data
        assert config.epochs == table.epochs.get(label, table.protocol.epochs)
        assert next(iter(config.validation.attacks.values())).eps == pytest.approx(
            table.eps.get(label, table.protocol.eps)
        )
    assert set(table.row_notes) | set(table.eps) <= set(table.rows)


def test_rows_say_what_their_paper_does_not() -> None:
    """With the value that the row has; not where the command line sets the value."""
    _, pipeline, overrides = load_pipeline("lrat-table2", {})
    notes = pipeline.stages[0].collect_row_notes(overrides)
    expected = "bound.total = 5: not the paper's setting: C = 5, the paper's 0.1"
    assert notes["LRAT-TRADES at 60"][0] == expected
    assert "LRAT-TRADES literal" not in notes
    assert any("burn_in = 30: not given by the paper" in note for note in notes["GAIR-TRADES"])
    _, pipeline, overrides = load_pipeline("gairat-fig13", {})
    notes = pipeline.stages[0].collect_row_notes(overrides)
    assert notes["lambda 2"][0].startswith("lam = 2: not given by the paper")
    assert "AT" not in notes
    _, pipeline, overrides = load_pipeline("gairat-fig11", {"optim.lr": 0.1})
    assert pipeline.stages[0].collect_row_notes(overrides) == {}


MIXED = """
stages:
  - {kind: tune, space: at}
  - {kind: tune, space: gairat, set: {"*.eps": 0.1}}
  - STAGE
"""


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("{kind: promote}", 2),
        (
            "{kind: promote, per_method: true}\n  - {kind: autoattack}\n"
            "  - {kind: register, name: n}",
            4,
        ),
        ("{kind: promote, per_method: true}\n  - {kind: autoattack}\n  - {kind: report}", None),
    ],
)
def test_ranking_different_threats_is_refused(tmp_path, stage: str, number: int | None) -> None:
    """By promote and by register, before anything starts; a report and a promotion within each
    method rank none of them.
    """
    file = tmp_path / "mixed.yaml"
    file.write_text(MIXED.replace("STAGE", stage))
    _, pipeline, overrides = load_pipeline(str(file), {})
    if number is None:
        check_rankings(pipeline, overrides)
        return
    with pytest.raises(SpecError) as caught:
        check_rankings(pipeline, overrides)
    kind = "promote" if number == 2 else "register"
    assert caught.value.problems == [
        f"stages.{number} ({kind}): candidates of different threat models cannot be ranked: "
        "Linf eps 0.15 (at); Linf eps 0.1 (gairat); give all of them one, for example with set: "
        "{'*.eps': 8/255}"
    ]
    check_rankings(*load_pipeline(str(file), {"*.eps": 0.1})[1:])


def test_one_method_at_two_radii_is_refused_too(tmp_path, capsys) -> None:
    """One line and exit code 2, also for a plan."""
    file = tmp_path / "mixed.yaml"
    text = MIXED.replace("space: gairat", "space: at, label: wide").replace(
        "STAGE", "{kind: promote, per_method: true}"
    )
    file.write_text(text)
    assert main(["run", str(file), "--plan", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be ranked: Linf eps 0.15 (at); Linf eps 0.1 (at); give all" in line


@pytest.fixture(scope="module")
def digits_run(ray_cluster, one_core, tmp_path_factory) -> Path:
    """`raysweep run digits`, tiny, from nothing."""
    out = tmp_path_factory.mktemp("pipeline")
    assert main(["run", "digits", *TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.ray
@pytest.mark.mlflow
@pytest.mark.slow
@pytest.mark.usefixtures("undrawn_figures")
def test_the_next_run_writes_what_an_outage_kept_from_mlflow(
    copied_run: Path,
    workdir: Path,
    empty_store: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server stops after the pipeline's first connection, and answers again before the second
    run.
    """
    from mlflow import MlflowClient

    stages = yaml.safe_load((_root() / "pipelines" / "digits.yaml").read_text())
    stages["stages"] = [stage for stage in stages["stages"] if stage["kind"] != "register"]
    (attack,) = (stage for stage in stages["stages"] if stage["kind"] == "autoattack")
    attack["attacks"] = {"PGD": "pgd20"}
    Path("digits.yaml").write_text(yaml.safe_dump(stages))
    empty_store(workdir / "server.db")
    server = MlflowServer(workdir)
    server.ensure_running()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    command = ["run", "./digits.yaml", *TINY, "--out", str(copied_run)]
    note = copied_run / "runs" / "pipelines" / "digits" / "unrecorded.json"
    evaluate_candidate = AutoAttackStage._evaluate_candidate

    def lose_server(stage: AutoAttackStage, context: StageContext, *arguments: Any) -> Any:
        context.tracker.wait_until_ready()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        server.send_signal(signal.SIGSTOP)
        return evaluate_candidate(stage, context, *arguments)

    monkeypatch.setattr(AutoAttackStage, "_evaluate_candidate", lose_server)
    try:
        assert main([*command, "--from", "autoattack"]) == 0
        captured = capsys.readouterr()
        assert "lacks the last 3 records" in captured.err and "report.html" in captured.out
        assert json.loads(note.read_text()) == {"first_stage": 2}
        monkeypatch.setattr(AutoAttackStage, "_evaluate_candidate", evaluate_candidate)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        server.send_signal(signal.SIGCONT)
        assert main([*command, "--plan", "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)["stages"]
        assert [stage["again"] for stage in planned] == [False, False, True, True]
        assert main(command) == 0
    finally:
        server.kill()
    client = MlflowClient(server.database_uri)
    experiment = client.get_experiment_by_name("raysweep").experiment_id
    names = [" ".join(run.data.metrics) for run in client.search_runs([experiment])]
    assert sum("robust" in name for name in names) == 2, "both candidates"
    assert not note.exists()
    assert "MLflow lacks records of an earlier run" in capsys.readouterr().err


def artifacts(out: Path, name: str = "digits") -> dict[str, tuple[Path, Artifact]]:
    folders = sorted((out / "runs" / "pipelines" / name).glob("[0-9]*"))
    return {folder.name[3:-17]: (folder, Artifact.read_if_finished(folder)) for folder in folders}


@pytest.mark.ray
def test_from_nothing_to_a_report(digits_run: Path) -> None:
    found = artifacts(digits_run)
    assert list(found) == ["tune", "promote", "autoattack", "register", "report"]
    promoted = found["promote"][1].candidates
    scores = [c.score("robust_worst") for c in found["tune"][1].candidates]
    assert [c.score("robust_worst") for c in promoted] == sorted(scores, reverse=True)[:2]
    judged = found["autoattack"][1].evaluations
    assert [j.candidate.checkpoint for j in judged] == [c.checkpoint for c in promoted]
    assert all(
        j.is_autoattack and j.examples == 10 and list(j.accuracy_after)[-1] == "square"
        for j in judged
    )

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{digits_run}/mlflow.db")
    for judgement in judged:
        run = client.get_run(judgement.run_id)
        assert run.data.metrics["eval/autoattack-Linf-0.15-n10/robust_accuracy"] == pytest.approx(
            judgement.robust
        )
        assert run.data.tags["raysweep.kind"] == "trial"
    model = client.get_registered_model("lrat-digits")
    assert set(model.aliases) == {"candidate", "aa-verified", "champion"}
    version = client.get_model_version_by_alias("lrat-digits", "champion")
    assert version.run_id == judged[0].run_id
    card = json.loads((found["register"][0] / "card.json").read_text())
    assert {"eps", "threat_model", "autoattack_acc", "clean_acc", "architecture", "dataset"} <= set(
        card
    )
    assert card["environment"]["torch"] and card["aliases"] == [
        "candidate",
        "aa-verified",
        "champion",
    ]


class Sources(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.found += [
            value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")
        ]


@pytest.mark.ray
def test_the_report_is_one_file_with_the_numbers(digits_run: Path) -> None:
    folder, artifact = artifacts(digits_run)["report"]
    html = (folder / "report.html").read_text()
    sources = Sources()
    sources.feed(html)
    assert sources.found and all(
        source.startswith("data:image/svg+xml;base64,") for source in sources.found
    )
    assert (
        not {"script", "link", "iframe"} & sources.tags
        and "url(" not in html
        and "@import" not in html
    )
    best = artifact.facts["best"]
    for text in (unescape(html), (folder / "report.md").read_text()):
        assert f"{100 * best['robust']:.2f}" in text and "No regression" in text
        assert "Kendall's tau" in text and "reused" in text and "masking gap" in text


@pytest.mark.ray
def test_the_second_run_does_nothing(digits_run: Path, monkeypatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits_run.rglob("*") if path.is_file()}

    def refuse(*args, **kwargs):
        raise AssertionError("work was done again")

    for what in (
        "sweep.tuner.run_sweep",
        "pipeline.autoattack.evaluate_checkpoint",
        "tracking.Tracker.__init__",
    ):
        monkeypatch.setattr(f"raysweep.{what}", refuse)
    assert main(["run", "digits", *TINY, "--out", str(digits_run), "--json"]) == 0
    assert all(stage["done_before"] for stage in json.loads(capsys.readouterr().out)["stages"])
    changed = {
        p for p in digits_run.rglob("*") if p.is_file() and p.stat().st_mtime_ns != before.get(p)
    }
    assert {path.name for path in changed} <= {"lock", "log.jsonl"}
    assert main(["run", "digits", *TINY, "--out", str(digits_run), "--plan", "--json"]) == 0
    assert all(stage["done"] for stage in json.loads(capsys.readouterr().out)["stages"])
    again = ["--from", "autoattack", "--plan"]
    assert main(["run", "digits", *TINY, "--out", str(digits_run), *again, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["again"] for stage in planned] == [False, False, True, True, True]
    assert [stage["done"] for stage in planned] == [True, True, False, False, False]
    assert not any("expected_seconds" in stage for stage in planned), "nothing is trained again"
    more = [*TINY, "--set", "stages.autoattack.n=12"]
    assert main(["run", "digits", *more, "--out", str(digits_run), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["done"] for stage in planned] == [True, True, False, False, False]


@pytest.fixture
def copied_run(digits_run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `digits_run` in its place, for what it holds names that place; afterwards the
    original is back.

    Only for new processes: this one may have the original's database open.
    """
    original = digits_run.rename(tmp_path / "original")
    shutil.copytree(original, digits_run)
    yield digits_run
    shutil.rmtree(digits_run)
    original.rename(digits_run)


def run_without_attacks(arguments: list[str]) -> int:
    """Call `raysweep`; it fails if an attack of AutoAttack runs."""

    def refuse(*args, **kwargs):
        raise AssertionError("an attack ran again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raysweep.attacks.apgd.APGD.__call__", refuse)
        patch.setattr("raysweep.text_figure.TextFigure.draw", draw_nothing)
        patch.setattr("os.sched_getaffinity", lambda pid: {0})
        return main(arguments)


@pytest.mark.ray
def test_from_makes_the_rest_again_and_repeats_no_attack(copied_run: Path) -> None:
    before = {kind: artifact.finish_time for kind, (_, artifact) in artifacts(copied_run).items()}
    command = ["run", "digits", *TINY, "--out", str(copied_run), "--from", "autoattack"]
    again = forked_processes.start_function(
        run_without_attacks, command, imports=forked_processes.COMMANDS
    )
    assert again.wait() == 0, again.err
    after = {kind: artifact.finish_time for kind, (_, artifact) in artifacts(copied_run).items()}
    assert [kind for kind in after if after[kind] != before[kind]] == [
        "autoattack",
        "register",
        "report",
    ]
    assert artifacts(copied_run)["register"][1].facts["verdict"] == "tie", (
        "it is the champion itself"
    )


def _configs(name: str) -> list[TrainingConfig]:
    _, pipeline, around = load_pipeline(
        name, {**SHRUNK, "epochs": 1, "data.train_size": 32, "data.val_size": 20}
    )
    return [config for stage in pipeline.stages for config in stage.list_training_configs(around)]


@pytest.mark.slow
def test_every_row_of_every_pipeline_trains(tmp_path: Path) -> None:
    """One small epoch of each run, in this process; runs that pipelines share train once."""
    found = {name: _configs(name) for name in list_builtin_pipelines()}
    assert all(found.values())
    rows = {
        config.digest(): (name, config) for name, configs in found.items() for config in configs
    }
    for digest, (name, config) in rows.items():
        last = train_model(config, tmp_path / digest).last_checkpoint
        assert last.epoch == 1 and math.isfinite(last.last_metrics["train/loss"]), name
        assert 0 <= last.last_metrics["robust_worst"] <= last.last_metrics["clean"] <= 1, name


def _flags(**changes: object) -> list[str]:
    return [
        part
        for key, value in changes.items()
        for part in ("--set", f"stages.{key.replace('__', '.')}={json.dumps(value)}")
    ]


WEAK = {"kind": "pgd", "steps": 2, "step_size": 0.1, "eps": 0.15}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("undrawn_figures")
def test_nightly_runs_through(ray_cluster, one_core, workdir: Path) -> None:
    """Three sweeps, the best of each method, a report with a section for each."""
    small = _flags(
        tune__trials=1, promote__seeds=[], autoattack__n=20, autoattack__attacks={"AA": WEAK}
    )
    # AutoAttack is soon done with the finalists.
    cheap = ["--set", "validation.size=10", "--set", "validation.*.eps=0.5"]
    assert main(["run", "nightly", *SET, *small, *cheap]) == 0
    found = artifacts(workdir, "nightly")
    assert {c.method for c in found["promote"][1].candidates} == {"at", "gairat", "lrat"}
    text = (found["report"][0] / "report.md").read_text()
    assert all(f"What was searched: {method}" in text for method in ("at", "gairat", "lrat"))
    assert "raysweep-nightly version 1" in text


@pytest.mark.ray
@pytest.mark.slow
def test_a_figure_runs_through_and_draws_what_it_varies(
    ray_cluster, one_core, workdir: Path
) -> None:
    rows = {f"lambda {lam}": {"preset": "gairat-fig13", "set": {LAM: lam}} for lam in (-2, 0, 2)}
    small = _flags(train__runs=rows, autoattack__n=20, autoattack__attacks={"PGD-20": WEAK})
    assert main(["run", "gairat-fig13", *SET, *small]) == 0
    found = artifacts(workdir, "gairat-fig13")
    assert len(found["autoattack"][1].evaluations) == 6, "best and last epoch of each"
    text = (found["report"][0] / "report.md").read_text()
    assert f"Test accuracy against {LAM}" in text
    assert "Mean κ under pgd over epochs" in text and "(GAIRAT fig. 7)" in text
    assert "gairat-fig13: G figure 13" in text
    picture = (found["report"][0] / "figures" / "gairat-fig13.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.ray
@pytest.mark.usefixtures("undrawn_figures")
def test_a_papers_table_on_other_data_is_not_comparable(
    ray_cluster, one_core, workdir: Path
) -> None:
    one = "stages.train.runs={LRAT: {preset: lrat-table5}}"
    few = [
        one,
        "stages.train.seeds=[0, 1]",
        "stages.autoattack.n=20",
        "stages.autoattack.attacks={PGD: pgd20}",
    ]
    flags = [*SET, *(part for setting in few for part in ("--set", setting))]
    assert main(["run", "lrat-table5", *flags]) == 0
    folder, report = artifacts(workdir, "lrat-table5")["report"]
    lines = report.facts["paper"]
    assert [(line["row"], line["metric"]) for line in lines] == [
        ("LRAT", "Natural"),
        ("LRAT", "PGD"),
    ]
    assert {line["verdict"] for line in lines} == {"not comparable"}
    assert lines[0]["ours"][4] == 2 and lines[0]["paper"] == 92.30
    text = (folder / "report.md").read_text()
    assert "other data (digits, not svhn)" in text and "fewer epochs (2, not 100)" in text
    assert re.search(r"\| LRAT \| best \| PGD \| .* ± .* \| 59.76 ± 0.14 \|", text)


@pytest.mark.ray
@pytest.mark.usefixtures("undrawn_figures")
def test_nights_are_compared_and_a_planted_regression_is_exit_code_1(
    ray_cluster, one_core, workdir: Path, monkeypatch, capsys
) -> None:
    nights = iter(("2026-01-01", "2026-01-02"))

    def sleep() -> None:
        night = next(nights)
        monkeypatch.setattr("raysweep.pipeline.pipeline.get_today_date", lambda: night)

    Path("cheap.yaml").write_text("again: daily\n" + CHEAP)
    sleep()
    assert main(["run", "cheap.yaml", "--json"]) == 0
    capsys.readouterr()
    sleep()
    assert main(["run", "cheap.yaml", "--set", "optim.lr=1.0e-9", "--json"]) == 5
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "raysweep: regression: PGD of the chosen checkpoint fell from" in err
    assert not any(stage["done_before"] for stage in result["stages"]), (
        "another night is another run"
    )
    html = Path(result["reports"][0]).read_text()
    assert "Regression:" in html and "worse" in html
    assert main(["run", "cheap.yaml", "--set", "optim.lr=1.0e-9", "--json"]) == 5, (
        "until it is mended"
    )
    assert main(["run", "cheap.yaml", "--set", "stages.report.floor=0.999", "--json"]) == 5
    err = capsys.readouterr().err
    assert "below the floor 99.90%" in err
    assert "fell from" in err, "compared with the last good night, not with the bad one"


def test_a_plan_says_on_what_and_for_how_long(workdir: Path, capsys) -> None:
    Path("promoted.yaml").write_text(PROMOTED)
    small = [
        *SET,
        "--set",
        "stages.tune.trials=3",
        "--set",
        "stages.1.cpus=0.5",
        "--set",
        "stages.0.max_hours=1.0e-9",
    ]
    assert main(["run", "promoted.yaml", *small, "--plan", "--json"]) == 0
    gairat, at, promote, attack = json.loads(capsys.readouterr().out)["stages"]
    cores = joblib.cpu_count()
    assert (gairat["trials_at_once"], at["trials_at_once"]) == (min(3, cores), min(3, 2 * cores))
    assert at["cpus_per_trial"] == 0.5 and at["gpus_per_trial"] == 0
    assert at["expected_seconds"] > 0 and promote["expected_seconds"] > 0
    assert gairat["expected_seconds"] == 0, "max_hours"
    assert gairat["checkpoint_bytes"] * 3 == 5 * at["checkpoint_bytes"] > 0, (
        "three trials of each, and two of GAIRAT's base method"
    )
    assert promote["checkpoint_bytes"] * 3 == 4 * at["checkpoint_bytes"], (
        "two seeds of the best two"
    )
    assert promote["trials_at_once"] == min(2, cores) and "expected_seconds" not in attack
    # A trial keeps two states, and trains two epochs.
    assert at["state_bytes"] == at["checkpoint_bytes"]
    assert (
        main(["run", "promoted.yaml", *small, "--set", "stages.promote.pareto=true", "--plan"]) == 0
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = re.sub(r"\n( {30}| {4}(?! ))", " ", out).splitlines()
    _, at_line, promote_line, _ = (line for line in lines if re.match(r"\d\d ", line))
    assert re.search(
        r"; a trial holds 0.5 CPU\(s\) and 0 GPU\(s\), \d run at once, about \d", at_line
    )
    assert promote_line.endswith("run at once"), "how many are on the front nobody knows"
    assert lines[-1].endswith(
        "the training time cannot be estimated on this machine; attacks take extra time"
    )
    assert list(workdir.iterdir()) == [workdir / "promoted.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is through with it soon")
def test_a_plan_does_not_time_a_network_that_takes_this_cpu_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        np.savez(
            tmp_path / f"{split}.npz", x=np.zeros((64, 3, 32, 32), np.uint8), y=np.arange(64) % 10
        )
    for model, limit, known in (("digits_cnn", 600.0, True), ("resnet18", 0.05, False)):
        monkeypatch.setattr("raysweep.sweep.epoch_timing.LIMIT_SECONDS", limit)
        own = {
            "data__name": "arrays",
            "data__data_dir": str(tmp_path),
            "data__train_size": 32,
            "data__val_size": 10,
        }
        config = tiny("at", model__name=model, **own)
        seconds = estimate_epoch_seconds(config, load_data(config.data), Resources(cpus=1))
        assert (seconds is not None and seconds > 0) == known


@NEEDS_RAY
def test_a_refused_pipeline_leaves_no_sweep(workdir: Path, capsys) -> None:
    assert main(["run", "digits", *TINY, "--address", "127.0.0.1:1"]) == 3
    assert "no Ray cluster at --address 127.0.0.1:1" in capsys.readouterr().err
    assert [path.name for path in (workdir / "runs").iterdir()] == ["pipelines"]


def _root() -> Path:
    return Path(__file__).parent.parent


def hold_lease(folder: Path, held: Path, seconds: float) -> None:
    with hold_pipeline_lock(folder, False):
        held.touch()
        time.sleep(seconds)
        held.unlink()


def test_two_at_once_one_refuses_or_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysweep.folder_lock._POLL_SECONDS", 0.05)
    folder = tmp_path / "digits"

    def start_holder(seconds: float) -> ForkedProcess:
        held = tmp_path / f"held-{seconds}"
        process = forked_processes.start_function(hold_lease, folder, held, seconds)
        while not held.exists():
            assert process.poll() is None, process.err
            time.sleep(0.01)
        return process

    first = start_holder(60)
    with pytest.raises(
        SpecError, match=rf"'digits' is running already \(process {first.pid} on .*--wait"
    ):
        hold_pipeline_lock(folder, wait=False).__enter__()
    first.kill()
    with hold_pipeline_lock(folder, wait=False):
        pass
    second = start_holder(0.5)
    with hold_pipeline_lock(folder, wait=True):
        assert not (tmp_path / "held-0.5").exists()
    assert second.wait() == 0


WRONG = """\
stages:
  - {kind: promote}
  - {kind: tune, space: lratt}
  - {kind: tune, space: lrat, set: {epochz: 3}}
  - {kind: train, runs: {A: {preset: lrat-tabel1}, B: {}}}
  - {kind: autoattack, attacks: {X: pgd21}}
  - {kind: report, paper: lrat-table9}
  - {kind: tune, space: at}
  - {kind: tune, space: at}
  - {kind: tune, space: at, label: again}
  - {kind: promote, set: {epochz: 5, model.name: nosuch}}
  - {kind: autoattack, eps: 8}
  - {kind: register, name: "a/b:c"}
"""


def test_everything_wrong_is_said_at_once(workdir: Path, capsys) -> None:
    Path("wrong.yaml").write_text(WRONG)
    assert main(["run", "wrong.yaml"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    expected = [
        "stages.0 (promote): no stage before it trains anything",
        "stages.1 (tune): no search space 'lratt'; nearest: lrat",
        "stages.2 (tune): no setting 'epochz'; nearest: epochs",
        "stages.3 (train): runs.A: no preset 'lrat-tabel1'; nearest: lrat-table1",
        "stages.3 (train): runs.B: needs exactly one of preset, method",
        "stages.4 (autoattack): attacks.X: no attack 'pgd21'; nearest: pgd20",
        "stages.5 (report): no paper table 'lrat-table9'; nearest: lrat-table",
        "stages.7 (tune): its label 'at' is already used by stages.6",
        "stages.9 (promote): set: no setting 'epochz'; nearest: epochs",
        "stages.9 (promote): set: model.name: no model 'nosuch'",
        (
            "stages.10 (autoattack): attacks.AA: eps = 8: epsilon means pixels in [0, 1]; "
            "did you mean 8/255?"
        ),
        "stages.11 (register): name = 'a/b:c': use letters, digits",
    ]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True))
    assert list(workdir.iterdir()) == [workdir / "wrong.yaml"]


BROKEN = """\
sett: {epochs: 3}
stages:
  - {kind: tun, space: lrat}
  - {kind: tune, space: lrat, trial: 3}
  - {kind: autoattack, attacks: {AA: autoatack}}
  - {kind: tune, space: lratt}
  - 7
"""


def test_a_file_of_the_wrong_shape_is_looked_through_all_the_same(workdir: Path, capsys) -> None:
    Path("broken.yaml").write_text(BROKEN)
    assert main(["run", "broken.yaml"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    expected = [
        "stages.0: no kind 'tun'; nearest: tune, train",
        "no setting 'stages.1.trial'; nearest: stages.1.trials",
        "stages.4 = 7",
        "no setting 'sett'; nearest: set",
        "stages.2 (autoattack): attacks.AA: no attack 'autoatack'; nearest: autoattack",
        "stages.3 (tune): no search space 'lratt'; nearest: lrat",
    ]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.yaml"], "none.yaml: cannot be read: No such file"),
        (["digitz"], "no pipeline 'digitz'; nearest: digits"),
        (["digits", "--from", "tunes"], "--from 'tunes': this pipeline has 0 tune, 1 promote"),
        (
            ["digits", "--plan", "--from", "tunes"],
            "--from 'tunes': this pipeline has 0 tune, 1 promote",
        ),
        pytest.param(
            ["digits", "--plan", "--address", "127.0.0.1:1"],
            "no Ray cluster at --address 127.0.0.1:1",
            marks=NEEDS_RAY,
        ),
        (["digits", "--plan", "--wait"], "--wait: --plan runs nothing"),
        (["digits", "--plan", "--set", "stages.tune.cpus=999"], "a trial needs 999 CPUs"),
        (
            ["digits", "--set", "stages.tunes.trials=3"],
            "--set stages.tunes.trials: expected stages.STAGE.SETTING",
        ),
        (["digits", "--set", "stages.tune.trails=3"], "no setting 'trails'; nearest: trials"),
        (
            ["digits", "--set", "stages.tune.trials=0"],
            "trials = 0: must be greater than or equal to 1",
        ),
        (
            ["digits", "--set", "keep_nights=3"],
            "keep_nights: counts nights; it needs `rerun: daily`",
        ),
        (["digits", "--set", "epochs=0"], "epochs = 0: must be greater than or equal to 1"),
        (["gairat-fig12"], "data.data_dir is missing"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_a_mistake_is_one_line(arguments, words, workdir: Path, capsys) -> None:
    needs_a_larger_cluster = "no Ray cluster" in words or "999 CPUs" in words
    assert main(["run", *arguments]) == (3 if needs_a_larger_cluster else 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_promote_never_sees_the_test_set_and_respects_the_gap() -> None:
    from raysweep.pipeline.artifact import Candidate
    from raysweep.pipeline.promote import PromoteStage
    from raysweep.pipeline.stage import StageFailed

    def build_candidate(name: str, score: float, gap: float, **more) -> Candidate:
        metrics = {"robust_worst": score, "masking_gap": gap}
        return Candidate(
            label=name, method=name[0], checkpoint=name, epoch=1, epochs=1, metrics=metrics, **more
        )

    pool = (
        build_candidate("a1", 0.5, 0.2),
        build_candidate("a2", 0.4, 0.0),
        build_candidate("b1", 0.3, 0.0),
        build_candidate("b2", 0.6, 0.1, masked=True),
    )

    def names(**settings) -> list[str]:
        return [c.label for c in PromoteStage(**settings).select_candidates(pool)]

    assert names(top=2) == ["a1", "a2"]
    assert names(top=2, max_masking_gap=0.05) == ["a2", "b1"]
    assert names(top=1, each=True) == ["a1", "b1"]
    assert names(pareto=True) == ["a1"], "b2 is masked"
    assert names(pareto=True, each=True) == ["a1", "b1"]
    with pytest.raises(StageFailed, match="each of 4 candidates has a masking gap over"):
        PromoteStage(max_masking_gap=0.0).select_candidates(
            tuple(c.model_copy(update={"metrics": {"masking_gap": 1}}) for c in pool)
        )
    with pytest.raises(
        StageFailed, match="each of 1 candidates has a masking gap over its space's"
    ):
        PromoteStage(pareto=True).select_candidates(pool[3:])
    code = (_root() / "raysweep/pipeline/promote.py").read_text()
    assert ".test" not in code and "evaluate" not in code


def test_promotion_goes_by_what_the_sweep_went_by() -> None:
    """Its metric, or all its metrics for the front of those that are fit; different sweeps meet in
    the default.
    """
    from raysweep.pipeline.artifact import Candidate, select_best_candidate
    from raysweep.pipeline.promote import PromoteStage

    def build_candidate(
        name: str, clean: float, pgd: float, gap: float, *metrics: str
    ) -> Candidate:
        scores = {"clean": clean, "pgd": pgd, "robust_worst": pgd - gap, "masking_gap": gap}
        return Candidate(
            label=name,
            method="at",
            checkpoint=name,
            epoch=1,
            epochs=1,
            metrics=scores,
            objectives=metrics,
        )

    by_clean = [
        build_candidate(name, *scores, "clean")
        for name, *scores in (("a", 0.9, 0.2, 0.0), ("b", 0.8, 0.5, 0.0))
    ]
    assert (
        [c.label for c in PromoteStage(top=1).select_candidates(tuple(by_clean))]
        == ["a"]
        == [select_best_candidate(tuple(by_clean)).label]
    )
    mixed = (*by_clean, build_candidate("c", 0.1, 0.4, 0.0, "pgd"))
    assert [c.label for c in PromoteStage(top=3).select_candidates(mixed)] == ["b", "c", "a"]
    points = {
        "a": (0.9, 0.5, 0.3),
        "b": (0.8, 0.4, 0.0),
        "c": (0.7, 0.45, 0.0),
        "d": (0.7, 0.3, 0.0),
    }
    front = tuple(build_candidate(name, *scores, "pgd", "clean") for name, scores in points.items())
    assert [c.label for c in PromoteStage(pareto=True).select_candidates(front)] == ["a"]
    assert [
        c.label for c in PromoteStage(pareto=True, max_masking_gap=0.1).select_candidates(front)
    ] == ["c", "b"]


def test_training_over_seeds_keeps_the_metric_of_its_run() -> None:
    from raysweep.pipeline.stage_sweep import build_seed_grid

    assert build_seed_grid("at", {"validation.objective": "clean"}, (0, 1)).objectives == ("clean",)


PROMOTED = """\
set: {data.train_size: 64, batch_size: 48, "*.eps": 0.1}
stages:
  - {kind: tune, space: gairat}
  - {kind: tune, space: at}
  - {kind: promote, set: {epochs: 30, optim.lr: 0.02}, seeds: [3, 4]}
  - {kind: autoattack}
"""


def test_retraining_is_known_beforehand_and_obeys_the_command_line(workdir: Path) -> None:
    """The same runs but for what the stage sets, whatever their data set's profile says; `--set`
    wins over both.
    """
    Path("promoted.yaml").write_text(PROMOTED)

    def configs(changes: dict[str, object]) -> list[list[TrainingConfig]]:
        _, pipeline, settings = load_pipeline("promoted.yaml", changes)
        return [
            stage.list_training_configs(settings, before)
            for stage, before in pipeline.iter_stages_with_received_configs(settings)
        ]

    gairat, at, promoted, _ = configs({})
    changes = {"epochs": 30, "optim": gairat[0].optim.model_copy(update={"lr": 0.02})}
    assert promoted == [config.model_copy(update=changes) for config in (*gairat, *at)]
    gairat, at, promoted, _ = configs({"epochs": 2, "method.*.steps": 3})
    assert promoted == [
        config.model_copy(update=changes | {"epochs": 2}) for config in (*gairat, *at)
    ]
    assert all(config.method.attacks["pgd"].steps == 3 for config in promoted)


def test_today_is_a_date() -> None:
    assert datetime.date.fromisoformat(get_today_date())


def test_nights_before_the_last_are_forgotten(tmp_path: Path) -> None:
    nights = ("2026-02-27", "2026-02-28", "2026-03-01", "abc-a-revision")
    for night in nights:
        for folder in ("nightly-00-12345678/trials", ".prefixes/key"):
            (tmp_path / night / folder).mkdir(parents=True)

    def list_files() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))

    sweeps = [f"{night}/nightly-00-12345678" for night in nights]
    prune_nightly_sweeps(open_path(tmp_path), "2026-03-01", None)
    assert list_files() == sorted([*sweeps, "2026-03-01/.prefixes"]), (
        "this night's prefixes are in use"
    )
    prune_nightly_sweeps(open_path(tmp_path), "2026-03-02", 2)
    assert list_files() == sweeps[2:], "tonight, which has nothing yet, and the night before"
    prune_nightly_sweeps(open_path(tmp_path / "none"), "2026-03-02", 2)


DEPLOY = Path(__file__).parent.parent / "deploy"


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_what_schedulers_are_given_runs_commands_that_parse(path) -> None:
    """YAML is YAML, and each `raysweep run ...` is a command of ours for a pipeline that ships."""
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        assert all(isinstance(part, dict) for part in yaml.safe_load_all(text))
    commands = re.findall(r"raysweep (run [^\n>|]+)", text)
    assert commands or path.suffix == ".timer"
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)).what in list_builtin_pipelines()


def test_the_page_on_schedules_has_commands_that_parse_and_links_that_lead() -> None:
    page = (DEPLOY.parent / "docs" / "scheduling.md").read_text()
    for command in re.findall(r"raysweep (run [^\n>|`]+)", page):
        assert build_parser().parse_args(shlex.split(command.replace("run NAME", "run nightly")))
    assert all(
        (DEPLOY.parent / "docs" / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", page)
    )
    assert {path.name for path in DEPLOY.iterdir()} == set(
        re.findall(r"\]\(\.\./deploy/([^)]+)\)", page)
    )
