"""Storage of runs: local folders, or buckets (s3://, gs://) with a working copy on each machine.

All code works on paths. Each path in the working copy corresponds to an object of the bucket: push
the file after writing, pull it before reading, and delete it in both places. For all other paths
the functions for buckets do nothing, unless their docstring describes it.

The bucket is the source of truth. The working copy is a cache in $RAYSWEEP_CACHE (default:
~/.cache/raysweep); it may be deleted at any time, and machines must not share it.

A checkpoint is a folder with a `meta.json`. That file is uploaded last and deleted first, so that
readers of the bucket find a complete checkpoint or none. Credentials are read from the environment;
a URI with credentials is an error.

Functions that use the network raise `InfrastructureError` if the bucket refuses access, and
`BucketUnavailable` if it does not answer for about two minutes.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from raysweep.atomic_files import atomic_open
from raysweep.errors import DamagedFileError, InfrastructureError
from raysweep.spec import JsonDict, SpecError, describe_unknown_name

logger = logging.getLogger(__name__)

META_FILE = "meta.json"
# Seconds between attempts. The sum is the time for which a bucket may be unavailable: two minutes.
_RETRY_DELAYS = (1, 2, 4, 8, 16, 32, 64)
# Timeout of a request to S3 in seconds, and number of requests that pyarrow sends in one attempt.
_REQUEST_TIMEOUT = 20
_MAX_REQUEST_ATTEMPTS = 3
_ACCESS_DENIED_PATTERN = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE|HTTP status 40[13]"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|authenticate the request"
)
# Parts of pyarrow's error messages that are not the reason, and are removed.
_ERROR_NOISE_PATTERN = re.compile(
    r"^.*AWS Error |\s*\(Request ID: [^)]*\)"
    r"|^.*google::cloud::Status\(|Learn more .*? error message was: |\s*error_info=.*$"
)
_CACHE_MAX_BYTES = 50 * 2**30
_CHUNK_BYTES = 16 * 2**20
# A checkpoint may be evicted from the working copy this number of seconds after its last use.
_EVICTION_MIN_AGE = 3600.0
OperationResult = TypeVar("OperationResult")


class BucketUnavailable(InfrastructureError, OSError):
    """The bucket did not answer any of several attempts."""

    hint = "; no file in the bucket is damaged: run the command again (a sweep: with --resume)"


@dataclass(frozen=True)
class RemoteFile:
    """A file in a bucket.

    Attributes:
        path: Its path in the working copy; the file need not exist there.
        size: Bytes.
        modified: Time of its upload, in Unix seconds.
    """

    path: Path
    size: int
    modified: float


def is_uri(location: str) -> bool:
    """Return whether a location is a URI, not a local path.

    Args:
        location: Path or URI.

    Returns:
        Whether it contains `://`.
    """
    return "://" in location


def local_path(location: str) -> Path:
    """Convert a path or URI to a local path, without using the network.

    Args:
        location: Local path (`~` is expanded), `s3://BUCKET/PATH` or `gs://BUCKET/PATH`. A URI may
            end with options, such as `?region=eu-west-1` or `?endpoint_override=HOST:PORT`.

    Returns:
        The absolute path; for a URI the corresponding path in the working copy.

    Raises:
        SpecError: The URI contains credentials, `..`, or another scheme.
    """
    if not is_uri(location):
        return Path(location).expanduser().resolve()
    parts = urlsplit(location)
    login, _, bucket = parts.netloc.rpartition("@")
    if login and (parts.scheme, login) != ("gs", "anonymous"):
        raise SpecError(
            f"{parts.scheme}://...@{bucket}: credentials belong in the environment, not in a URI"
        )
    folders = [part for part in parts.path.split("/") if part]
    if parts.scheme not in ("s3", "gs") or not bucket or {".", ".."} & {*folders, bucket}:
        raise SpecError(f"{location}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH")
    queries = [parts.query]
    if parts.scheme == "s3":
        queries.append(_read_endpoint_from_environment(parts.query))
    query = "&".join(filter(None, queries))
    store = f"{parts.scheme}?{query}".rstrip("?")
    return _cache_root().joinpath(_encode_store_name(store), parts.netloc, *folders)


def _read_endpoint_from_environment(query: str) -> str:
    """Return the S3 server in Amazon's environment variables as options of a URI.

    The URI must contain the server, because these variables may not be set on other machines.
    """
    variables = [
        name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)
    ]
    if not variables or "endpoint_override" in query:
        return ""
    server = urlsplit(os.environ[variables[0]])
    if (
        server.scheme not in ("http", "https")
        or not server.hostname
        or "@" in server.netloc
        or server.path.strip("/")
    ):
        raise SpecError(f"{variables[0]}: expected http://HOST:PORT or https://HOST")
    return urlencode({"endpoint_override": server.netloc, "scheme": server.scheme}, safe=":")


def uri_of(path: Path) -> str:
    """Convert a local path to a location that is the same on every machine.

    Args:
        path: Absolute path.

    Returns:
        The URI for a path in the working copy, otherwise the path as text.
    """
    if not is_bucket_copy(path):
        return str(path)
    store, *bucket_and_folders = path.relative_to(_cache_root()).parts
    scheme, _, query = _decode_store_name(store).partition("?")
    uri = f"{scheme}://{'/'.join(bucket_and_folders)}"
    return f"{uri}?{query}" if query else uri


def is_bucket_copy(path: Path) -> bool:
    """Return whether a path corresponds to an object or folder of a bucket.

    Args:
        path: Absolute path; it need not exist.

    Returns:
        Whether it is in the working copy.
    """
    return path.is_relative_to(_cache_root())


def require_reachable(location: str) -> Path:
    """Convert a location with `local_path`, and check once that its bucket exists and answers.

    Args:
        location: Path or URI.

    Returns:
        The local path.

    Raises:
        SpecError: The URI is wrong.
        InfrastructureError: The bucket does not exist, answer or grant access.
    """
    path = local_path(location)
    if is_bucket_copy(path):
        try:
            files, key = _resolve_remote(path)
            bucket = key.split("/")[0]
            bucket_type = files.get_file_info(bucket).type
        except (OSError, _arrow_error_type()) as error:
            raise InfrastructureError(f"{location}: {_describe_error(error)}") from error
        # The type of a missing object is 0.
        if not bucket_type:
            raise InfrastructureError(
                f"{location}: there is no bucket {bucket!r}, or none that these credentials may see"
            )
    return path


def push_to_bucket(path: Path, copy_from: Path | None = None) -> None:
    """Upload a file or a checkpoint folder. Do nothing for other paths.

    Args:
        path: File or checkpoint folder in the working copy.
        copy_from: Checkpoint folder with the same files except `meta.json`. Files that the bucket
            has there are copied inside the bucket instead of uploaded.
    """
    if not is_bucket_copy(path):
        return
    files = _list_with_meta_last(path) if path.is_dir() else [path]
    for file in files:
        is_copied = (
            copy_from is not None
            and file.name != META_FILE
            and _with_retries(_copy_remote_file, copy_from / file.name, file)
        )
        if not is_copied:
            _with_retries(_upload_file, file)
    _evict_lru()


def copy_folder(source: Path, target: Path) -> None:
    """Copy a checkpoint folder in the bucket, without creating the copy on this machine.

    Files that the bucket has are copied inside the bucket; the others are uploaded from `source`.

    Args:
        source: Checkpoint folder on this machine, in the working copy.
        target: Path in the working copy that corresponds to the new folder.
    """
    for file in _list_with_meta_last(source):
        if not _with_retries(_copy_remote_file, file, target / file.name):
            _with_retries(_upload_file, target / file.name, file)


def pull_checkpoint(path: Path) -> bool:
    """Download a checkpoint if the bucket's differs; delete it here if the bucket has none.

    Args:
        path: Checkpoint folder; a folder outside the working copy is not changed.

    Returns:
        Whether the checkpoint exists.
    """
    if is_bucket_copy(path):
        meta = _with_retries(_read_remote_file, path / META_FILE)
        if meta is None:
            shutil.rmtree(path, ignore_errors=True)
        elif _read_local_file(path / META_FILE) != meta:
            _with_retries(_download_checkpoint, path, meta)
            _evict_lru()
        else:
            os.utime(path)
    return (path / META_FILE).is_file()


def pull_file(path: Path) -> bool:
    """Download a file if its content in the bucket differs; delete it here if the bucket has none.

    Args:
        path: The file; a file outside the working copy is not changed.

    Returns:
        Whether the file exists.
    """
    if is_bucket_copy(path):
        content = _with_retries(_read_remote_file, path)
        if content is None:
            path.unlink(missing_ok=True)
        elif _read_local_file(path) != content:
            with atomic_open(path) as stream:
                stream.write(content)
    return path.is_file()


def read_remote_file(path: Path) -> bytes | None:
    """Return the content of a file in the bucket, without changing the copy on this machine.

    Args:
        path: File in the working copy of a bucket.

    Returns:
        The content; None if the bucket has no such file.
    """
    return _with_retries(_read_remote_file, path)


def pull_files(path: Path, pattern: str) -> None:
    """Sync the matching files below a folder from the bucket; delete files that are gone there.

    Args:
        path: Folder; a folder outside the working copy is not changed.
        pattern: Glob of the last parts of a path, such as `trial.json` or `*/trial.json`.
    """
    if is_bucket_copy(path):
        remote = [entry.path for entry in list_remote_files(path) if entry.path.match(pattern)]
        for deleted in set(path.rglob(pattern)) - set(remote):
            deleted.unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pull_file, remote))


def read_json(path: Path, required_keys: Iterable[str]) -> JsonDict:
    """Read a JSON object that raysweep wrote, without a download.

    Args:
        path: The file; if it is in a bucket, call `pull_file` first.
        required_keys: Keys that the object must have.

    Returns:
        The object.

    Raises:
        DamagedFileError: The file is damaged: it is not a JSON object, or lacks a required
            key. One line.
        FileNotFoundError: There is no file.
    """
    cause: ValueError | None = None
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        data, cause = None, error
    problem = ""
    if not isinstance(data, dict):
        problem = "it is no JSON object"
    elif missing_keys := sorted(set(required_keys) - data.keys()):
        problem = f"it lacks {', '.join(missing_keys)}"
    if problem:
        raise DamagedFileError(
            f"{uri_of(path)} is damaged: {problem}; restore it, or start anew under another --name"
        ) from cause
    return data  # type: ignore[no-any-return]


def delete_remote(path: Path) -> None:
    """Delete a folder from the bucket, but not its local copy. Do nothing for other paths.

    Args:
        path: Folder in the working copy, of a checkpoint or other files.
    """
    if is_bucket_copy(path):
        _with_retries(_delete_remote_object, path / META_FILE)
        _with_retries(_delete_remote_folder, path)


def delete_everywhere(path: Path) -> None:
    """Delete a folder from this machine, and from the bucket if it is in the working copy.

    Args:
        path: Folder; it need not exist.
    """
    if is_bucket_copy(path) and list_remote_files(path):
        delete_remote(path)
    shutil.rmtree(path, ignore_errors=True)


def delete_remote_file(path: Path) -> None:
    """Delete a file from the bucket, but not its local copy. Do nothing for other paths.

    Args:
        path: File in the working copy.
    """
    if is_bucket_copy(path):
        _with_retries(_delete_remote_object, path)


def list_remote_files(path: Path) -> list[RemoteFile]:
    """List all files of the bucket below a folder.

    Args:
        path: Folder in the working copy.

    Returns:
        The files; none if the folder does not exist.
    """
    return _with_retries(_list_remote_objects, path)


def iter_files(path: Path) -> Iterator[Path]:
    """Iterate over all files below a folder, in the bucket or on this machine.

    Args:
        path: Folder.

    Returns:
        Paths, in no particular order. Those of a bucket need not exist on this machine.
    """
    if is_bucket_copy(path):
        return (entry.path for entry in list_remote_files(path))
    return filter(Path.is_file, path.rglob("*"))


def list_folders_containing(path: Path, file_name: str = META_FILE) -> list[str]:
    """List the subfolders that directly contain a file, in the bucket or on this machine.

    Args:
        path: Folder.
        file_name: File to look for; by default the one that makes a folder a checkpoint.

    Returns:
        Sorted names of the subfolders, without hidden ones.
    """
    if is_bucket_copy(path):
        files = [entry.path for entry in list_remote_files(path)]
    else:
        files = list(path.glob(f"*/{file_name}"))
    names = set()
    for file in files:
        folder = file.parent
        if file.name == file_name and folder.parent == path and not folder.name.startswith("."):
            names.add(folder.name)
    return sorted(names)


def list_subfolders(path: Path) -> list[str]:
    """List the direct subfolders, in the bucket or on this machine.

    Args:
        path: Folder; it need not exist.

    Returns:
        Sorted names.
    """
    if is_bucket_copy(path):
        remote_parts = [entry.path.relative_to(path).parts for entry in list_remote_files(path)]
        return sorted({parts[0] for parts in remote_parts if len(parts) > 1})
    if not path.is_dir():
        return []
    return sorted(child.name for child in path.iterdir() if child.is_dir())


def _cache_root() -> Path:
    """Return the folder of all working copies."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAYSWEEP_CACHE") or Path(home) / "raysweep").resolve()


