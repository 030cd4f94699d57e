"""The API pages name each public object once, and nothing that does not exist."""

from __future__ import annotations

import inspect
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe
import pytest

import diffsparse

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
PUBLIC = ("diffsparse", "diffsparse_kernels", "diffsparse_pipelines", "diffsparse_pipelines.tiny", "diffsparse_eval")


def shown() -> list[str]:
    """What the pages show, by dotted name."""
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


@cache
def found(name: str) -> object:
    """The object of a dotted name.

    Raises:
        AttributeError, ImportError: there is none.
    """
    module, _, rest = name.partition(".")
    while True:
        first, _, deeper = rest.partition(".")
        try:
            import_module(f"{module}.{first}")
        except ModuleNotFoundError:
            return reduce(getattr, rest.split("."), import_module(module))
        module, rest = f"{module}.{first}", deeper


def public() -> Iterator[str]:
    """The names in `__all__` of the packages, those of errors that two packages share once."""
    seen = set()
    for package in PUBLIC:
        for name in getattr(import_module(package), "__all__", ()):
            whole = f"{package}.{name}"
            if name != "__version__" and id(found(whole)) not in seen:
                seen.add(id(found(whole)))
                yield whole


@pytest.mark.parametrize("name", list(public()))
def test_each_public_name_is_on_one_page(name: str) -> None:
    assert shown().count(name) == 1


def test_nothing_is_shown_twice() -> None:
    assert not [name for name, count in Counter(shown()).items() if count > 1]


@pytest.mark.parametrize("name", shown())
def test_what_is_shown_exists_and_says_what_it_is(name: str) -> None:
    assert found(name) is not None
    if inspect.isroutine(found(name)) or inspect.isclass(found(name)):
        assert found(name).__doc__, "has no docstring"


def test_the_table_has_all_names() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\[diffsparse\.(\w+)\] \| ", (ROOT / "docs/api/index.md").read_text(), re.MULTILINE
    )
    assert all(name == target for name, target in rows)
    assert [name for name, _ in rows] == sorted(set(diffsparse.__all__) - {"__version__"}, key=str.lower)


# --- docstrings -----------------------------------------------------------------------------------------------------


@cache
def parsed() -> griffe.ModulesCollection:
    """The sources as the site reads them."""
    options = {"returns_named_value": False, "returns_multiple_items": False}
    folders = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "pipelines", "eval"))]
    loader = griffe.GriffeLoader(search_paths=folders, docstring_parser="google", docstring_options=options)
    for package in ("diffsparse_kernels", "diffsparse", "diffsparse_pipelines", "diffsparse_eval"):
        loader.load(package)
    loader.resolve_aliases(implicit=True, external=False)
    return loader.modules_collection


def described(found: griffe.Object | griffe.Alias, kind: str) -> dict[str, Any]:
    """What a section of a docstring says of each name."""
    sections = found.docstring.parsed if found.docstring else []
    return {each.name: each for section in sections if section.kind.value == kind for each in section.value}


def fields(found: griffe.Object | griffe.Alias) -> set[str]:
    """The fields that a dataclass, or a tuple with names, adds itself."""
    return {
        name
        for name, member in found.members.items()
        if member.is_attribute and not name.startswith("_") and not {"property", "cached"} & member.labels
    }


@pytest.mark.parametrize("name", shown())
def test_docstrings_tell_all_arguments_and_fields(name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = parsed()[name]
    if found.is_function:
        arguments = {argument.lstrip("*") for argument in described(found, "parameters")}
        own = {each.name for each in found.parameters}
        assert arguments == own or (len(own) == 1 and not arguments)  # which the first sentence tells
    elif found.is_class and "dataclass" in found.labels:
        told = described(found, "attributes")
        assert fields(found) - {"needs_grid", "is_compensated"} <= told.keys()
        assert all(each.annotation is not None for each in told.values())
    assert not caplog.records  # of a section that can't be read


@pytest.mark.parametrize("name", shown())
def test_what_is_returned_is_prose(name: str) -> None:
    found = parsed()[name]
    for section in found.docstring.parsed if found.docstring else ():
        for each in section.value if section.kind.value in ("returns", "yields") else ():
            assert not isinstance(each.annotation, str), f"a colon makes a type of {each.annotation!r}"


# --- links ----------------------------------------------------------------------------------------------------------

HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))


@pytest.mark.parametrize(
    ("html", "target"),
    [
        ("<p><code>Digest</code></p>", "diffsparse.Digest"),
        ("<p><code>BlockLists.packed</code></p>", "diffsparse_kernels.BlockLists.packed"),
        ("<p><code>tau</code></p>", None),
        ("<li><b><code>attention</code></b></li>", None),  # a parameter of that name
        ('<a href="#x"><code>Digest</code></a>', None),
        ("<p><code>load</code></p>", None),  # there are several
    ],
)
def test_names_in_docstrings_lead_to_where_they_are_explained(html: str, target: str | None) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/index.md"))
    made = HOOKS["on_page_content"](html, page, None, None)
    assert made == html if target is None else f'<autoref identifier="{target}" optional>' in made


def test_other_pages_stay_as_they_are() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="stack.md"))
    assert HOOKS["on_page_content"]("<code>Digest</code>", page, None, None) == "<code>Digest</code>"
