"""Where runs live: a folder, or a bucket (s3://, gs://) of which this machine has a working copy.

All code works on paths. A path in a working copy stands for an object of the bucket: it is pushed
once it is written, pulled before it is read, dropped when it goes. For every other path these do
nothing. The bucket is the truth: a copy may be deleted at any time, and no two machines share one.
Copies are in $RAYSWEEP_CACHE (default: ~/.cache/raysweep).

A folder with a `meta.json` (a checkpoint) is pushed with that file last and dropped with it first:
whoever reads the bucket sees all of it or none. Credentials are the environment's; a URI that holds
any is refused.
"""

import json
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
from raysweep.spec import JsonDict, SpecError, describe_unknown_name

META_FILE = "meta.json"
# Seconds between attempts: a bucket may be out of reach for two minutes. And until one without an
# answer is given up.
_RETRY_DELAYS = (1, 2, 4, 8, 16, 32, 64)
_REQUEST_TIMEOUT = 20
_MAX_REQUEST_ATTEMPTS = 3
_ACCESS_DENIED_PATTERN = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE|HTTP status 40[13]"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|authenticate the request"
)
# What pyarrow wraps around the one thing to know.
_ERROR_NOISE_PATTERN = re.compile(
    r"^.*AWS Error |\s*\(Request ID: [^)]*\)"
    r"|^.*google::cloud::Status\(|Learn more .*? error message was: |\s*error_info=.*$"
)
_CACHE_MAX_BYTES = 50 * 2**30
_CHUNK_BYTES = 16 * 2**20
_EVICTION_MIN_AGE = 3600.0
OperationResult = TypeVar("OperationResult")


class BucketUnavailable(OSError):
    """The bucket did not answer, several times over."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a bucket, by the path that it has in the working copy. size: bytes; changed: Unix
    time.
    """

    path: Path
    size: int
    modified: float


def is_uri(location: str) -> bool:
    return "://" in location


def local_path(location: str) -> Path:
    """The folder that stands for `where`: itself, or a place in the working copy. Raises SpecError
    for a wrong URI.
    """
    if not is_uri(location):
        return Path(location).expanduser().resolve()
    parts = urlsplit(location)
    login, _, bucket = parts.netloc.rpartition("@")
    if login and (parts.scheme, login) != ("gs", "anonymous"):
        raise SpecError(
            f"{parts.scheme}://...@{bucket}: credentials belong in the environment, not in a URI"
        )
    steps = [step for step in parts.path.split("/") if step]
    if parts.scheme not in ("s3", "gs") or not bucket or {".", ".."} & {*steps, bucket}:
        raise SpecError(f"{location}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH")
    query = "&".join(
        filter(None, [parts.query, _endpoint_options(parts.query) if parts.scheme == "s3" else ""])
    )
    store = f"{parts.scheme}?{query}".rstrip("?")
    return _cache_root().joinpath(_encode_store_name(store), parts.netloc, *steps)


def _endpoint_options(query: str) -> str:
    """The server that Amazon's own tools would ask, as options of a URI: other machines may lack
    these variables.
    """
    key = next(
        (key for key in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(key)), None
    )
    if key is None or "endpoint_override" in query:
        return ""
    server = urlsplit(os.environ[key])
    if (
        server.scheme not in ("http", "https")
        or not server.hostname
        or "@" in server.netloc
        or server.path.strip("/")
    ):
        raise SpecError(f"{key}: expected http://HOST:PORT or https://HOST")
    return urlencode({"endpoint_override": server.netloc, "scheme": server.scheme}, safe=":")


def uri_of(path: Path) -> str:
    """What `path` is called on every machine: its URI, or the path itself."""
    if not is_bucket_copy(path):
        return str(path)
    store, *steps = path.relative_to(_cache_root()).parts
    scheme, _, query = _decode_store_name(store).partition("?")
    return f"{scheme}://{'/'.join(steps)}{f'?{query}' if query else ''}"


def is_bucket_copy(path: Path) -> bool:
    """Whether `path` stands for an object of a bucket."""
    return path.is_relative_to(_cache_root())


def require_reachable(location: str) -> Path:
    """`at(where)`, in a bucket that exists and answers. Raises SpecError in one line if it does
    not.
    """
    path = local_path(location)
    if is_bucket_copy(path):
        try:
            files, key = _resolve_remote(path)
            bucket = key.split("/")[0]
            found = files.get_file_info(bucket).type
        except (OSError, _arrow_error_type()) as error:
            raise SpecError(f"{location}: {_describe_error(error)}") from None
        if not found:
            raise SpecError(
                f"{location}: there is no bucket {bucket!r}, or none that these credentials may see"
            )
    return path


def push_to_bucket(path: Path, copy_from: Path | None = None) -> None:
    """Bring a file or a checkpoint's folder to the bucket.

    like: a folder whose files, `meta.json` aside, are the same: the bucket copies them, if it has
    them.
    """
    if not is_bucket_copy(path):
        return
    for file in _meta_last(path) if path.is_dir() else [path]:
        if (
            copy_from is None
            or file.name == META_FILE
            or not _with_retries(_copy_remote_file, copy_from / file.name, file)
        ):
            _with_retries(_upload_file, file)
    _evict_lru()