def _encode_store_name(store: str) -> str:
    """Encode scheme and options as a folder name that Ray, which parses paths as URIs, accepts."""
    return quote(store, safe="").replace("~", "%7E").replace("%", "~")


def _decode_store_name(folder_name: str) -> str:
    """Undo `_encode_store_name`."""
    return unquote(folder_name.replace("~", "%"))


def _resolve_remote(path: Path) -> tuple[Any, str]:
    """Return the pyarrow file system of a path in the working copy, and its key there."""
    parts = path.relative_to(_cache_root()).parts
    files, bucket = _open_file_system(*parts[:2])
    return files, "/".join((bucket, *parts[2:]))


@cache
def _open_file_system(store: str, bucket: str) -> tuple[Any, str]:
    """Connect to a bucket; return its pyarrow file system and the bucket's key."""
    from pyarrow import fs

    scheme, _, query = _decode_store_name(store).partition("?")
    options = dict(parse_qsl(query))
    if scheme == "gs":
        # By default Google's client retries for 15 minutes.
        query = urlencode({"retry_limit_seconds": 15, **options})
        files, key = fs.FileSystem.from_uri(f"gs://{bucket}?{query}")
        return files, str(key)
    known_options = ["endpoint_override", "region", "scheme"]
    if unknown := options.keys() - set(known_options):
        raise SpecError(
            describe_unknown_name("option of an s3:// URI", min(unknown), known_options)
        )
    if "endpoint_override" not in options and "region" not in options:
        options["region"] = fs.resolve_s3_region(bucket)
    # By default the client waits forever for a server that accepts but does not answer.
    files = fs.S3FileSystem(
        **options,
        connect_timeout=_REQUEST_TIMEOUT,
        request_timeout=_REQUEST_TIMEOUT,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_REQUEST_ATTEMPTS),
        allow_delayed_open=True,
    )
    return files, bucket


