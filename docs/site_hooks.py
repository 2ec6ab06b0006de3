"""Hooks of mkdocs for the pages of the site that are no files of docs/.

The README is the first page, `commands.md` has the help of every command, and each file of the
repository that a page links to is a page, too, so that the site is complete without a network.
"""

import argparse
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^(```.*?^```)", re.M | re.S)
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".sh": "sh",
    ".tf": "hcl",
}
# Copied as they are.
_COPIED = (".png", ".svg", ".npz", ".json")
_HELP_WIDTH = "100"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the page of commands and what the pages link to."""
    files.append(File.generated(config, "commands.md", content=_write_commands_page()))
    waiting = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    waiting += [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        uri = _find_uri(path)
        if files.get_file_from_path(uri) is None:
            files.append(_make_file(path, uri, config))
        if path.suffix == ".md":
            waiting += _list_linked_paths(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files of the repository links to their pages."""
    path = _find_path(page.file.src_uri)
    if path.suffix != ".md" or not path.exists():
        return markdown
    start = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        target = posixpath.relpath(_find_uri(_resolve(path, match[1])), start or ".")
        return f"]({target}{match[2] or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def _list_linked_paths(page: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository to which a page links."""
    for link, _ in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        yield _resolve(page, link)


def _resolve(page: Path, link: str) -> Path:
    """Return the file or folder to which a link of a page leads."""
    return Path(os.path.normpath(page.parent / link))


def _find_uri(path: Path) -> str:
    """Return the address in the site of a file or folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if path.is_dir():
        return f"source/{name}/index.md"
    return name if path.suffix in (".md", *_COPIED) else f"source/{name}.md"


def _find_path(uri: str) -> Path:
    """Return the file of a page of the site that is written in Markdown."""
    if uri == "index.md":
        return ROOT / "README.md"
    path = ROOT / "docs" / uri
    return path if path.exists() else ROOT / uri


def _make_file(path: Path, uri: str, config: MkDocsConfig) -> File:
    """Return the page of a file or folder that is not in docs/."""
    if path.suffix in (".md", *_COPIED):
        return File.generated(config, uri, abs_src_path=str(path))
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        content = "\n".join(
            f"- `{child.name}{'/' if child.is_dir() else ''}`"
            for child in sorted(path.iterdir())
            if not child.name.startswith((".", "__"))
        )
    else:
        text = path.read_text(encoding="utf-8")
        language = _LANGUAGES.get(PurePosixPath(name).suffix, "text")
        content = f"````{language}\n{text}\n````"
    # Sources are not searched: their words would hide those of the pages.
    return File.generated(
        config, uri, content=f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n{content}\n"
    )


def _write_commands_page() -> str:
    """Return the page with the help of each command."""
    os.environ["COLUMNS"] = _HELP_WIDTH
    from raysweep.cli import build_parser

    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    sections = [f"# Commands\n\n```text\n{parser.format_help()}```\n"]
    sections += [
        f"## raysweep {name}\n\n```text\n{command.format_help()}```\n"
        for name, command in commands.choices.items()
    ]
    return "\n".join(sections)