def copy_folder(source: Path, target: Path) -> None:
    """Store a checkpoint's folder in the bucket under another path, without writing that path on
    this machine.

    The bucket copies the files that it has; the others are uploaded from `source`.
    """
    for file in _meta_last(source):
        if not _with_retries(_copy_remote_file, file, target / file.name):
            _with_retries(_upload_file, target / file.name, file)


def pull_checkpoint(path: Path) -> bool:
    """Make the copy of a checkpoint's folder what the bucket has; whether there is a checkpoint."""
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
    """Make the copy of a file what the bucket has; whether there is one."""
    if is_bucket_copy(path):
        content = _with_retries(_read_remote_file, path)
        if content is None:
            path.unlink(missing_ok=True)
        elif _read_local_file(path) != content:
            with atomic_open(path) as stream:
                stream.write(content)
    return path.is_file()


def pull_files(path: Path, pattern: str) -> None:
    """Make the copies of all files below a folder that are called so what the bucket has."""
    if is_bucket_copy(path):
        found = [entry.path for entry in list_remote_files(path) if entry.path.match(pattern)]
        for gone in set(path.rglob(pattern)) - set(found):
            gone.unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pull_file, found))


def read_json(path: Path, required_keys: Iterable[str]) -> JsonDict:
    """A file that raysweep wrote, as it is here: a JSON object with these keys. SpecError in one
    line if it is damaged, FileNotFoundError if there is none.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError:
        data = None
    if not isinstance(data, dict) or (lacking := sorted(set(required_keys) - data.keys())):
        what = (
            f"it lacks {', '.join(lacking)}" if isinstance(data, dict) else "it is no JSON object"
        )
        raise SpecError(
            f"{uri_of(path)} is damaged: {what}; restore it, or start anew under another --name"
        )
    return data


def delete_remote(path: Path) -> None:
    """Take a folder, a checkpoint's or another, out of the bucket. The copy is the caller's."""
    if is_bucket_copy(path):
        _with_retries(_delete_remote_object, path / META_FILE)
        _with_retries(_delete_remote_folder, path)


def delete_everywhere(path: Path) -> None:
    """Delete a folder, in the bucket and here, if it is there."""
    if is_bucket_copy(path) and list_remote_files(path):
        delete_remote(path)
    shutil.rmtree(path, ignore_errors=True)


def delete_remote_file(path: Path) -> None:
    """Take a file out of the bucket. The copy is the caller's."""
    if is_bucket_copy(path):
        _with_retries(_delete_remote_object, path)


def list_remote_files(path: Path) -> list[RemoteFile]:
    """All files below a folder of a working copy that the bucket has."""
    return _with_retries(_list_remote_objects, path)


def iter_files(path: Path) -> Iterator[Path]:
    """All files below a folder, as the bucket has them or as they are here."""
    return (
        (entry.path for entry in list_remote_files(path))
        if is_bucket_copy(path)
        else filter(Path.is_file, path.rglob("*"))
    )


def list_folders_containing(path: Path, file_name: str = META_FILE) -> list[str]:
    """Names of the folders in a folder that hold this file, hidden ones left out."""
    found = (
        (entry.path for entry in list_remote_files(path))
        if is_bucket_copy(path)
        else path.glob(f"*/{file_name}")
    )
    names = {
        file.parent.name for file in found if file.name == file_name and file.parent.parent == path
    }
    return sorted(name for name in names if not name.startswith("."))


def list_subfolders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    if is_bucket_copy(path):
        below = [entry.path.relative_to(path).parts for entry in list_remote_files(path)]
        return sorted({name for name, *deeper in below if deeper})
    return sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _cache_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAYSWEEP_CACHE") or Path(home) / "raysweep").resolve()


def _encode_store_name(store: str) -> str:
    """Without a character that means something in a URI, for Ray takes paths for URIs."""
    return quote(store, safe="").replace("~", "%7E").replace("%", "~")


def _decode_store_name(folder_name: str) -> str:
    return unquote(folder_name.replace("~", "%"))


def _resolve_remote(path: Path) -> tuple[Any, str]:
    """The file system of a path in a working copy, and what the path is called there."""
    parts = path.relative_to(_cache_root()).parts
    files, bucket = _open_file_system(*parts[:2])
    return files, "/".join((bucket, *parts[2:]))