def _with_retries(
    operation: Callable[..., OperationResult], path: Path, *args: Any
) -> OperationResult:
    """Call `operation(path, *args)` until the bucket answers.

    Raises InfrastructureError if access is denied, and BucketUnavailable after the last attempt.
    """
    started_at = time.monotonic()
    for attempt, delay in enumerate((*_RETRY_DELAYS, None), 1):
        try:
            result = operation(path, *args)
        except FileNotFoundError:
            raise
        except (OSError, _arrow_error_type()) as error:
            if _ACCESS_DENIED_PATTERN.search(str(error)):
                raise InfrastructureError(f"{uri_of(path)}: {_describe_error(error)}") from error
            if delay is None:
                raise BucketUnavailable(f"{uri_of(path)}: {_describe_error(error)}") from error
            logger.warning(
                "%s: %s; attempt %d again in %d s",
                uri_of(path),
                _describe_error(error),
                attempt + 1,
                delay,
                extra={"operation": operation.__name__.strip("_"), "attempt": attempt},
            )
            time.sleep(delay)
        else:
            if attempt > 1:
                seconds = time.monotonic() - started_at
                logger.warning(
                    "%s: answers again, after %d attempts in %.0f s",
                    uri_of(path),
                    attempt,
                    seconds,
                    extra={"operation": operation.__name__.strip("_"), "attempt": attempt},
                )
            return result
    raise AssertionError


