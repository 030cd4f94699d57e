"""How Diffusers' pipelines call their transformers for guidance, read off the source of their `__call__`."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import diffusers

_ROOT = Path(diffusers.__file__).parent
# The latents, as often as there are branches.
_BATCH = re.compile(r"\[\w+\] \* (?:[23]\b|\()|torch\.cat\(\[(\w+), \1\b|latents\S*\.repeat\(2\b")
_ALIASES = {"current_model"}  # local names of a component
_GUIDER = "a guider's batches"


def guidance_styles(classes: Collection[str]) -> dict[str, list[str]]:
    """For each class, how its pipelines call it in a step: sorted, each once."""
    found: dict[str, set[str]] = {name: set() for name in classes}
    for node in _pipelines("pipelines/**/*.py"):
        for name, style in _of_pipeline(node, classes):
            found[name].add(style)
    for path in sorted(_ROOT.glob("modular_pipelines/*/denoise.py")):
        text = path.read_text()
        for name in classes:
            if re.search(rf"\b{name}\b", text):
                found[name].add(_GUIDER if "components.guider" in text else "one call")
    return {name: sorted(styles) for name, styles in found.items()}


def _pipelines(pattern: str) -> Iterator[ast.ClassDef]:
    for path in sorted(_ROOT.glob(pattern)):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))


def _of_pipeline(node: ast.ClassDef, classes: Collection[str]) -> Iterator[tuple[str, str]]:
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    if not {"__init__", "__call__"} <= methods.keys():
        return
    held: dict[str, set[str]] = {}
    for argument in methods["__init__"].args.args:
        for name in sorted(_names(argument.annotation) & set(classes)):
            held.setdefault(name, set()).add(f"self.{argument.arg}")
    for name, components in held.items():
        if style := _style(methods["__call__"], components | _ALIASES):
            yield name, style


def _names(annotation: ast.expr | None) -> set[str]:
    return {part.id for part in ast.walk(annotation) if isinstance(part, ast.Name)} if annotation else set()


def _style(call: ast.FunctionDef, components: set[str]) -> str:
    """Of one `__call__`; empty where another pipeline is called in its place."""
    calls, contexts = _count(call.body, components), [*dict.fromkeys(_contexts(call))]
    if not all(contexts):
        return _GUIDER
    beside = " in " + ", ".join(f"`{name}`" for name in contexts) if contexts else ""
    if calls == 1 and _BATCH.search(ast.unparse(call)):
        return f"a batch{beside}"
    return ["", "one call", "two calls", "more calls"][min(calls, 3)] + beside * bool(calls)


def _contexts(call: ast.FunctionDef) -> Iterator[str]:
    """Names of the contexts that it opens; empty where a name is not written there."""
    for part in ast.walk(call):
        if isinstance(part, ast.Call) and ast.unparse(part.func).endswith(".cache_context"):
            name = part.args[0]
            yield str(name.value) if isinstance(name, ast.Constant) else ""


def _count(nodes: Iterable[ast.AST], names: set[str]) -> int:
    """Calls of the components on the longest way through; of the branches of a condition one is taken."""
    total = 0
    for node in nodes:
        if isinstance(node, ast.If):
            total += max(_count(node.body, names), _count(node.orelse, names))
        else:
            ours = isinstance(node, ast.Call) and ast.unparse(node.func) in names
            total += ours + _count(ast.iter_child_nodes(node), names)
    return total
