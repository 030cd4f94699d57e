"""What the sources can say to a user, collected from their syntax: reasons of dense calls, warnings, errors.

A message is known by its fixed parts, in order; what is filled in when it is given may be anything. `python -m
support.reasons` lists all of them.

Reasons are what the sources

- give to a parameter called `reason` or `obstacle` (in trials: `wrong`), or write to a variable, attribute or default
  of that name,
- return where a function says by its type that it gives `str | None`, or a pair that ends with it, and is one of the
  package's own ways to say why not (`_TELL`),
- raise while a back end is imported, which is why it is not there.

A name stands for all texts that its module writes to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = (ROOT / "diffsparse", ROOT / "kernels/diffsparse_kernels")
ALL = (*LIBRARY, ROOT / "pipelines/diffsparse_pipelines", ROOT / "eval/diffsparse_eval")
_SLOTS = {"reason", "obstacle", "wrong"}
# Functions whose answer is a reason: capabilities of back ends, verdicts of trials, readers of masks and layouts.
_TELL = re.compile(r"capability$|^_precision$|^obstacle$|^read$|^_layout$|^_tried$|^_result$")
_ANSWER = re.compile(r"str( \| None)?$|tuple\[.*str( \| None)?(, bool)?\]$")
_HOLE = "\0"  # what is filled in


@dataclass(frozen=True)
class Message:
    """A text with holes, and where it stands: file and line."""

    text: str
    where: str

    @property
    def within(self) -> re.Pattern[str]:
        """What a line has that holds it."""
        return re.compile(".+?".join(map(re.escape, self.text.split(_HOLE))))

    @property
    def pattern(self) -> re.Pattern[str]:
        """What a page that tells of it has in one line, as code."""
        return re.compile(f"`{self.within.pattern}`")

    def __str__(self) -> str:
        return self.text.replace(_HOLE, "...")


@dataclass(frozen=True)
class _Module:
    """One source file, with all that is written to each of its names."""

    name: str
    tree: ast.Module
    written: dict[str, list[ast.expr]]

    @classmethod
    def read(cls, path: Path) -> _Module:
        tree = ast.parse(path.read_text())
        written: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name):
                    written.setdefault(target.id, []).append(node.value)
        return cls(str(path.relative_to(ROOT)), tree, written)

    def messages(self, value: ast.expr | None) -> Iterator[Message]:
        """The texts that an expression may be."""
        for text in self._texts(value):
            if text.replace(_HOLE, "").strip(" :,"):
                yield Message(text.strip(), f"{self.name}:{getattr(value, 'lineno', 0)}")

    def _texts(self, value: ast.expr | None) -> Iterator[str]:
        match value:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in parts)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                yield from (a + b for a in self._texts(left) for b in self._texts(right))
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts):
                yield from (text for part in parts for text in self._texts(part))
            case ast.IfExp(body=one, orelse=other):
                yield from (text for part in (one, other) for text in self._texts(part))
            case ast.Subscript(value=ast.Name() as name):
                yield from self._texts(name)
            case ast.Name(id=name):
                given = (each for each in self.written.get(name, ()) if not isinstance(each, ast.Name))
                yield from (text for each in given for text in self._texts(each))
            case ast.Call(func=ast.Attribute(value=form, attr="format")):
                yield from (re.sub(r"\{.*?\}", _HOLE, text) for text in self._texts(form))
            case _:
                return


@cache
def modules(folders: tuple[Path, ...] = LIBRARY) -> list[_Module]:
    """All sources of some folders."""
    return [_Module.read(path) for folder in folders for path in sorted(folder.rglob("*.py"))]


def reasons() -> list[Message]:
    """Why calls can be dense, back ends be passed over, and extra passes run whole, each once."""
    slots = _slots()
    found = (
        message for module in modules() for node in ast.walk(module.tree) for message in _said(module, node, slots)
    )
    return _once(found)


def _said(module: _Module, node: ast.AST, slots: dict[str, set[int]]) -> Iterator[Message]:
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args, keywords=keywords) if (
            name != "__init__"
        ):
            values = [args[place] for place in slots.get(name, ()) if place < len(args)]
            values += [word.value for word in keywords if word.arg in _SLOTS]
        case ast.Assign(targets=targets, value=value):
            values = [given for target in targets for given in _written(target, value)]
        case ast.AnnAssign(target=ast.Name(id=name), value=value) if name in _SLOTS:
            values = [value] if value is not None else []
        case ast.FunctionDef():
            values = [*_defaults(node), *_answers(node)]
        case ast.Raise(exc=ast.Call(func=ast.Name(id="ImportError"), args=values)) if "/backend/" in module.name:
            pass
        case _:
            return
    for value in values:
        yield from module.messages(value)


def _slots() -> dict[str, set[int]]:
    """By name of function or class: at which places, without `self`, it takes a reason."""
    found: dict[str, set[int]] = {}
    for module in modules():
        for node in ast.walk(module.tree):
            for name, function in _functions(node):
                names = [each.arg for each in function.args.args if each.arg not in ("self", "cls")]
                places = {place for place, each in enumerate(names) if each in _SLOTS}
                found.setdefault(name, set()).update(places)
    return found


def _functions(node: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
    if isinstance(node, ast.FunctionDef) and node.name != "__init__":
        yield node.name, node
    if isinstance(node, ast.ClassDef):
        yield from (
            (node.name, each) for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"
        )


def _written(target: ast.expr, value: ast.expr) -> Iterator[ast.expr]:
    """Of an assignment, what a variable or attribute for reasons gets."""
    match target, value:
        case (ast.Tuple(elts=targets), ast.Tuple(elts=values)) if len(targets) == len(values):
            yield from (given for pair in zip(targets, values, strict=True) for given in _written(*pair))
        case ((ast.Name(id=name) | ast.Attribute(attr=name)), _) if name in _SLOTS:
            yield value


def _defaults(node: ast.FunctionDef) -> Iterator[ast.expr]:
    given = node.args
    named = [
        *zip(reversed(given.args), reversed(given.defaults), strict=False),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    yield from (value for each, value in named if each.arg in _SLOTS and value is not None)


def _answers(node: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function returns, if it is one that says why not; of a pair the part that is text."""
    if node.returns is None or not _TELL.search(node.name) or not _ANSWER.match(ast.unparse(node.returns)):
        return
    yield from (each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value is not None)


