"""A few tiles of the Triton kernel for each head size and block, each timed alone; `account` keeps the best."""

from __future__ import annotations

import itertools
import time
from functools import partial

from diffsparse_eval.gpu.stage import Options, Row, Talk
from diffsparse_eval.suites import Case
from diffsparse_eval.timing import in_turns
from diffsparse_kernels.backend.nvidia import chip
from diffsparse_kernels.backend.selftest import Sample, spot_check
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.measured import HEAD_DIMS, Tile, tiles_for

_SHAPE = (8192, 8)  # tokens, heads
_DENSITY = 0.3
_HAND_PICKED = (
    Tile(128, 8, 2, "tma"),
    Tile(64, 8, 3, "tma"),
    Tile(64, 8, 3),
    Tile(64, 4, 3),
)


def jobs(options: Options) -> list[str]:
    """One child."""
    return ["tiles"]


def run(job: str, options: Options, talk: Talk) -> None:
    """Each size: the table's tiles, then others; a CPU has none to tune."""
    if not options.on_gpu:
        return talk.row(kernel="all", shape="", verdict="nothing to tune")
    for head_dim, block in itertools.product(reversed(HEAD_DIMS), (128, 64)):
        _tune(head_dim, block, options, talk)


def _tune(head_dim: int, block: int, options: Options, talk: Talk) -> None:
    case = Case(*_SHAPE, head_dim, "bfloat16", block, ())
    qkv, lists = case.tensors(options.device), case.lists(1 - _DENSITY, options.device)
    listed = tiles_for(chip(qkv[0].device), head_dim, block, block)
    tiles = dict.fromkeys([*listed, *(tile for tile in _HAND_PICKED if tile.keys <= block)])

    sample = Sample("", *qkv, lists, scale=head_dim**-0.5)

    def measure(tile: Tile) -> Row:
        call = partial(triton.block_sparse_attention, *qkv, lists, sample.scale, None, tile=tile)
        error, limit = spot_check(call()[0], sample)
        if not error <= limit:
            return {"verdict": "wrong", "why": f"off by {error:.2e}, {limit:.2e} is explained", "error": error}
        seconds = in_turns({"": [call]}, 7, options.device, time.monotonic() + 3)[""]
        place = {"head_dim": head_dim, "q_block": block, "kv_block": block, "tile": tile._asdict()}
        return {"verdict": "timed", "ms": seconds * 1e3, "tflops": _DENSITY * case.flops / seconds / 1e12, **place}

    for tile in tiles:
        talk.attempt(
            f"triton {tile.keys} keys, {tile.warps} warps, {tile.stages} stages, {tile.copy}",
            f"{head_dim}/{block}",
            partial(measure, tile),
        )
