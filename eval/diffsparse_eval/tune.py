"""Measure what this machine's kernels are good for, and keep it in the cache folder: break-even and tiles."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffsparse.errors import ConfigError
from diffsparse.files import folder, locked, write_json
from diffsparse_eval.rows import BreakEvenRow, TileRow, TilesRow
from diffsparse_eval.suites import Case
from diffsparse_eval.timing import median_seconds
from diffsparse_kernels import Block, BlockLists, backends, block_sparse_attention, forget_measurements, written
from diffsparse_kernels.backend.selftest import Sample, spot_check
from diffsparse_kernels.machine import cache_folder, device_name
from diffsparse_kernels.measured import BREAK_EVEN, HEAD_DIMS, TUNED, Tile, read_rows, tiles_for

if TYPE_CHECKING:
    from diffsparse_eval.suites import QKV

_SECONDS = 9.0
_DENSITIES = (0.25, 0.75)  # time is taken as a straight line through these
_TRIED = {"cpu": ("cpu",), "cuda": ("gluon", "triton", "flash-attn-4")}  # flex compiles for longer than this may take
TILES_KEPT = 3  # of each size in the table
_BLOCKS: tuple[Block, ...] = (128, (128, 64), 64)
TUNED_DENSITY = 0.3  # of the lists that tiles are timed on


# --- break-even -----------------------------------------------------------------------------------------------------


def measure_break_even(device: str, seconds: float = _SECONDS) -> tuple[list[BreakEvenRow], Path]:
    """Find the fastest backend of a device and the density above which dense attention beats it.

    Args:
        device: "cpu" or "cuda".
        seconds: how long to measure; sizes come in the order of their importance. Rows of other devices stay.

    Returns:
        The rows, and the file in the cache folder that has them.

    Raises:
        ConfigError: another kind of device.
        OutputFileError: the cache folder can't be written.
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
    lengths, blocks, dtypes, heads = {
        "cpu": ((1024, 4096), (128, 64), ("float32", "bfloat16"), 1),
        "cuda": ((8192, 32_768), _BLOCKS, ("bfloat16",), 8),
    }[kind]
    for tokens, block, head_dim, dtype in itertools.product(lengths, blocks, (128, 64), dtypes):
        yield Case(tokens, heads, head_dim, dtype, block, ())


@torch.inference_mode()
def _break_even_row(case: Case, device: str, backend: str) -> BreakEvenRow:
    low, high = (_sparse_seconds(case, device, backend, density) for density in _DENSITIES)
    dense = median_seconds(partial(torch.nn.functional.scaled_dot_product_attention, *case.tensors(device)), device)
    return {
        "device": device_name(device),
        "backend": backend,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "block": written(case.block),
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


@torch.inference_mode()
def _sparse_seconds(case: Case, device: str, backend: str, density: float) -> float:
    lists = case.lists(1 - density, device)
    return median_seconds(partial(block_sparse_attention, *case.tensors(device), lists, backend=backend), device)


# --- tiles of the Triton kernel ---------------------------------------------------------------------------------------


def tune_tiles(device: str, rounds: int = 7, tokens: int = 8192, heads: int = 8) -> Path:
    """Time the tiles of the Triton kernel for each head size and block, and keep the best.

    Args:
        device: such as "cuda".
        rounds: timed calls of each tile.
        tokens: N of the size that is timed.
        heads: H.

    Returns:
        The file in the cache folder that has them.

    Raises:
        ConfigError: the Triton backend does not run there.
        OutputFileError: the cache folder can't be written.
    """
    from diffsparse_pipelines.progress import track

    obstacle = backends(torch.device(device))["triton"]
    if obstacle != "available":
        raise ConfigError(f"--tune wants a device with the triton backend; {device}: {obstacle}")
    sizes = list(itertools.product(HEAD_DIMS, _BLOCKS))
    rows = [
        _best_tiles(Case(tokens, heads, head_dim, "bfloat16", block, ()), device, rounds)
        for head_dim, block in track(sizes, "sizes")
    ]
    return _keep(TUNED, rows)


def _best_tiles(case: Case, device: str, rounds: int) -> TilesRow:
    qkv, lists = case.tensors(device), case.lists(1 - TUNED_DENSITY, device)
    times: dict[Tile, float] = {}
    for tile in candidates(device, case.head_dim, case.q_block, case.kv_block):
        try:
            error, limit, seconds = time_tile(tile, qkv, lists, device, rounds)
        except Exception:  # too much memory, or more than the compiler can do
            continue
        if error <= limit:
            times[tile] = seconds
    fastest = sorted(times, key=lambda tile: times[tile])
    return tiles_row(device_name(device), case.head_dim, case.q_block, case.kv_block, map(as_row, fastest))


def candidates(device: str, head_dim: int, q_block: int, kv_block: int) -> list[Tile]:
    """Tiles worth a try: the table's, and their neighbours of the same kind."""
    from diffsparse_kernels.backend.nvidia import chip

    table = tiles_for(chip(torch.device(device)), head_dim, q_block, kv_block)
    near = (
        tile._replace(keys=keys, warps=warps, stages=stages)
        for tile in table
        for keys in (32, 64, 128)
        for warps in ({tile.warps} if tile.copy == "specialised" else {4, 8})
        for stages in (2, 3, 4)
        if keys <= kv_block
    )
    return list(dict.fromkeys([*table, *near]))


@torch.inference_mode()
def time_tile(
    tile: Tile, qkv: QKV, lists: BlockLists, device: str, rounds: int, seconds: float = math.inf
) -> tuple[float, float, float]:
    """Compare one tile's output with float64 and time it.

    Args:
        tile: what is timed.
        qkv: [B, H, N, D] each.
        lists: the blocks to visit.
        device: whose clock is read.
        rounds: timed calls.
        seconds: after which no further call is timed.

    Returns:
        The largest error, the largest that the number format explains, and the median seconds of a call; infinite
        where the error is larger than that, since a wrong kernel is not timed.
    """
    from diffsparse_kernels.backend.triton import launch as triton

    sample = Sample("", *qkv, lists, scale=qkv[0].shape[-1] ** -0.5)
    call = partial(triton.block_sparse_attention, *qkv, lists, sample.scale, None, tile=tile)
    error, limit = spot_check(call()[0], sample)
    if not error <= limit:
        return error, limit, math.inf
    return error, limit, median_seconds(call, device, rounds, warm_up=0, end=time.monotonic() + seconds)


def as_row(tile: Tile) -> TileRow:
    """The tile as tables have it."""
    return {"keys": tile.keys, "warps": tile.warps, "stages": tile.stages, "copy": tile.copy}


def tiles_row(device: str, head_dim: int, q_block: int, kv_block: int, fastest: Iterable[TileRow]) -> TilesRow:
    """A row of the table of tiles: those of one size, fastest first, of which the first few are kept."""
    kept = list(itertools.islice(fastest, TILES_KEPT))
    return {"device": device, "head_dim": head_dim, "q_block": q_block, "kv_block": kv_block, "tiles": kept}


# --- the cache folder -------------------------------------------------------------------------------------------------


def _keep(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows beside those of other devices."""
    path, mine = cache_folder() / name, {row["device"] for row in rows}
    folder(path.parent)
    with locked(path):
        kept = [row for row in read_rows(name) if row["device"] not in mine]
        write_json([*kept, *rows], path)
    forget_measurements()
    return path
