"""Python files with networks of the user's own, which raysweep imports only if the user names them.

A user names a file with `--code FILE`, or passes a function of it in Python. Checkpoints, sweeps
and other files of raysweep contain only its SHA-256: the file is imported if the user's call has
named a file with exactly this content, and never because a file of raysweep refers to it.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from raysweep.bounded_files import read_regular_file
from raysweep.errors import SpecError, get_first_line
from raysweep.visible_text import show_characters

_MODULE_PREFIX = "raysweep_code_"
_SHA256 = re.compile("[0-9a-f]{64}")
# Digits of a SHA-256 in messages.
_N_SHOWN_DIGITS = 12
_MAX_LISTED_NAMES = 10


@dataclass(frozen=True)
class CodeFile:
    """A Python file that the user's call has named. It can be sent to other processes.

    Attributes:
        path: Where it was read, for messages.
        source: Its content.
    """

    path: str
    source: bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, as 64 hexadecimal digits."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def module_name(self) -> str:
        """Name under which it is imported."""
        return f"{_MODULE_PREFIX}{self.sha256}"


# By SHA-256: files that calls of this process have named, and the modules imported from them.
_files: dict[str, CodeFile] = {}
_modules: dict[str, ModuleType] = {}


def open_code_file(path: str | Path) -> CodeFile:
    """Read a Python file and permit `import_code_function` to import it. Nothing runs yet.

    Args:
        path: The file. Settings name it by the `sha256` of the result, such as `model.code`.

    Returns:
        The file.

    Raises:
        SpecError: It cannot be read.
    """
    shown, path = str(path), Path(path).absolute()
    try:
        code_file = CodeFile(str(path), read_regular_file(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or get_first_line(error)
        raise SpecError(f"--code {shown}: cannot be read: {reason}") from error
    _files[code_file.sha256] = code_file
    return code_file


def open_function_file(function: Callable[..., Any]) -> CodeFile:
    """Read the file of a function or class that the caller has imported, as `open_code_file` does.

    Args:
        function: Defined at the top of a Python file.

    Returns:
        The file. Its functions are those of the caller's module: it does not run again.

    Raises:
        SpecError: It has no file, such as a function of a notebook's cell.
    """
    name = getattr(function, "__qualname__", repr(function))
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        path = None
    module = sys.modules.get(getattr(function, "__module__", ""))
    if path is None or module is None or not Path(path).is_file():
        raise SpecError(f"code = {name}: has no file; write it into one and give the file")
    code_file = open_code_file(path)
    _modules[code_file.sha256] = module
    return code_file


@contextmanager
def forget_code_afterwards() -> Iterator[None]:
    """Forget, after the block, the files that were named in it: each call names its own files."""
    before = dict(_files)
    try:
        yield
    finally:
        _files.clear()
        _files.update(before)


def list_code_files() -> list[CodeFile]:
    """List the files that calls of this process have named, to send them to worker processes."""
    return list(_files.values())


def adopt_code_files(code_files: Sequence[CodeFile]) -> None:
    """Permit this worker process to import the files of the driver.

    Args:
        code_files: What `list_code_files` returned in the driver.
    """
    _files.update((code_file.sha256, code_file) for code_file in code_files)


def is_code_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256 as `CodeFile.sha256` writes it."""
    return _SHA256.fullmatch(text) is not None


def find_code_file(sha256: str, name: str) -> CodeFile:
    """Find the file of a function among those that this process was given.

    Args:
        sha256: SHA-256 of the file, as a setting or a file of raysweep names it.
        name: The function, for messages.

    Returns:
        The file.

    Raises:
        SpecError: No file with this SHA-256 was given. One line.
    """
    if sha256 in _files:
        return _files[sha256]
    line = f"{show_characters(name)!r} is a function of a file with SHA-256 {_shorten(sha256)}"
    if not _files:
        raise SpecError(f"{line}, which runs only if you name it: --code FILE (in Python: code)")
    given = ", ".join(f"{one.path} has {_shorten(one.sha256)}" for one in _files.values())
    raise SpecError(f"{line}; {given}: it is another file, or was changed since")


def import_code_function(sha256: str, name: str) -> Callable[..., Any]:
    """Import a function or class of a file that this process was given.

    Args:
        sha256: SHA-256 of the file.
        name: Name at the top of the file.

    Returns:
        The function.

    Raises:
        SpecError: No such file was given, importing it fails, or it has no such function. One line.
    """
    code_file = find_code_file(sha256, name)
    module = _import_module(code_file)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if name.startswith("_") or not callable(function):
        known = ", ".join(list_code_functions(code_file)[:_MAX_LISTED_NAMES]) or "none"
        raise SpecError(f"{code_file.path}: has no function {name!r}; it has: {known}")
    return function


def list_code_functions(code_file: CodeFile) -> list[str]:
    """Import a file, and return the names of the functions and classes that it defines.

    Args:
        code_file: The file. Names that start with `_`, and what it imports itself, are left out.

    Raises:
        SpecError: Importing it fails. One line.
    """
    module = _import_module(code_file)
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]


def list_code_modules() -> list[ModuleType]:
    """List the modules that this process imported from such files; other processes lack them."""
    return [module for module in _modules.values() if sys.modules.get(module.__name__) is module]


def is_code_module(module: ModuleType) -> bool:
    """Return whether a module was imported from a file that a call has named."""
    return any(module is other for other in _modules.values())


@contextmanager
def convert_code_errors(sha256: str, name: str) -> Iterator[None]:
    """Convert any error of a function of a file into a SpecError of one line, with file and line.

    Args:
        sha256: SHA-256 of the file, which this process was given.
        name: The function.

    Raises:
        SpecError: The block failed.
    """
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(_describe_error(find_code_file(sha256, name), name, error)) from error


def _import_module(code_file: CodeFile) -> ModuleType:
    """Import the content that was hashed, even if the file has changed since."""
    if code_file.sha256 in _modules:
        return _modules[code_file.sha256]
    module = ModuleType(code_file.module_name)
    module.__file__ = code_file.path
    # Dataclasses and pickle look a class up in its module.
    sys.modules[code_file.module_name] = module
    try:
        exec(compile(code_file.source, code_file.path, "exec"), vars(module))
    except Exception as error:
        del sys.modules[code_file.module_name]
        raise SpecError(_describe_error(code_file, "", error)) from error
    _modules[code_file.sha256] = module
    return module


def _describe_error(code_file: CodeFile, name: str, error: Exception) -> str:
    """Describe an error of the user's code in one line, with the number of the failing line."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == code_file.path
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f"{code_file.path}:{lines[-1]}" if lines else code_file.path
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        message += "; a code file may import installed packages, no files beside it"
    return f"{where}: {name + ': ' if name else ''}{type(error).__name__}: {message}"


def _shorten(sha256: str) -> str:
    """Return the first digits of a SHA-256, for messages."""
    return f"{sha256[:_N_SHOWN_DIGITS]}..."
