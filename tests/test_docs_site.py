"""The documentation as a site: it builds without warnings and loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build` builds it: strict, so that no link leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "commands"}
    assert len(pages) > 20
    assert pages <= {path.stem for path in site.glob("*.html")}
    home = (site / "index.html").read_text()
    linked = set(re.findall(r'href="([\w.-]+)\.html"', home))
    assert pages - {"index"} <= linked, "the navigation leads to every page"


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    # The page for what is missing names files by absolute addresses.
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 50
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"', text
        )
        assert not [address for address in loaded if re.match(r"\w+:|//", address)], page
        for address in loaded:
            assert (page.parent / address.partition("?")[0]).exists(), f"{page}: {address}"


@pytest.mark.slow
def test_the_reference_is_made_from_the_code(site: Path) -> None:
    api = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    # A word of each docstring: arguments and attributes, with their descriptions.
    for words in ("robust_accuracy", "pandas", "Infrastructure"):
        assert words in api
    commands = (site / "commands.html").read_text()
    for name in ("tune", "show", "eval", "doctor"):
        assert f"raysweep {name}" in commands
    assert "--max-gpu-hours" in commands and "--address" in commands


@pytest.mark.slow
def test_a_link_to_a_source_file_leads_to_its_page(site: Path) -> None:
    page = (site / "extend.html").read_text()
    assert 'href="source/raysweep/catalog.py.html"' in page
    source = re.sub(r"<[^>]+>", "", (site / "source/raysweep/catalog.py.html").read_text())
    assert "def gairat" in source
