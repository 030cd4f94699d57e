"""The house: which way imports point, how many rooms and floors there are, how long functions are, what types hide.

A room is a module or a sub-package directly within a package. The order of the rooms is not written down here: it is
whatever the imports say, so an import upward shows as a circle between rooms.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom: imports between packages point down this list.
PACKAGES = {
    "diffsparse_eval": ROOT / "eval" / "diffsparse_eval",
    "diffsparse_pipelines": ROOT / "pipelines" / "diffsparse_pipelines",
    "diffsparse": ROOT / "diffsparse",
    "diffsparse_kernels": ROOT / "kernels" / "diffsparse_kernels",
}
AT_THE_TOP = {
    *("diffsparse", "kernels", "pipelines", "eval", "tests", "docs", ".ci"),
    *("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
    *("Makefile", "pyproject.toml", "constraints.txt", "mkdocs.yml", ".pre-commit-config.yaml", ".gitignore"),
}
ROOMS, FLOORS = 12, 6
ANY, IGNORES = 150, 12
MEDIAN, NINETIETH, LONGEST = 8, 20, 60
STRATEGIES = {"strategy", "_strategy", "inner", "_inner"}  # the names that strategies go by

Arrows = dict[tuple[str, str], str]  # (importing module, imported module) -> where it says so


def sources(packages: dict[str, Path] = PACKAGES) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module; a package goes by its own name."""
    for package, folder in packages.items():
        for file in sorted(folder.rglob("*.py*")):
            if file.suffix not in (".py", ".pyi"):
                continue
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__init__"), file


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a node imports, submodules and plain names alike."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=source, names=names, level=level):
            above = module.split(".")[: None if not level else -level + is_package or None]
            base = ".".join([*(above if level else []), *([source] if source else [])])
            yield from (f"{base}.{alias.name}" for alias in names)
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name)), *_]):
            yield name


def arrows(packages: dict[str, Path] = PACKAGES) -> Arrows:
    """Every import between modules of the packages, also those within functions and for type checkers alone."""
    modules = dict(sources(packages))
    found: Arrows = {}
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node, module, file.name == "__init__.py"):
                target = name if name in modules else name.rpartition(".")[0]
                if target in modules and target != module:
                    found.setdefault((module, target), f"{file}:{getattr(node, 'lineno', 0)}")
    return found


def rooms(package: str, found: Arrows) -> Arrows:
    """The same arrows between the rooms of a package; files like `__init__.py` are no rooms."""

    def room(module: str) -> str | None:
        inside = module.removeprefix(f"{package}.")
        return None if inside == module or inside.startswith("__") else inside.split(".")[0]

    pairs = ((room(a), room(b), f"{where} imports {b}") for (a, b), where in found.items())
    return {(a, b): where for a, b, where in pairs if a and b and a != b}


def circles(found: Arrows) -> list[str]:
    """One block of text for each knot of things that import each other."""
    graph = networkx.DiGraph(list(found))
    knots = (knot for knot in networkx.strongly_connected_components(graph) if len(knot) > 1)
    return sorted(
        "\n  ".join(
            (
                f"circle: {', '.join(sorted(knot))}",
                *sorted(f"{a} -> {b}  ({found[a, b]})" for a, b in graph.subgraph(knot).edges),
            )
        )
        for knot in knots
    )


def upward(found: Arrows, order: Iterable[str] = PACKAGES) -> list[str]:
    """Imports from a package into one above it."""
    place = {package: index for index, package in enumerate(order)}
    return [f"{where} imports {b}" for (a, b), where in found.items() if place[_package(a)] > place[_package(b)]]


def _package(module: str) -> str:
    return module.split(".")[0]


def floors(found: Arrows) -> int:
    """How many rooms stand on each other at most."""
    return int(networkx.dag_longest_path_length(networkx.DiGraph(list(found)))) + 1


