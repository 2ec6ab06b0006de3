"""Parts of a pipeline: artifacts, digests of stages, precedence of settings, and which nights are
kept.
"""

import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pipeline_builders import build_candidate, build_evaluation_result
from rich.console import Console

from raysweep.data import DataSpec, load_data
from raysweep.errors import DamagedFileError
from raysweep.pipeline import stage, sweep_retention
from raysweep.pipeline.artifact import ARTIFACT_FILE, Artifact
from raysweep.pipeline.pipeline import Pipeline, find_stage_index, load_pipeline, plan_stages
from raysweep.pipeline.stage import StageContext, TrainingOverrides
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.training.checkpoint import describe_environment


def artifact(**more: Any) -> Artifact:
    candidate = build_candidate(
        "a", 0.5, gap=float("inf"), settings={"optim.lr": 0.1, "x": None, "y": [1, 2]}
    )
    judged = build_evaluation_result(
        candidate, 0.4, warnings=("w",), per_class={"0": {"robust_accuracy": 0.1}}
    )
    return Artifact(
        kind="tune",
        key="k",
        stage={"kind": "tune"},
        inputs=("1", "2"),
        candidates=(candidate,),
        evaluations=(judged,),
        **more,
    )


def test_an_artifact_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = artifact(finished=12.5, seconds=3.25, facts={"of": 3, "left_out": ["x"]})
    made.write(tmp_path / "00-tune-k", lambda partial: (partial / "beside.txt").write_text("b"))
    assert Artifact.read_if_finished(tmp_path / "00-tune-k") == made
    assert (tmp_path / "00-tune-k" / "beside.txt").read_text() == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["00-tune-k"]
    artifact().write(tmp_path / "00-tune-k")
    assert [path.name for path in (tmp_path / "00-tune-k").iterdir()] == [ARTIFACT_FILE], (
        "a new one is a new folder"
    )


def test_a_stage_whose_files_failed_has_no_artifact(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        artifact().write(tmp_path / "00-tune-k", fail)
    assert (
        Artifact.read_if_finished(tmp_path / "00-tune-k") is None
        and not (tmp_path / "00-tune-k").exists()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read: it is no JSON object"),
        ('{"kind": "tune"}', "key is missing"),
        (json.dumps(artifact().to_json_dict() | {"keyy": 1}), "no setting 'keyy'; nearest: key"),
    ],
)
def test_a_damaged_artifact_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / ARTIFACT_FILE).write_text(text)
    with pytest.raises(DamagedFileError) as error:
        Artifact.read_if_finished(tmp_path)
    assert error.value.problems[0].startswith(str(tmp_path / ARTIFACT_FILE)) and words in str(
        error.value
    )


PIPELINE = """\
about: {about}
set: {{data.val_size: 50, data.train_size: 64}}
stages:
  - {{kind: train, runs: {{AT: {{method: at}}}}, seeds: [0]}}
  - {{kind: train, runs: {{LRAT: {{method: lrat, set: {{epochs: 3}}}}}}, seeds: [0],
     set: {{epochs: 4, seed: 1}}}}
  - {{kind: promote}}
  - {{kind: autoattack}}
  - {{kind: report}}
"""


