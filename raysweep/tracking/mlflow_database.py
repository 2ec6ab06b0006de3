"""MLflow's SQLite database, read and corrected without importing MLflow."""

import importlib.util
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raysweep.errors import DamagedFileError
from raysweep.formatting import shorten_value

logger = logging.getLogger(__name__)

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""Environment variable of the user with the URI of the MLflow store."""
DEFAULT_EXPERIMENT_NAME = "raysweep"
_EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
# Folder of MLflow's Alembic migrations, relative to its package. Each file names its revision and
# the one before.
_MIGRATIONS_FOLDER = "store/db_migrations/versions"
_REVISION_PATTERN = re.compile(r'^(down_)?revision\s*=\s*["\'](\w+)["\']', re.MULTILINE)
# Columns of MLflow's database that hold absolute URIs of artifacts.
_ARTIFACT_URI_COLUMNS = (
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def get_experiment_name() -> str:
    """Return the name of the experiment: `MLFLOW_EXPERIMENT_NAME`, or `raysweep`."""
    return os.environ.get(_EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT_NAME


def is_usable_database(database: Path, artifact_root: Path | None) -> bool:
    """Return whether the installed MLflow can use a SQLite database, or create it.

    Args:
        database: The database.
        artifact_root: Folder in which the experiment must have its artifacts; None for any.

    Returns:
        True if the database does not exist and its folder is writable, or if it is writable, has
        the schema of this MLflow, and its experiment was not deleted. False if this is unknown.
    """
    revision = _find_schema_revision()
    if revision is None:
        return False
    if not os.path.lexists(database):
        return os.access(database.parent, os.W_OK)
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as found:
            versions = found.execute("SELECT version_num FROM alembic_version").fetchall()
            stages = found.execute(
                "SELECT lifecycle_stage FROM experiments WHERE name = ?", (get_experiment_name(),)
            ).fetchall()
        if artifact_root is not None:
            require_own_artifacts(database, artifact_root)
    except (sqlite3.Error, OSError, DamagedFileError) as error:
        logger.debug("cannot tell whether MLflow can use %s: %s", database, error)
        return False
    is_current = versions == [(revision,)]
    return is_current and stages in ([], [("active",)]) and os.access(database, os.W_OK)


def _find_schema_revision() -> str | None:
    """Return the Alembic revision of the installed MLflow's databases; None if it is unknown."""
    package = importlib.util.find_spec("mlflow")
    if package is None or not package.submodule_search_locations:
        return None
    former: set[str] = set()
    revisions: set[str] = set()
    for file in Path(package.submodule_search_locations[0], _MIGRATIONS_FOLDER).glob("*.py"):
        for is_former, revision in _REVISION_PATTERN.findall(file.read_text(encoding="utf-8")):
            (former if is_former else revisions).add(revision)
    last = revisions - former
    return last.pop() if len(last) == 1 else None


def _has_experiments(connection: sqlite3.Connection) -> bool:
    """Return whether MLflow has created its tables in a database."""
    query = "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"
    return connection.execute(query).fetchone() is not None


def relocate_artifacts(database: Path, artifact_folder: Path) -> None:
    """Correct the paths of artifacts in a database that was moved or copied with its artifacts.

    MLflow stores absolute paths, creates missing folders again and cannot change the paths.

    Args:
        database: SQLite database of MLflow; nothing happens if it is missing or empty.
        artifact_folder: Folder of the experiment's artifacts.
    """
    new_uri = artifact_folder.resolve().as_uri()
    if not database.is_file() or not artifact_folder.is_dir():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        if not _has_experiments(connection):
            return
        row = connection.execute(
            "SELECT artifact_location FROM experiments WHERE name = ?", (get_experiment_name(),)
        ).fetchone()
        suffix = "/" + "/".join(new_uri.rsplit("/", 2)[1:])
        if row is None or row[0] == new_uri or not str(row[0]).endswith(suffix):
            return
        old_uri = str(row[0])
        logger.warning("the artifacts of %s were moved here from %s", database, old_uri)
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE name = ?",
            (new_uri, get_experiment_name()),
        )
        for table, column in _ARTIFACT_URI_COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE substr({column}, 1, ?) = ?",
                (new_uri, len(old_uri) + 1, len(old_uri) + 1, f"{old_uri}/"),
            )


def require_own_artifacts(database: Path, artifact_root: Path) -> None:
    """Check that the database, which a stranger may have made, keeps artifacts beside itself.

    Args:
        database: SQLite database of MLflow; nothing happens if it is missing or empty.
        artifact_root: Folder of all artifacts.

    Raises:
        DamagedFileError: The experiment or one of its runs has its artifacts elsewhere. One line.
    """
    if not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        if not _has_experiments(connection):
            return
        rows = connection.execute(
            "SELECT artifact_location FROM experiments WHERE name = :name UNION "
            "SELECT artifact_uri FROM runs JOIN experiments USING (experiment_id) "
            "WHERE experiments.name = :name",
            {"name": get_experiment_name()},
        ).fetchall()
    root = str(artifact_root.resolve())
    for (uri,) in rows:
        if not _is_below(str(uri), root):
            raise DamagedFileError(
                f"{database}: it keeps artifacts in {shorten_value(uri)}, outside of {root}: move "
                f"it away, or set {URI_VARIABLE}=sqlite:///{database} if you trust it"
            )


def _is_below(uri: str, root: str) -> bool:
    """Return whether a URI is that of a file or folder below an absolute path."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    path = os.path.normpath(f"/{unquote(parts.path)}")
    return parts.scheme in ("", "file") and os.path.commonpath([root, path]) == root
