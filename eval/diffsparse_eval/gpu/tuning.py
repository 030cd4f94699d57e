"""Other tiles of the Triton kernel, for each head size and block, each timed alone; `account` keeps the best."""

from __future__ import annotations

import itertools
from functools import partial

from diffsparse_eval import tune
from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt
from diffsparse_eval.suites import Case
from diffsparse_kernels.backend.nvidia import chip
from diffsparse_kernels.measured import HEAD_DIMS, Tile, tiles_for

_TOKENS, _HEADS = 8192, 8
_ROUNDS, _SECONDS = 7, 3.0  # timed calls of a tile, and seconds that they may take
_HAND_PICKED = (
    Tile(128, 8, 2, "tma"),
    Tile(64, 8, 3, "tma"),
    Tile(64, 8, 3),
    Tile(64, 4, 3),
)


def jobs(options: Options) -> list[str]:
    """One child."""
    return ["tiles"]


def run(job: str, options: Options, channel: Channel) -> None:
    """Each size: the table's tiles, then others; a CPU has none to tune."""
    if not options.on_gpu:
        return channel.row(kernel="all", shape="", verdict="nothing to tune")
    for head_dim, block in itertools.product(reversed(HEAD_DIMS), (128, 64)):
        _tune(head_dim, block, options, channel)


def _tune(head_dim: int, block: int, options: Options, channel: Channel) -> None:
    case = Case(_TOKENS, _HEADS, head_dim, "bfloat16", block, ())
    qkv, lists = case.tensors(options.device), case.lists(1 - tune.TUNED_DENSITY, options.device)
    listed = tiles_for(chip(qkv[0].device), head_dim, block, block)
    tiles = dict.fromkeys([*listed, *(tile for tile in _HAND_PICKED if tile.keys <= block)])

    def measure(tile: Tile) -> Attempt:
        error, limit, seconds = tune.time_tile(tile, qkv, lists, options.device, _ROUNDS, _SECONDS)
        known: Attempt = {"tile": tune.as_row(tile), "error": error}
        if not error <= limit:
            return {**known, "verdict": "wrong", "why": f"off by {error:.2e}, {limit:.2e} is explained"}
        sizes: Attempt = {"head_dim": head_dim, "q_block": case.q_block, "kv_block": case.kv_block}
        rate = tune.TUNED_DENSITY * case.flops / seconds / 1e12
        return {**known, **sizes, "verdict": "timed", "ms": seconds * 1e3, "tflops": rate}

    for tile in tiles:
        channel.attempt(
            f"triton {tile.keys} keys, {tile.warps} warps, {tile.stages} stages, {tile.copy}",
            f"{head_dim}/{block}",
            partial(measure, tile),
        )