@pytest.fixture
def file(workdir: Path) -> Path:
    (workdir / "p.yaml").write_text(PIPELINE.format(about="one"))
    return workdir / "p.yaml"


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep data sets in memory once they have been read."""
    monkeypatch.setattr("raysweep.pipeline.pipeline.load_data", _read)


_read = cache(load_data)


def digests(file: Path, salt: str = "", **changes: Any) -> list[str]:
    _, pipeline, settings = load_pipeline(
        str(file), {k.replace("__", "."): v for k, v in changes.items()}
    )
    return [step.stage_digest for step in plan_stages(pipeline, settings, file.parent, salt)]


def test_a_digest_changes_with_what_goes_into_the_stage_and_with_nothing_else(
    file: Path, read_once
) -> None:
    base = digests(file)
    assert len(set(base)) == 5 and all(len(one) == 16 for one in base)

    def changed_digests(**more: Any) -> str:
        return "".join(
            "x" if one != other else "."
            for one, other in zip(base, digests(file, **more), strict=True)
        )

    assert changed_digests(stages__0__seeds=[0, 1]) == "x.xxx"
    assert changed_digests(stages__1__checkpoints=["last"]) == ".xxxx"
    assert changed_digests(stages__promote__top=1) == "..xxx"
    assert changed_digests(stages__autoattack__n=9) == "...xx"
    assert changed_digests(stages__report__floor=0.1) == "....x"
    assert changed_digests(data__train_size=65) == "xxxxx" == changed_digests(salt="2026-01-01")
    assert changed_digests(keep=3, again="daily") == ".....", "`again` acts through the salt only"
    file.write_text(PIPELINE.format(about="two"))
    assert changed_digests() == ".....", "`about` changes nothing"


def test_stages_that_train_have_no_inputs_and_all_others_have_every_stage_before_them(
    file: Path, read_once
) -> None:
    _, pipeline, settings = load_pipeline(str(file), {})
    found = plan_stages(pipeline, settings, file.parent / "f", "")
    at, lrat, promote, attack, report = found
    assert at.inputs == lrat.inputs == ()
    assert promote.inputs == (at.stage_digest, lrat.stage_digest) and attack.inputs == (
        *promote.inputs,
        promote.stage_digest,
    )
    assert report.inputs == (*attack.inputs, attack.stage_digest)
    assert [step.folder for step in found] == [
        file.parent / "f" / f"{step.number:02d}-{step.kind}-{step.stage_digest}" for step in found
    ]
    assert [step.kind for step in found] == ["train", "train", "promote", "autoattack", "report"]


def test_the_stages_settings_win_over_the_pipelines_and_the_command_line_over_both(
    file: Path,
) -> None:
    around = TrainingOverrides({"a": 1, "b": 1, "c": 1}, {"c": 3, "d": 3}).merge(
        {"b": 2, "c": 2, "e": 2}
    )
    assert around == {"a": 1, "b": 2, "c": 3, "d": 3, "e": 2}

    def epochs(**changes: Any) -> list[tuple[int, int, int]]:
        _, pipeline, settings = load_pipeline(str(file), changes)
        runs = [
            config
            for stage in pipeline.stages[:2]
            for config in stage.list_training_configs(settings)
        ]
        return [(run.epochs, run.batch_size, run.data.train_size) for run in runs]

    assert epochs() == [(8, 64, 64), (3, 64, 64)], (
        "a run's epochs over the stage's, the pipeline's sizes over the data set's"
    )
    assert epochs(epochs=5, batch_size=16) == [(5, 16, 64), (5, 16, 64)]


def test_the_command_line_reaches_one_stage_or_all_of_a_kind(file: Path) -> None:
    def stages(**changes: Any) -> tuple[Any, ...]:
        return load_pipeline(str(file), {k.replace("__", "."): v for k, v in changes.items()})[
            1
        ].stages

    assert [one.seeds for one in stages(stages__train__seeds=[7])[:2]] == [(7,), (7,)]
    assert [one.seeds for one in stages(stages__1__seeds=[7])[:2]] == [(0,), (7,)]
    assert stages(stages__promote__each=True)[2].per_method and not stages()[2].per_method
    _, pipeline, settings = load_pipeline(str(file), {"again": "daily", "keep": 2, "epochs": 3})
    assert (pipeline.rerun, pipeline.keep_nights, settings.from_command_line) == (
        "daily",
        2,
        {"epochs": 3},
    )
    assert settings.from_pipeline == {"data.val_size": 50, "data.train_size": 64}
    for path, words in {
        "stages": (
            "expected stages.STAGE.SETTING=..., where STAGE is a number or one of train, promote, "
            "autoattack"
        ),
        "stages.train": "expected stages.STAGE.SETTING",
        "stages.7.seeds": "expected stages.STAGE.SETTING",
        "stages.promote.topp": "no setting 'topp'; nearest: top",
        "stages.*.seeds": "no setting 'seeds'",
    }.items():
        with pytest.raises(SpecError) as error:
            load_pipeline(str(file), {path: [1]})
        assert f"--set {path}: " in str(error.value) and words in str(error.value)


def pipeline(*stages: dict[str, Any], **more: Any) -> Pipeline:
    return Pipeline.from_data({"stages": list(stages), **more})


TRAIN = {"kind": "train", "runs": {"AT": {"method": "at"}}, "seeds": [0]}


@pytest.mark.parametrize(
    ("stages", "lines"),
    [
        ([TRAIN, {"kind": "promote"}, {"kind": "autoattack"}, {"kind": "report"}], []),
        (
            [
                {"kind": "promote"},
                TRAIN,
                {"kind": "report"},
                {"kind": "register", "name": "m"},
                {"kind": "autoattack"},
            ],
            [
                "stages.0 (promote): no stage before it trains anything; put tune or train first",
                "stages.2 (report): no stage before it evaluates anything; put autoattack first",
                "stages.3 (register): no stage before it evaluates anything; put autoattack first",
            ],
        ),
        (
            [TRAIN, TRAIN],
            ["stages.1 (train): its label 'AT' is already used by stages.0; choose another"],
        ),
        ([{"kind": "tune", "space": "at"}, TRAIN | {"runs": {"at": {"method": "at"}}}], None),
    ],
)
def test_an_impossible_order_of_stages_is_refused(stages: list, lines: list[str] | None) -> None:
    found = pipeline(*stages).find_problems(TrainingOverrides({}, {}))
    assert found == (
        ["stages.1 (train): its label 'at' is already used by stages.0; choose another"]
        if lines is None
        else lines
    )


def test_keep_needs_a_daily_pipeline() -> None:
    for again in ("never", "revision"):
        (line,) = pipeline(TRAIN, rerun=again, keep_nights=1).find_problems(
            TrainingOverrides({}, {})
        )
        assert line == "keep_nights: counts nights; it needs `rerun: daily`"
    assert (
        pipeline(TRAIN, rerun="daily", keep_nights=1).find_problems(TrainingOverrides({}, {})) == []
    )
    with pytest.raises(SpecError, match="keep_nights = 0"):
        pipeline(TRAIN, rerun="daily", keep_nights=0)


def test_the_salt_makes_a_pipeline_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysweep.pipeline.pipeline.get_today_date", lambda: "2026-03-01")
    assert (
        pipeline(TRAIN).compute_rerun_key() == ""
        and pipeline(TRAIN, again="daily").compute_rerun_key() == "2026-03-01"
    )
    revision = describe_environment()["git_revision"] or describe_environment()["raysweep"]
    assert pipeline(TRAIN, again="revision").compute_rerun_key() == str(revision) != ""


def test_a_stage_is_named_by_kind_or_number() -> None:
    two = pipeline(TRAIN, TRAIN | {"runs": {"B": {"method": "at"}}}, {"kind": "autoattack"})
    assert find_stage_index(None, two) == 3, "beyond the last stage: nothing runs again"
    assert [find_stage_index(name, two) for name in ("train", "autoattack", "0", "1", "2")] == [
        0,
        2,
        0,
        1,
        2,
    ]
    for name in ("3", "-1", "promote", "", "1.0"):
        with pytest.raises(SpecError) as error:
            find_stage_index(name, two)
        assert (
            str(error.value) == f"--from {name!r}: this pipeline has 0 train, 1 train, 2 autoattack"
        )


@pytest.fixture
def work(tmp_path: Path) -> StageContext:
    folder = tmp_path / "runs" / "pipelines" / "p"
    return StageContext(
        "p",
        tmp_path,
        folder,
        open_path(tmp_path / "runs"),
        TrainingOverrides({}, {}),
        Console(),
        None,
        ExitStack(),
    )


def test_files_are_named_by_relative_paths_inside_the_folder_and_absolute_ones_outside(
    work: StageContext, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "runs" / "s" / "epoch-0001", tmp_path.parent / "elsewhere"
    assert work.make_reference(inside) == "runs/s/epoch-0001" and work.resolve_reference(
        "runs/s/epoch-0001"
    ) == open_path(inside)
    assert work.make_reference(outside) == str(outside)
    bucket = open_path("s3://b/x?region=r")
    assert work.make_reference(bucket / "y") == "s3://b/x/y?region=r"
    for reference in (str(outside), "s3://b/x/y?region=r"):
        with pytest.raises(SpecError, match=r"neither below --out .* nor below the storage"):
            work.resolve_reference(reference)
    work.storage = bucket
    assert work.resolve_reference("s3://b/x/y?region=r") == bucket / "y"
    work.storage = open_path(outside.parent)
    assert work.resolve_reference(str(outside)) == open_path(outside)


def test_a_stages_sweep_is_named_by_pipeline_stage_part_and_digest(
    work: StageContext, tmp_path: Path
) -> None:
    work.stage_number, work.stage_digest = 3, "0123456789abcdef"
    assert work.choose_sweep_folder("at") == open_path(tmp_path) / "runs" / "p-03-at-01234567"
    assert (
        work.choose_sweep_folder("lambda = -1/2 (ä).x_y").name
        == "p-03-lambda----1-2--ä-.x_y-01234567"
    )


def test_data_are_read_once(work: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting_load(spec: DataSpec) -> Any:
        asked.append(spec.val_size)
        return load_data(spec)

    monkeypatch.setattr(stage, "load_data", counting_load)
    one, other = DataSpec(val_size=50, train_size=64), DataSpec(val_size=51, train_size=64)
    assert (
        work.get_dataset(one) is work.get_dataset(one.model_copy())
        and len(work.get_dataset(other).val) == 51
    )
    assert asked == [50, 51]


def test_which_nights_are_kept(tmp_path: Path) -> None:
    """The last `keep`, including tonight. Folders that are no nights lose only their prefixes."""

    def folders_after_night(tonight: str, keep: int | None, *names: str) -> list[str]:
        folder = tmp_path / f"{tonight} {keep} {len(names)}"
        for name in names:
            (folder / name / ".prefixes").mkdir(parents=True)
            (folder / name / "sweep").mkdir()
        sweep_retention.prune_nightly_sweeps(open_path(folder), tonight, keep)
        return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))

    days = ("2026-02-28", "2026-03-01", "2026-03-02")
    assert folders_after_night("2026-03-02", 1, *days) == [
        "2026-03-02/.prefixes",
        "2026-03-02/sweep",
    ]
    assert folders_after_night("2026-03-02", 2, *days) == [
        "2026-03-01/sweep",
        "2026-03-02/.prefixes",
        "2026-03-02/sweep",
    ]
    assert folders_after_night("2026-03-02", 9, *days) == [
        "2026-02-28/sweep",
        "2026-03-01/sweep",
        "2026-03-02/.prefixes",
        "2026-03-02/sweep",
    ]
    others = ("20260101", "2026-1-1", "abcdef", "2026-02-30")
    assert folders_after_night("2026-03-02", 1, *others) == sorted(
        f"{name}/sweep" for name in others
    )
    # If the clock was wrong once: tonight is kept even if there is a later date.
    assert folders_after_night("2026-03-01", 1, "2026-03-01", "2026-12-31") == [
        "2026-03-01/.prefixes",
        "2026-03-01/sweep",
        "2026-12-31/sweep",
    ]
