"""Whether MLflow can use a database is predicted without importing MLflow."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from raysweep.tracking.mlflow_database import is_usable_database

pytestmark = pytest.mark.mlflow


@pytest.fixture
def database(tmp_path: Path, empty_store: Callable[[Path], None]) -> Path:
    """A database that the installed MLflow has made."""
    file = tmp_path / "mlflow.db"
    empty_store(file)
    return file


def test_a_new_database_and_one_of_this_mlflow_are_usable(database: Path) -> None:
    assert is_usable_database(database, database.parent / "mlruns")
    database.unlink()
    assert is_usable_database(database, database.parent / "mlruns")
    assert not is_usable_database(database.parent / "missing" / "mlflow.db", None)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '000000000000'",
        "DROP TABLE alembic_version",
        "UPDATE experiments SET name = 'raysweep', lifecycle_stage = 'deleted'",
        "UPDATE experiments SET name = 'raysweep', artifact_location = 's3://elsewhere'",
        "UPDATE experiments SET name = 'raysweep', artifact_location = 'file://['",
    ],
)
def test_what_mlflow_must_decide_is_not_predicted(database: Path, change: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(change)
    assert not is_usable_database(database, database.parent / "mlruns")


def test_a_file_that_is_no_database_is_not_usable(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    assert not is_usable_database(tmp_path / "mlflow.db", None)
    (tmp_path / "link.db").symlink_to(tmp_path / "unmounted" / "mlflow.db")
    assert not is_usable_database(tmp_path / "link.db", None)
