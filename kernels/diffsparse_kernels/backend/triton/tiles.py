"""Tiles of the GPU kernels: a table by chip, head size and blocks, shipped with the package or measured by the user.

`tiles.json` is chosen by compiling ahead of time: nothing spills, and the stages fit the chip's shared memory. Each row
lists tiles from the fastest expected to the one that always runs; a kernel takes the first whose needs are met.
`diffsparse bench --tune` measures them on a device and writes a table of the same form into the cache folder, which
then comes first.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diffsparse_kernels.measured import read_rows

HEAD_DIMS = (64, 128)  # smaller heads are padded to these in registers
TUNED = "tiles.json"  # in the cache folder
Copy = Literal["pointers", "tma", "specialised"]


class Tile(NamedTuple):
    """How a kernel walks over the keys.

    keys: of one step. warps, stages: of the compiler. copy: "pointers" runs everywhere; "tma" has the copy engine of
    sm_90 and later bring the tiles; "specialised" has warps of their own drive it, beside those that compute. On
    sm_90 Triton 3.6 compiles that wrong where lists are walked (seen on an H100), and Gluon is faster there.
    """

    keys: int
    warps: int
    stages: int
    copy: Copy = "pointers"


def tiles_for(chip: int, head_dim: int, q_block: int, kv_block: int, device: str | None = None) -> list[Tile]:
    """The tiles of a chip such as 90, best first; a chip that is not in the table takes the nearest before it.

    device: name of a device whose tuned tiles come first.
    """
    head_dim = next(size for size in HEAD_DIMS if head_dim <= size)
    place = (head_dim, 128 if q_block == 128 else 64, 128 if kv_block == 128 else 64)
    shipped = _shipped()
    nearest = max((known for known, *_ in shipped if known <= max(chip, 80)), default=80)
    found = [*tuned().get((device, *place), []), *shipped[nearest, *place]]
    return [tile._replace(keys=min(tile.keys, kv_block)) for tile in found]


@cache
def _shipped() -> dict[tuple[int, int, int, int], list[Tile]]:
    rows = read_rows(Path(__file__).with_name("tiles.json"))
    return {(row["chip"], *_place(row)): _tiles(row) for row in rows}


@cache
def tuned() -> dict[tuple[str | None, int, int, int], list[Tile]]:
    """The tiles that `bench --tune` wrote on this machine, by device, head size and blocks."""
    return {(row["device"], *_place(row)): _tiles(row) for row in read_rows(TUNED)}


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["head_dim"], row["q_block"], row["kv_block"]


def _tiles(row: dict[str, Any]) -> list[Tile]:
    return [Tile(**tile) for tile in row["tiles"]]