@cache
def _open_file_system(store: str, bucket: str) -> tuple[Any, str]:
    from pyarrow import fs

    scheme, _, query = _decode_store_name(store).partition("?")
    options = dict(parse_qsl(query))
    if scheme == "gs":
        # Google's client would try for a quarter of an hour.
        files, key = fs.FileSystem.from_uri(
            f"gs://{bucket}?{urlencode({'retry_limit_seconds': 15, **options})}"
        )
        return files, str(key)
    if unknown := options.keys() - {"endpoint_override", "region", "scheme"}:
        raise SpecError(
            describe_unknown_name(
                "option of an s3:// URI", min(unknown), ["endpoint_override", "region", "scheme"]
            )
        )
    if "endpoint_override" not in options and "region" not in options:
        options["region"] = fs.resolve_s3_region(bucket)
    # By itself it would wait forever for a server that accepts and does not answer.
    patience = {"connect_timeout": _REQUEST_TIMEOUT, "request_timeout": _REQUEST_TIMEOUT}
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_REQUEST_ATTEMPTS)
    return fs.S3FileSystem(
        **options, **patience, retry_strategy=retries, allow_delayed_open=True
    ), bucket


def _with_retries(
    operation: Callable[..., OperationResult], path: Path, *args: Any
) -> OperationResult:
    """Again and again while the bucket does not answer. Raises SpecError if it refuses, StoreFailed
    in the end.
    """
    for wait in (*_RETRY_DELAYS, None):
        try:
            return operation(path, *args)
        except FileNotFoundError:
            raise
        except (OSError, _arrow_error_type()) as error:
            if _ACCESS_DENIED_PATTERN.search(str(error)):
                raise SpecError(f"{uri_of(path)}: {_describe_error(error)}") from None
            if wait is None:
                raise BucketUnavailable(f"{uri_of(path)}: {_describe_error(error)}") from None
            time.sleep(wait)
    raise AssertionError


def _meta_last(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: file.name == META_FILE)


def _upload_file(path: Path, content: Path | None = None) -> None:
    """Upload a file, by default the one at `path` itself, as the object that `path` stands for."""
    files, key = _resolve_remote(path)
    # Not `fs.copy_files`: it does not tell of an upload that fails at its end.
    with (content or path).open("rb") as source, files.open_output_stream(key) as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)


def _copy_remote_file(source: Path, target: Path) -> bool:
    """Within the bucket; False if the source is not there."""
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
    files, key = _resolve_remote(path)
    while True:
        try:
            with files.open_input_stream(key) as stream:
                content = bytes(stream.read())
        except FileNotFoundError:
            return None
        # pyarrow asks for the length first: an object that was replaced before it was read is cut
        # off there.
        if files.get_file_info(key).size in (len(content), None):
            return content


def _download_checkpoint(path: Path, meta_content: bytes) -> None:
    """A checkpoint's folder, whole or, if it goes meanwhile, not at all."""
    from pyarrow import fs

    files, key = _resolve_remote(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        here = fs.LocalFileSystem()
        fs.copy_files(
            key,
            str(partial),
            source_filesystem=files,
            destination_filesystem=here,
            chunk_size=_CHUNK_BYTES,
        )
        (partial / META_FILE).write_bytes(meta_content)
        if _read_local_file(path / META_FILE) == meta_content:
            return  # another process of this machine was faster, and may be reading it
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # another process of this machine was faster
            partial.replace(path)
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _delete_remote_object(path: Path) -> None:
    files, key = _resolve_remote(path)
    with suppress(FileNotFoundError):
        files.delete_file(key)


def _delete_remote_folder(path: Path) -> None:
    files, key = _resolve_remote(path)
    with suppress(FileNotFoundError):
        files.delete_dir(key)


def _list_remote_objects(path: Path) -> list[RemoteFile]:
    from pyarrow import fs

    files, key = _resolve_remote(path)
    found = files.get_file_info(fs.FileSelector(key, allow_not_found=True, recursive=True))
    return [
        RemoteFile(path / info.path.removeprefix(f"{key}/"), info.size, info.mtime.timestamp())
        for info in found
        if info.type == fs.FileType.File
    ]


def _read_local_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _evict_lru() -> None:
    """Keep all copies together small: the least recently used checkpoints go. Whoever reads one
    pulls it first.
    """
    found: list[tuple[float, int, Path]] = []
    with suppress(OSError):  # other processes come and go
        for folder in [meta.parent for meta in _cache_root().rglob(META_FILE)]:
            found.append(
                (
                    folder.stat().st_mtime,
                    sum(file.stat().st_size for file in folder.iterdir()),
                    folder,
                )
            )
    size = sum(bytes_ for _, bytes_, _ in found)
    for used, bytes_, folder in sorted(found):
        if size <= _CACHE_MAX_BYTES or time.time() - used < _EVICTION_MIN_AGE:
            return
        shutil.rmtree(folder, ignore_errors=True)
        size -= bytes_


def _arrow_error_type() -> type[Exception]:
    from pyarrow.lib import ArrowException

    return ArrowException  # type: ignore[no-any-return]


def _describe_error(error: Exception) -> str:
    text = _ERROR_NOISE_PATTERN.sub("", str(error).splitlines()[0])
    hint = "; credentials come from the environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
    return text.rstrip(". ") + (hint if _ACCESS_DENIED_PATTERN.search(text) else "")
