"""Find out from the text of a file which modules it imports."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "raysweep"


def imports(path: Path, nested: bool = True) -> set[str]:
    """Names of the modules that a file imports; without `nested`, only by statements at its top
    level.
    """
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "raysweep" or node.module.startswith("raysweep."):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_importable(path: Path) -> bool:
    """Whether all libraries are installed that a test file imports, itself or through files of this
    project.
    """
    files, seen = [path], {path}
    while files:
        file = files.pop()
        for name in _imports(file):
            found = _find_own_files(name, file.parent)
            if not found and not _is_installed(name.partition(".")[0]):
                return False
            files += [one for one in found if one not in seen]
            seen.update(found)
    return True


_is_installed = cache(lambda name: importlib.util.find_spec(name) is not None)
_imports = cache(lambda path: imports(path, nested=False))


@cache
def _find_own_files(name: str, folder: Path) -> list[Path]:
    """The files of this project that are executed when a file in `folder` imports the module
    `name`.
    """
    top, *rest = name.split(".")
    if top != "raysweep":
        places = ("tests", "tests/security", "benchmarks")
        folders = [folder, *(PACKAGE.parent / place for place in places)]
        if folder.is_relative_to(PACKAGE):
            folders = []
        return [place / f"{top}.py" for place in folders if (place / f"{top}.py").is_file()][:1]
    packages = [PACKAGE.joinpath(*rest[:depth], "__init__.py") for depth in range(len(rest) + 1)]
    return [
        file for file in (*packages, PACKAGE.joinpath(*rest).with_suffix(".py")) if file.is_file()
    ]