def _list_with_meta_last(folder: Path) -> list[Path]:
    """List the files of a checkpoint folder in the order of upload."""
    return sorted(folder.iterdir(), key=lambda file: file.name == META_FILE)


def _upload_file(path: Path, content: Path | None = None) -> None:
    """Upload a file as the object that corresponds to `path`; by default the file at `path`."""
    files, key = _resolve_remote(path)
    # `fs.copy_files` does not report an upload that fails at its end.
    with (content or path).open("rb") as source, files.open_output_stream(key) as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)


def _copy_remote_file(source: Path, target: Path) -> bool:
    """Copy a file inside the bucket; return False if the bucket does not have it."""
    files, key = _resolve_remote(source)
    try:
        files.copy_file(key, _resolve_remote(target)[1])
    except FileNotFoundError:
        return False
    except OSError as error:
        if "NO_SUCH_KEY" not in str(error):
            raise
        return False
    return True


def _read_remote_file(path: Path) -> bytes | None:
    """Return the content of a file in the bucket; None if there is none."""
    files, key = _resolve_remote(path)
    while True:
        try:
            with files.open_input_stream(key) as stream:
                content = bytes(stream.read())
        except FileNotFoundError:
            return None
        # pyarrow requests the length before the content. If a longer object replaces this one in
        # between, the content is truncated: read again until the size matches.
        if files.get_file_info(key).size in (len(content), None):
            return content


