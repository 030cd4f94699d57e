"""`python -m support.backends` writes the tables of docs/backends.md: what the back ends say of devices and calls.

They are asked on a machine without a GPU: torch says of one that it is there, and of which chip; no kernel is launched,
and every kernel counts as right in its trial.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from diffsparse_kernels import registry, trials
from diffsparse_kernels.backend.triton import launch
from diffsparse_kernels.case import PRECISIONS, Case
from diffsparse_kernels.catalog import BACKENDS, load
from diffsparse_kernels.errors import NoKernelError
from diffsparse_pipelines.tables import spliced

PAGE = Path(__file__).parents[2] / "docs/backends.md"
CHOSEN = "<!-- chosen: made by python -m support.backends -->", "<!-- /chosen -->"
CAPABLE = "<!-- capable: made by python -m support.backends -->", "<!-- /capable -->"
# Compute capability -> cards that have it; None is the CPU.
CHIPS: dict[tuple[int, int] | None, str] = {
    None: "CPU",
    (8, 0): "sm_80: A100",
    (8, 6): "sm_86: A10, RTX 30",
    (8, 9): "sm_89: L40S, RTX 40",
    (9, 0): "sm_90: H100, H200",
    (10, 0): "sm_100: B200",
    (12, 0): "sm_120: RTX 50",
}
BFLOAT16 = Case("attend", torch.bfloat16, 128, 128, 128, 128)
FINER = BFLOAT16._replace(kv_block=64)
CALLS = {
    "blocks of 128 (AdaSpa, PARO, SparseVDiT)": BFLOAT16,
    "blocks of 128 x 64 with first order (Digest, Tangent)": FINER._replace(summary="first-order"),
    "blocks of 128 with means": BFLOAT16._replace(summary="means"),
    "padding masked": BFLOAT16._replace(masked=True),
    "a bias added to scores": BFLOAT16._replace(masked=True, biased=True),
    "windows that cut tiles (GNA)": BFLOAT16._replace(axes=3),
    "a search: dense with the block mass": BFLOAT16._replace(kind="fused"),
    "the block mass alone": BFLOAT16._replace(kind="mass"),
    "blocks of 64": BFLOAT16._replace(q_block=64, kv_block=64),
    "blocks of 16": BFLOAT16._replace(q_block=16, kv_block=16),
    "blocks of 256": BFLOAT16._replace(q_block=256, kv_block=256),
    "heads of 72": BFLOAT16._replace(head_dim=72, value_dim=72),
    "heads of 256": BFLOAT16._replace(head_dim=256, value_dim=256),
    "float32": BFLOAT16._replace(dtype=torch.float32),
    "int8": BFLOAT16._replace(precision="int8"),
    "fp8": BFLOAT16._replace(precision="fp8"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 512  # channels and block edges are asked up to here
_EDGES = (16, 32, 64, 128, 256)


def _flash() -> dict[str, ModuleType]:
    """The package flash-attn-4 as far as its names go."""
    members = {"block_sparsity": "BlockSparseTensorsTorch", "interface": "_flash_attn_fwd"}
    made = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    for part, member in members.items():
        module = made[f"flash_attn.cute.{part}"] = ModuleType(part)
        setattr(module, member, None)
    return made


@contextmanager
def chip(capability: tuple[int, int] | None) -> Iterator[torch.device]:
    """Within: the device is there, with all packages; None is the CPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, "INTERPRETED", False))
        stack.enter_context(patch.object(trials, "verdict", lambda *_: ""))
        stack.enter_context(patch.object(registry, "_named", lambda: ""))
        stack.enter_context(patch.object(registry.measured, "measured_backend", lambda _: None))
        stack.enter_context(patch.dict(sys.modules, _flash()))
        if capability is not None:
            stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
            stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: capability))
            stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda *_: "a device that is not there"))
        _forget()
        try:
            yield torch.device("cpu" if capability is None else "cuda:0")
        finally:
            _forget()


def _forget() -> None:
    registry.forget_measurements()
    load.cache_clear()
    sys.modules.pop(f"{BACKENDS['flash-attn-4'].module}", None)


# --- what computes a call -------------------------------------------------------------------------------------------


def chosen() -> str:
    """For each kind of call and device the back end that computes it."""
    columns = []
    for capability in CHIPS:
        with chip(capability) as device:
            columns.append([_choice(case, device) for case in CALLS.values()])
    rows = zip(CALLS, *columns, strict=True)
    return _table(["bfloat16, heads of 128, if nothing else is said", *CHIPS.values()], rows)


