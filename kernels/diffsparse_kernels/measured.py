"""What was measured: the density above which dense attention is faster, and the tiles of the GPU kernels.

Tables are JSON lists of rows. Those of this machine lie in the user's cache folder. `diffsparse doctor --measure`
writes `break_even.json`: for each device the fastest backend, and for each head size, block and length the density
above which dense attention is faster. `diffsparse bench --tune` writes `tiles.json`: for each device, head size and
block the fastest tiles. The `tiles.json` of this package is for all chips; it was chosen by compiling ahead of time, so
that nothing spills and the stages fit the chip's shared memory.
"""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch

from diffsparse_kernels.lists import Block, edges, written
from diffsparse_kernels.machine import cache_folder

BREAK_EVEN = "break_even.json"
TUNED = "tiles.json"
HEAD_DIMS = (64, 128)  # that GPU kernels are compiled for; smaller heads are padded to these in registers
# Break-even where nothing was measured. On the CPU as measured with AVX-512 and bfloat16 products; on a GPU from the
# share of the best dense kernel's speed that such a kernel reaches, less a tenth for the lists. The reference never
# gives way to dense attention.
_DEFAULTS = {"cpu": 0.6, "gluon": 0.8, "triton": 0.65, "reference": 1.0, "flex": 0.6, "flash-attn-4": 0.8}
_WIDE_BLOCKS = 0.1  # added for blocks of 128 on the CPU
Copy = Literal["pointers", "tma", "specialised"]


class Tile(NamedTuple):
    """How a Triton kernel walks over the keys.

    Attributes:
        keys: keys of one step.
        warps: of the compiler.
        stages: of the compiler.
        copy: "pointers" runs everywhere. "tma" loads tiles by the copy engine of sm_90 and later. "specialised" drives
            the copy engine by warps of its own, beside those that compute; on sm_90 Triton 3.6 compiles that wrong
            where lists are walked (seen on an H100), and Gluon is faster there.
    """

    keys: int
    warps: int
    stages: int
    copy: Copy = "pointers"


class _BreakEven(TypedDict):
    device: str
    backend: str
    dtype: str
    head_dim: int
    block: int | str
    tokens: int
    break_even: float


class _Tiles(TypedDict, total=False):
    """A row of a table: the tiles of one size.

    Attributes:
        device: its name, in a table of this machine.
        chip: such as 90, in the package's.
        tiles: the fields of `Tile`.
    """

    device: str
    chip: int
    head_dim: int
    q_block: int
    kv_block: int
    tiles: list[dict[str, Any]]


def read_rows(name: str | Path) -> list[dict[str, Any]]:
    """The rows of a table in the cache folder, or at an absolute path; none if the file does not exist.

    Warns about a table that can't be read, and takes it for empty: a broken cache must not stop a run.
    """
    path = cache_folder() / name
    try:
        rows = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored ({error}); delete it, or measure again", stacklevel=2)
        return []
    return rows if isinstance(rows, list) else []


def measured_backend(device: str) -> str | None:
    """The backend that was the fastest on a device of this name."""
    return next((row["backend"] for row in _break_even() if row["device"] == device), None)


def density_limit(backend: str, device: str, dtype: torch.dtype, head_dim: int, block: Block, tokens: int) -> float:
    """Density above which dense attention is faster, as measured nearest to this size, else the default.

    Blocks that are not square, where none such were measured, count as squares of their smaller edge.
    """
    q_block, kv_block = (64 if edge <= 64 else 128 for edge in edges(block))
    known = [
        row
        for row in _break_even()
        if (row["device"], row["backend"]) == (device, backend)
        and row["dtype"] == str(dtype).removeprefix("torch.")
        and row["head_dim"] == (64 if head_dim <= 64 else 128)
    ]
    for size in (written((q_block, kv_block)), min(q_block, kv_block)):
        if rows := [row for row in known if row["block"] == size]:
            return float(min(rows, key=lambda row: abs(math.log(row["tokens"] / tokens)))["break_even"])
    return _DEFAULTS[backend] + (_WIDE_BLOCKS if backend == "cpu" and min(edges(block)) >= 128 else 0.0)


@cache
def tiles_for(chip: int, head_dim: int, q_block: int, kv_block: int, device: str | None = None) -> list[Tile]:
    """The tiles of a chip such as 90, from the fastest expected to the one that always runs.

    A chip that is not in the table takes the tiles of the nearest before it.

    Args:
        device: name of a device whose own tiles, if it has any, come first.
    """
    head_dim = next(size for size in HEAD_DIMS if head_dim <= size)
    sizes = (head_dim, 128 if q_block == 128 else 64, 128 if kv_block == 128 else 64)
    shipped = _shipped()
    nearest = max((known for known, *_ in shipped if known <= max(chip, 80)), default=80)
    found = [*_tuned().get((device, *sizes), []), *shipped[nearest, *sizes]]
    return [tile._replace(keys=min(tile.keys, kv_block)) for tile in found]


def forget() -> None:
    """Read the tables of this machine again when they are next asked for."""
    for known in (_break_even, _tuned, tiles_for):
        known.cache_clear()


@cache
def _break_even() -> list[_BreakEven]:
    return cast("list[_BreakEven]", read_rows(BREAK_EVEN))


@cache
def _shipped() -> dict[tuple[int, int, int, int], list[Tile]]:
    rows = cast("list[_Tiles]", read_rows(Path(__file__).with_name("tiles.json")))
    return {(row["chip"], *_sizes(row)): _tiles(row) for row in rows}


@cache
def _tuned() -> dict[tuple[str | None, int, int, int], list[Tile]]:
    rows = cast("list[_Tiles]", read_rows(TUNED))
    return {(row["device"], *_sizes(row)): _tiles(row) for row in rows}


def _sizes(row: _Tiles) -> tuple[int, int, int]:
    return row["head_dim"], row["q_block"], row["kv_block"]


def _tiles(row: _Tiles) -> list[Tile]:
    return [Tile(**tile) for tile in row["tiles"]]
