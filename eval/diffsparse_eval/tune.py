"""Measure what this machine's kernels are good for, and keep it in the cache folder: break-even and tiles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffsparse.errors import ConfigError
from diffsparse.files import folder, locked, write_json
from diffsparse_eval.suites import Case
from diffsparse_eval.timing import seconds_of
from diffsparse_kernels import BlockLists, backends, block_sparse_attention, forget_measurements
from diffsparse_kernels.machine import cache_folder, device_name
from diffsparse_kernels.measured import BREAK_EVEN, HEAD_DIMS, TUNED, Tile, read_rows, tiles_for
from diffsparse_pipelines.progress import track

if TYPE_CHECKING:
    from diffsparse_eval.suites import QKV

Row = dict[str, Any]
_SECONDS = 9.0
_DENSITIES = (0.25, 0.75)  # time is taken as a straight line through these
_TRIED = {"cpu": ("cpu",), "cuda": ("gluon", "triton", "flash-attn-4")}  # flex compiles for longer than this may take


def measure_break_even(device: str, seconds: float = _SECONDS) -> tuple[list[Row], Path]:
    """Find the fastest backend of `device` and the density above which dense attention beats it -> rows, their file.

    Sizes are measured in the order of their weight for as long as `seconds` allow. Rows of other devices stay.
    """
    kind = torch.device(device).type
    if kind not in _TRIED:
        raise ConfigError(f"--measure wants cpu or cuda; got {device!r}")
    known = backends(torch.device(device))
    sizes = _sizes(kind)
    first = next(sizes)
    end = time.monotonic() + seconds
    ours = {name: _sparse_seconds(first, device, name, 0.25) for name in _TRIED[kind] if known[name] == "available"}
    backend = min(ours, key=lambda name: ours[name])
    rows = [_break_even_row(first, device, backend)]
    for case in sizes:
        if time.monotonic() > end:
            break
        rows.append(_break_even_row(case, device, backend))
    return rows, _keep(BREAK_EVEN, rows)


def _sizes(kind: str) -> Iterator[Case]:
    lengths, dtypes, heads = {
        "cpu": ((1024, 4096), ("float32", "bfloat16"), 1),
        "cuda": ((8192, 32_768), ("bfloat16",), 8),
    }[kind]
    for tokens, block, head_dim, dtype in itertools.product(lengths, (128, 64), (128, 64), dtypes):
        yield Case(tokens, heads, head_dim, dtype, block, ())


def _break_even_row(case: Case, device: str, backend: str) -> Row:
    low, high = (_sparse_seconds(case, device, backend, density) for density in _DENSITIES)
    qkv = case.tensors(device)
    dense = _median(partial(torch.nn.functional.scaled_dot_product_attention, *qkv))
    return {
        "device": device_name(device),
        "backend": backend,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "block": case.block,
        "tokens": case.tokens,
        "dense_ms": dense * 1e3,
        "break_even": crossing(low, high, dense),
    }


def crossing(low: float, high: float, dense: float) -> float:
    """Density at which the line through (0.25, low) and (0.75, high) reaches `dense` seconds, in [0.05, 1]."""
    first, second = _DENSITIES
    if high <= low:  # noise, or all of it is overhead
        return 1.0 if low < dense else 0.05
    return min(1.0, max(0.05, first + (dense - low) * (second - first) / (high - low)))


def _sparse_seconds(case: Case, device: str, backend: str, density: float) -> float:
    lists = case.lists(1 - density, device)
    return _median(partial(block_sparse_attention, *case.tensors(device), lists, backend=backend))


@torch.inference_mode()
def _median(call: Callable[[], Any], rounds: int = 3) -> float:
    seconds_of(call)  # warms up
    return sorted(seconds_of(call) for _ in range(rounds))[rounds // 2]


def tune_tiles(device: str, rounds: int = 7, tokens: int = 8192, heads: int = 8) -> Path:
    """Time the tiles of the Triton kernel on `device` for each head size and block -> the file of the best.

    Raises:
        ConfigError: the Triton backend does not run there.
    """
    obstacle = backends(torch.device(device))["triton"]
    if obstacle != "available":
        raise ConfigError(f"--tune wants a device with the triton backend; {device}: {obstacle}")
    sizes = list(itertools.product(HEAD_DIMS, (64, 128)))
    rows = [
        _best_tiles(Case(tokens, heads, head_dim, "bfloat16", block, ()), device, rounds)
        for head_dim, block in track(sizes, "sizes")
    ]
    return _keep(TUNED, rows)


def _best_tiles(case: Case, device: str, rounds: int) -> Row:
    """The row of one size: its three fastest tiles."""
    tiles = candidates(device, case.head_dim, case.block)
    times = _tile_seconds(case.tensors(device), case.lists(0.7, device), tiles, rounds)
    best = sorted(times, key=lambda tile: times[tile])[:3]
    return {
        "device": device_name(device),
        "head_dim": case.head_dim,
        "q_block": case.block,
        "kv_block": case.block,
        "tiles": [tile._asdict() for tile in best],
    }


def candidates(device: str, head_dim: int, block: int) -> list[Tile]:
    """Tiles worth a try: the table's, and their neighbours of the same kind."""
    from diffsparse_kernels.backend.nvidia import chip

    table = tiles_for(chip(torch.device(device)), head_dim, block, block)
    near = (
        tile._replace(keys=keys, warps=warps, stages=stages)
        for tile in table
        for keys in (32, 64, 128)
        for warps in ({tile.warps} if tile.copy == "specialised" else {4, 8})
        for stages in (2, 3, 4)
        if keys <= block
    )
    return list(dict.fromkeys([*table, *near]))


def _tile_seconds(qkv: QKV, lists: BlockLists, tiles: list[Tile], rounds: int) -> dict[Tile, float]:
    """Those that compile, fit and agree with the first."""
    from diffsparse_kernels.backend.triton import launch as triton

    times: dict[Tile, float] = {}
    want = None
    for tile in tiles:
        call = partial(triton.block_sparse_attention, *qkv, lists, qkv[0].shape[-1] ** -0.5, None, tile=tile)
        try:
            out = call()[0].float()
            want = out if want is None else want
            if torch.allclose(out, want, rtol=0.02, atol=0.02):
                times[tile] = _median(call, rounds)
        except Exception:  # too much memory, or more than the compiler can do
            continue
    return times


def _keep(name: str, rows: list[Row]) -> Path:
    """Write rows beside those of other devices."""
    path, mine = cache_folder() / name, {row["device"] for row in rows}
    folder(path.parent)
    with locked(path):
        kept = [row for row in read_rows(name) if row["device"] not in mine]
        write_json(kept + rows, path)
    forget_measurements()
    return path