def warned() -> list[Message]:
    """What the library warns of, by `warnings` or by the log."""
    return _once(
        message for module in modules(ALL) for value in _warnings(module) for message in module.messages(value)
    )


def _warnings(module: _Module) -> Iterator[ast.expr]:
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn"), args=[text, *_]):
                yield text
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="_LOG"), attr="warning"), args=[ast.Constant(value=str(form)), *_]
            ):
                yield ast.Constant(re.sub(r"%\w", _HOLE, form), lineno=node.lineno)


def raised(error: str) -> list[Message]:
    """The messages with which the sources raise an error of this class, or make one for another to raise."""
    names = (error, "cls") if error == "DenseFallbackError" else (error,)  # which one of its own methods makes
    calls = (
        (module, node)
        for module in modules(ALL)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    )
    return _once(message for module, node in calls for value in node.args[:1] for message in module.messages(value))


def _once(messages: Iterable[Message]) -> list[Message]:
    found: dict[str, Message] = {}
    for message in messages:
        found.setdefault(message.text, message)
    return list(found.values())


def missing(messages: Iterable[Message], page: str) -> list[str]:
    """Messages of which no line of a page tells."""
    lines = page.replace("\\|", "|").splitlines()
    return [f"{each.where}: {each}" for each in messages if not any(each.pattern.search(line) for line in lines)]


if __name__ == "__main__":
    for kind, found in (("reasons", reasons()), ("warnings", warned())):
        print(kind, *(f"  {each.where}: {each}" for each in found), sep="\n")