def _download_checkpoint(path: Path, meta_content: bytes) -> None:
    """Download a complete checkpoint folder, or none if the bucket's is deleted meanwhile."""
    from pyarrow import fs

    files, key = _resolve_remote(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fs.copy_files(
            key,
            str(partial),
            source_filesystem=files,
            destination_filesystem=fs.LocalFileSystem(),
            chunk_size=_CHUNK_BYTES,
        )
        (partial / META_FILE).write_bytes(meta_content)
        if _read_local_file(path / META_FILE) == meta_content:
            return  # Another process of this machine was faster, and may be reading the folder.
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # Another process of this machine may have been faster.
            partial.replace(path)
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _delete_remote_object(path: Path) -> None:
    """Delete a file of the bucket, if it is there."""
    files, key = _resolve_remote(path)
    with suppress(FileNotFoundError):
        files.delete_file(key)


def _delete_remote_folder(path: Path) -> None:
    """Delete a folder of the bucket, if it is there."""
    files, key = _resolve_remote(path)
    with suppress(FileNotFoundError):
        files.delete_dir(key)


def _list_remote_objects(path: Path) -> list[RemoteFile]:
    """List all files of the bucket below a folder, in one attempt."""
    from pyarrow import fs

    files, key = _resolve_remote(path)
    infos = files.get_file_info(fs.FileSelector(key, allow_not_found=True, recursive=True))
    return [
        RemoteFile(path / info.path.removeprefix(f"{key}/"), info.size, info.mtime.timestamp())
        for info in infos
        if info.type == fs.FileType.File
    ]


def _read_local_file(path: Path) -> bytes | None:
    """Return the content of a file on this machine; None if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _evict_lru() -> None:
    """Delete the least recently used checkpoints until all working copies are below 50 GiB.

    Readers call `pull_checkpoint` first, which downloads a deleted checkpoint again.
    """
    checkpoints: list[tuple[float, int, Path]] = []
    with suppress(OSError):  # Other processes may delete files meanwhile.
        for folder in [meta.parent for meta in _cache_root().rglob(META_FILE)]:
            last_use = folder.stat().st_mtime
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
            checkpoints.append((last_use, n_bytes, folder))
    total_bytes = sum(n_bytes for _, n_bytes, _ in checkpoints)
    for last_use, n_bytes, folder in sorted(checkpoints):
        if total_bytes <= _CACHE_MAX_BYTES or time.time() - last_use < _EVICTION_MIN_AGE:
            return
        logger.info("evicted the copy of %s, %d bytes, on this machine", uri_of(folder), n_bytes)
        shutil.rmtree(folder, ignore_errors=True)
        total_bytes -= n_bytes


def _arrow_error_type() -> type[Exception]:
    """Return pyarrow's base exception. Imported at first use, because the import is slow."""
    from pyarrow.lib import ArrowException

    return ArrowException  # type: ignore[no-any-return]


def _describe_error(error: Exception) -> str:
    """Return the reason in one line, with a hint if access was denied."""
    reason = _ERROR_NOISE_PATTERN.sub("", str(error).splitlines()[0])
    description = reason.rstrip(". ")
    if _ACCESS_DENIED_PATTERN.search(reason):
        description += (
            "; credentials come from the environment (for s3: AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or a role)"
        )
    return description
