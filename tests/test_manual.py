"""The manual: README's length, the tutorial as a notebook, and the site, built strictly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbclient
import nbformat
import pytest

from support import notebook
from support.pages import PROJECT, ROOT

README = (ROOT / "README.md").read_text()


def test_readme_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 900


def test_what_readme_links_to_is_there() -> None:
    found = re.findall(r'\]\((?!https?:)([^)#]+)|(?:src|srcset)="([^"]+)"', README)
    assert not [path for pair in found for path in pair if path and not (ROOT / path).exists()]


def test_an_index_of_packages_can_follow_every_link() -> None:
    text = README
    for rule in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"][
        "fancy-pypi-readme"
    ]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.findall(r'\]\((?!https://)|(?:src|srcset)="(?!https://)', text)


def test_the_notebook_is_the_tutorial(tmp_path: Path) -> None:
    text = notebook.NOTEBOOK.read_text()
    assert text == notebook.notebook(), "stale: run `python -m support.notebook`"
    run = nbclient.NotebookClient(nbformat.reads(text, 4), timeout=600, resources={"metadata": {"path": tmp_path}})
    cells = run.execute()["cells"]
    printed = "".join(part.get("text", "") for cell in cells for part in cell.get("outputs", ()))
    assert "fall-backs         none" in printed


class _Links(HTMLParser):
    """What a page of the site points to, and the places in it that can be pointed to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: _Links(page) for page in site.rglob("*.html")}
    dead = {
        f"{page.relative_to(site)}: {link}"
        for page, found in pages.items()
        for link in found.links
        if not _leads(page, link, pages)
    }
    assert not dead


def _leads(page: Path, link: str, pages: dict[Path, _Links]) -> bool:
    """Whether a link of a page of the site is to a place, a file of the repository, or outside."""
    parts = urlsplit(link)
    repository = f"{PROJECT['urls']['Repository']}/blob/main/"
    if link.startswith(repository):
        return (ROOT / unquote(urlsplit(link.removeprefix(repository)).path)).exists()
    if parts.scheme or parts.netloc or page.name == "404.html":
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return False
    return not parts.fragment or target.suffix != ".html" or unquote(parts.fragment) in pages[target].places


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    """But for what a reader clicks on."""
    fetched = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"')
    own = PROJECT["urls"]["Documentation"]
    found = {url for page in site.rglob("*.html") for url in fetched.findall(page.read_text())}
    assert {url for url in found if not url.startswith(own)} == set()