def asked(file: Path) -> Iterator[str]:
    """Places where a strategy is asked for what it may not have."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id=name) | ast.Attribute(attr=name), *_]
            ):
                if name in STRATEGIES:
                    yield f"{file}:{node.lineno}: {ast.unparse(node)}"


def words(file: Path) -> Iterator[tuple[str, int]]:
    """Each `Any` and each `type: ignore` of a file, with its line."""
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.NAME and token.string == "Any":
                yield "Any", token.start[0]
            if token.type == tokenize.COMMENT and "type: ignore" in token.string:
                yield "type: ignore", token.start[0]


def count(word: str, packages: dict[str, Path] = PACKAGES) -> dict[str, list[int]]:
    """Lines that hold a word, file by file, most first."""
    found = {str(file): [line for one, line in words(file) if one == word] for _, file in sources(packages)}
    return dict(sorted(((file, lines) for file, lines in found.items() if lines), key=lambda item: -len(item[1])))


def functions(packages: dict[str, Path] = PACKAGES) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function with the place where it is defined."""
    for _, file in sources(packages):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, signature and docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def runs_on_a_gpu(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Compiled by Triton or Gluon, which know no helper objects and few calls."""
    return any(ast.unparse(decorator).split("(")[0].endswith("jit") for decorator in function.decorator_list)


def _listed(items: Iterable[str], most: int = 100) -> str:
    return "\n" + "\n".join(list(items)[:most]).replace(f"{ROOT}/", "")


def _by_file(found: dict[str, list[int]]) -> str:
    return _listed(f"{len(lines):4d}  {file}: {', '.join(map(str, lines))}" for file, lines in found.items())


@pytest.fixture(scope="module")
def whole() -> Arrows:
    """All imports of the four packages, read once."""
    return arrows()


def test_no_circle_between_modules(whole: Arrows) -> None:
    found = circles(whole)
    assert not found, _listed(found)


def test_packages_point_down(whole: Arrows) -> None:
    found = upward(whole)
    assert not found, _listed(found)


@pytest.mark.parametrize("package", [name for name, file in sources() if file.name == "__init__.py"])
def test_rooms_point_down(package: str, whole: Arrows) -> None:
    found = circles(rooms(package, whole))
    assert not found, _listed(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_few_floors(package: str, whole: Arrows) -> None:
    inside = rooms(package, whole)
    assert not circles(inside), "rooms in a circle have no floors"
    assert floors(inside) <= FLOORS, networkx.dag_longest_path(networkx.DiGraph(list(inside)))


def test_few_rooms_at_the_top() -> None:
    found = [
        entry.name
        for entry in sorted(PACKAGES["diffsparse"].iterdir())
        if entry.suffix == ".py" or (entry / "__init__.py").exists()
        if not entry.name.startswith("__")
    ]
    assert len(found) <= ROOMS, found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_lies_about_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path.split("/")[0] for path in listed} == AT_THE_TOP


def test_strategies_declare_what_they_are_asked() -> None:
    base = PACKAGES["diffsparse"] / "strategies" / "base.py"
    found = [place for _, file in sources() if file != base for place in asked(file)]
    assert not found, _listed(found)


@pytest.mark.parametrize(("word", "limit"), [("Any", ANY), ("type: ignore", IGNORES)])
def test_types_hide_little(word: str, limit: int) -> None:
    found = count(word)
    total = sum(map(len, found.values()))
    assert total < limit, _by_file(found)


def test_functions_are_short() -> None:
    lengths = sorted(((lines_of(node), place) for place, node in functions()), reverse=True)
    long = [f"{lines:4d}  {place}" for lines, place in lengths]
    assert statistics.median(lines for lines, _ in lengths) <= MEDIAN
    assert statistics.quantiles((lines for lines, _ in lengths), n=10)[-1] <= NINETIETH, _listed(long)


def test_no_function_is_long() -> None:
    lengths = sorted(((lines_of(node), place) for place, node in functions() if not runs_on_a_gpu(node)), reverse=True)
    long = [f"{lines:4d}  {place}" for lines, place in lengths if lines > LONGEST]
    assert not long, _listed(long)


SOUND = {
    "low/__init__.py": "",
    "low/base.py": "ONE = 1",
    "low/middle/__init__.py": "",
    "low/middle/one.py": "from low.base import ONE",
    "low/top.py": "from .middle import one",
    "high/__init__.py": "from low import top",
}


@pytest.fixture
def built(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Two made-up packages, `high` above `low`, with the files that the test changes."""
    for name, text in {**SOUND, **request.param}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return {"high": tmp_path / "high", "low": tmp_path / "low"}


@pytest.mark.parametrize("built", [{}], indirect=True)
def test_a_sound_house_passes(built: dict[str, Path]) -> None:
    found = arrows(built)
    expected = {("low.middle.one", "low.base"), ("low.top", "low.middle.one"), ("high", "low.top")}
    assert set(found) == expected
    assert not circles(found)
    assert not upward(found, built)
    assert not circles(rooms("low", found))
    assert floors(rooms("low", found)) == 3


UPWARD = {
    "in a function": "def f():\n    from low.top import one\n    return one",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import low.top",
    "relative": "from . import top",
    "by name": "from importlib import import_module\ntop = import_module('low.top')",
}


@pytest.mark.parametrize("built", [{"low/base.py": text} for text in UPWARD.values()], indirect=True, ids=list(UPWARD))
def test_a_circle_is_found(built: dict[str, Path]) -> None:
    (found,) = circles(arrows(built))
    assert found.startswith("circle: low.base, low.middle.one, low.top")
    assert "low.base -> low.top" in found
    assert len(circles(rooms("low", arrows(built)))) == 1


@pytest.mark.parametrize("built", [{"low/middle/two.py": "import low.top"}], indirect=True)
def test_rooms_in_a_circle_are_found_where_modules_are_in_none(built: dict[str, Path]) -> None:
    assert not circles(arrows(built))
    (found,) = circles(rooms("low", arrows(built)))
    assert found.startswith("circle: middle, top")


@pytest.mark.parametrize("built", [{"low/base.py": "import high"}], indirect=True)
def test_a_package_that_points_up_is_found(built: dict[str, Path]) -> None:
    (found,) = upward(arrows(built), built)
    assert found.endswith("base.py:1 imports high")


ASKED = "getattr(strategy, 'a', 1)\nhasattr(self.inner, 'b')\ngetattr(run.strategy, 'c')\ngetattr(module, 'd')"
HIDDEN = "from typing import Any\nx: Any = 1  # type: ignore[assignment]  # Any in a comment\ny = 'Any'"


@pytest.mark.parametrize(
    "built", [{"low/base.py": ASKED}, {"low/top.py": HIDDEN}], indirect=True, ids=["asked", "hidden"]
)
def test_counters_count(built: dict[str, Path]) -> None:
    text = (built["low"] / "base.py").read_text()
    assert len(list(asked(built["low"] / "base.py"))) == (3 if text == ASKED else 0)
    assert sum(map(len, count("Any", built).values())) == (0 if text == ASKED else 2)
    assert sum(map(len, count("type: ignore", built).values())) == (0 if text == ASKED else 1)


LONG = 'def f(\n    x,\n):\n    """Doc."""\n    return x\n\n\n@triton.jit\ndef kernel():\n    pass'


@pytest.mark.parametrize("built", [{"low/base.py": LONG}], indirect=True)
def test_lengths_count_signature_and_docstring(built: dict[str, Path]) -> None:
    found = [node for _, node in functions(built)]
    assert [(node.name, lines_of(node), runs_on_a_gpu(node)) for node in found] == [
        ("f", 5, False),
        ("kernel", 2, True),
    ]
