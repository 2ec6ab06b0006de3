"""Words and numbers as people read them: seconds, counts, settings in tables, lines of a sweep,
tags in MLflow.
"""

from pathlib import Path

import pytest

from raysweep.formatting import format_clock, format_count, format_duration
from raysweep.redaction import redact_secrets
from raysweep.terminal import format_accuracies, format_param
from raysweep.tracking import tracking_uri, training_run_tags
from raysweep.tracking.mlflow_tracker import format_mlflow_param
from raysweep.training.checkpoint import RunDirectory


@pytest.mark.parametrize(
    ("seconds", "running", "told"),
    [
        (0, "0:00", "0.0 s"),
        (9.96, "0:09", "10.0 s"),
        (59.9, "0:59", "59.9 s"),
        (60, "1:00", "1.0 min"),
        (61, "1:01", "1.0 min"),
        (3599, "59:59", "60.0 min"),
        (3600, "1:00:00", "60.0 min"),
        (5399, "1:29:59", "90.0 min"),
        (5400, "1:30:00", "1.5 h"),
        (36_061, "10:01:01", "10.0 h"),
        (360_000, "100:00:00", "100.0 h"),
    ],
)
def test_seconds_are_worded(seconds: float, running: str, told: str) -> None:
    assert (format_clock(seconds), format_duration(seconds)) == (running, told)


def test_counts_are_worded() -> None:
    assert [format_count(n, "trial") for n in (0, 1, 2, 21)] == [
        "0 trials",
        "1 trial",
        "2 trials",
        "21 trials",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1 + 0.2, "0.3"),
        (8 / 255, "0.0313725"),
        (1234567.0, "1.23457e+06"),
        (100.0, "100"),
        (1e-05, "1e-05"),
        (float("inf"), "inf"),
        (1234567, "1234567"),
        (True, "True"),
        ("tanh", "tanh"),
        ("[1.0, 2.0]", "[1.0, 2.0]"),
    ],
)
def test_parameters_as_mlflow_shows_them(value: object, text: str) -> None:
    """Numbers of six digits; whole numbers, words and lists as they are."""
    assert format_mlflow_param(value) == text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:se@cret@host:5432/db", "postgresql://***@host:5432/db"),
        (
            "mysql+pymysql://me:secret@host/db?charset=utf8",
            "mysql+pymysql://***@host/db?charset=utf8",
        ),
        ("postgresql://:secret@host/db", "postgresql://***@host/db"),
        (
            "postgresql://host/db?user=me&password=secret&x=1",
            "postgresql://host/db?user=me&password=***&x=1",
        ),
        (
            "cannot open postgresql://me:secret@host/db: refused",
            "cannot open postgresql://***@host/db: refused",
        ),
        ("postgresql://me@work:secret@host/db", "postgresql://***@host/db"),
        ("postgresql://me:a se@cret@host/db", "postgresql://***@host/db"),
        ("postgresql:/me:secret@host/db", "postgresql:/***@host/db"),
        ("me:secret@host:5432/db", "***@host:5432/db"),
        ("models:/NAME@champion: no model", "models:/NAME@champion: no model"),
        ("http://me@host:5000", "http://***@host:5000"),
        ("nonsense", "nonsense"),
        ("sqlite:///optuna.db", "sqlite:///optuna.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_the_password_of_a_store_is_never_shown(uri: str, shown: str) -> None:
    assert redact_secrets(uri) == shown


def test_the_store_is_in_the_folder_unless_the_environment_names_one(
    workdir: Path, monkeypatch
) -> None:
    assert (
        tracking_uri(workdir / "x") == f"sqlite:///{workdir}/x/mlflow.db" == tracking_uri(Path("x"))
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(workdir / "x") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(workdir / "x") == f"sqlite:///{workdir}/x/mlflow.db"


def test_runs_of_two_folders_have_different_tags(tmp_path: Path) -> None:
    one, other = (training_run_tags(RunDirectory(tmp_path / name)) for name in ("a", "b"))
    assert one["raysweep.kind"] == other["raysweep.kind"] == "train" and one != other
    assert one == training_run_tags(RunDirectory(tmp_path / "a"))


def test_an_epoch_is_one_line_of_its_accuracies() -> None:
    metrics = {
        "masking_gap": 0.0005,
        "pgd": 0.5,
        "clean": 0.98765,
        "train/loss": 1.0,
        "robust_worst": 1 / 3,
        "epoch": 3,
    }
    assert (
        format_accuracies(metrics) == "clean 0.988 pgd 0.500 robust_worst 0.333 masking_gap 0.001"
    )
    assert format_accuracies({}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (123456.0, "1.23e+05"),
        (123456, "123456"),
        (False, "False"),
        ("tanh", "tanh"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_a_setting_in_a_table(value: object, text: str) -> None:
    assert format_param(value) == text
