"""What the pages ask of the site: parts of files that stand elsewhere in the repository, and links to these."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_INCLUDE = re.compile(r"^<!-- include: (?P<file>\S+?)(?:#(?P<section>.+))? -->$", re.MULTILINE)
_LINK = re.compile(r'(?P<before>\]\(|src="|srcset="|href=")(?P<path>[^)\s"#:]+)(?P<rest>#[^)"]*)?(?=[)"])')
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"^::: (?P<whole>(?P<package>\w+)\.(?:\w+\.)*(?P<name>\w+))$", re.MULTILINE)
_CODE = re.compile(r"(?<!<b>)<code>(?P<name>\w+)(?P<rest>(?:\.\w+)*)</code>(?!</(?:a|autoref)>)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page with its includes, and links that lead out of `docs` turned into those of the repository."""
    here = Path("docs", page.file.src_uri).parent
    text = _relinked(markdown, here, here, config.repo_url)
    return _INCLUDE.sub(lambda found: _included(found["file"], found["section"], here, config.repo_url), text)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The pages of the API with the names in their docstrings as links to where these are explained."""
    if not page.file.src_uri.startswith("api/"):
        return html
    return _CODE.sub(lambda found: _explained(found, _shown()), html)


def _explained(found: re.Match[str], shown: dict[str, str]) -> str:
    whole = shown.get(found["name"])
    return found[0] if whole is None else f'<autoref identifier="{whole}{found["rest"]}" optional>{found[0]}</autoref>'


@cache
def _shown() -> dict[str, str]:
    """Name -> dotted name of the classes on the API's pages, and of the functions that packages export themselves."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    every = [found for found in _SHOWN.finditer(pages) if found["name"][0].isupper() or found["whole"].count(".") == 1]
    once = Counter(found["name"] for found in every)
    return {found["name"]: found["whole"] for found in every if once[found["name"]] == 1}


def _included(name: str, section: str | None, here: Path, repository: str) -> str:
    """A file of the repository, or one of its `## ` sections, as part of a page in the folder `here`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if section is not None:
        text = f"## {section}\n" + text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return _relinked(text, Path(name).parent, here, repository)


def _relinked(text: str, source: Path, here: Path, repository: str) -> str:
    """Links of a text that stands in the folder `source`, for a page in the folder `here`; code is left alone."""
    parts = _FENCE.split(text)
    parts[::2] = [_LINK.sub(lambda found: _link(found, source, here, repository), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], source: Path, here: Path, repository: str) -> str:
    target = Path(os.path.normpath(source / found["path"]))
    if target.is_relative_to("docs"):
        return f"{found['before']}{os.path.relpath(target, here)}{found['rest'] or ''}"
    if not (ROOT / target).exists():
        return found[0]  # which the strict build tells
    return f"{found['before']}{repository}/blob/main/{target.as_posix()}{found['rest'] or ''}"