def _choice(case: Case, device: torch.device) -> str:
    try:
        found = registry.choose_rounded(case, device) if case.precision else registry.choose(case, device)
    except NoKernelError:
        return "dense"
    apart = case.summary is not None and not found.folds
    return f"{found.name}, merged after" if apart else found.name.removesuffix(f" {case.precision}") or found.name


# --- what a back end can compute ------------------------------------------------------------------------------------


def capable() -> str:
    """For each back end what it says it can compute, on the devices where it says the same."""
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for capability, name in CHIPS.items():
        with chip(capability) as device:
            for backend in BACKENDS:
                if registry.capability(backend, device) is None:
                    lines.setdefault((backend, _cells(backend, device)), []).append(name.split(":")[0])
    ordered = sorted(lines.items(), key=lambda line: list(BACKENDS).index(line[0][0]))
    return _table(_COLUMNS, ((f"`{name}`", ", ".join(where), *cells) for (name, cells), where in ordered))


_COLUMNS = (
    *("back end", "devices", "used", "dtypes", "heads", "blocks", "key mask", "boxes"),
    *("means, first order", "search", "eight bits"),
)


def _cells(name: str, device: torch.device) -> tuple[str, ...]:
    usual = _usual(name, device)

    def can(**changed: object) -> bool:
        return registry.capability(name, device, usual._replace(**changed)) is None

    return (
        "by default" if device.type in BACKENDS[name].default else "if named",
        _dtypes([dtype for dtype in _DTYPES if can(dtype=dtype)]),
        _heads([size for size in range(1, _MOST + 1) if can(head_dim=size, value_dim=size)]),
        _blocks([(q, kv) for q in _EDGES for kv in _EDGES if can(q_block=q, kv_block=kv)]),
        _mask(can(masked=True), can(masked=True, biased=True)),
        "yes" if can(axes=3) else "no",
        _summaries(BACKENDS[name].folds and can(summary="means") and can(summary="first-order")),
        _search(name, can(kind="fused"), can(kind="mass")),
        _precisions(name, device, usual),
    )


def _usual(name: str, device: torch.device) -> Case:
    """A call that the back end can compute on the device."""
    asked = (BFLOAT16, BFLOAT16._replace(q_block=256))
    return next(case for case in asked if registry.capability(name, device, case) is None)


def _dtypes(found: list[torch.dtype]) -> str:
    return "all" if len(found) == len(_DTYPES) else ", ".join(str(dtype).removeprefix("torch.") for dtype in found)


def _heads(sizes: list[int]) -> str:
    step = sizes[1] - sizes[0]
    most = "any" if sizes[-1] == _MOST else f"to {sizes[-1]}"
    return most if step == 1 else f"{most}, multiples of {step}"


def _blocks(found: list[tuple[int, int]]) -> str:
    if len(found) == len(_EDGES) ** 2:
        return "any"
    edges = sorted({edge for pair in found for edge in pair})
    if len(found) == len(edges) ** 2:
        return f"{', '.join(map(str, edges))}, in any pair"
    return ", ".join(f"{q} x {kv}" for q, kv in found)


def _mask(boolean: bool, added: bool) -> str:
    return {(True, True): "bool, added", (True, False): "bool"}.get((boolean, added), "no")


def _summaries(folds: bool) -> str:
    return "in its loop" if folds else "merged after"


def _search(name: str, fused: bool, mass: bool) -> str:
    """Whether the mass comes with the dense pass, and whether it can be had alone."""
    kinds = BACKENDS[name].kinds
    ways = {"with a dense pass": fused and "fused" in kinds, "alone": mass and "mass" in kinds}
    return ", ".join(way for way, can in ways.items() if can) or "no"


def _precisions(name: str, device: torch.device, usual: Case) -> str:
    """Those that run in eight bits; the rest is emulated, whatever the back end."""
    if name != "triton":
        return "no"
    asked = {each: usual._replace(precision=each) for each in PRECISIONS}
    known = [each for each, case in asked.items() if registry.choose_rounded(case, device).name == f"triton {each}"]
    return ", ".join(known) or "no"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page with its tables as they should be."""
    for (begin, end), made in ((CHOSEN, chosen()), (CAPABLE, capable())):
        text = spliced(text, begin, made, end)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    print(PAGE.name)
