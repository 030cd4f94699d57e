"""The back ends by name: where their functions are, and on which kinds of devices they run.

A back end is a module. It offers `capability(device, case)`, why it can't run there or can't compute this, and as many
of these functions as it can; all tensors are [B, H, N, D], all key masks [B, N_kv]: bool, or where the case is `biased`
float32 or better, to be added to the scaled scores:

    attention(q, k, v, scale, key_mask) -> out, lse
    block_sparse_attention(q, k, v, lists, scale, key_mask, boxes) -> out, lse; with `stand_ins` last, where it folds
    attention_with_mass(q, k, v, lse, q_block, kv_block, scale, key_mask) -> out, lse, mass
    block_mass(q, k, lse, q_block, kv_block, scale, key_mask) -> mass
    stand_ins(q, k, v, lists, scale, key_mask, summaries) -> stand-ins
    merge(q, k, v, lists, scale, stand_ins, out, lse) -> out, lse with the stand-ins of the blocks outside the lists
    first_order(k, v, block, scale, key_mask) -> summaries, the key mask [B, N_kv] or [B, H, N_kv]
    summary_error(q, summaries, q_block, scale) -> error
    lists_of_largest(error, share, always, heads) -> idx, cnt, bits, order
    lists_of_bits(bits, columns) -> idx, cnt, order
    move_rows(tensors, orders, picked) -> tensors
    restore_rows(x, inverses, picked, correction) -> x
    fit_rows(exact, out, probes, codes, scale, basis) -> correction
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, get_args

from diffsparse_kernels.case import PRECISIONS, Kind

_HERE = "diffsparse_kernels.backend"


class Backend(NamedTuple):
    """Where a back end is and where it runs.

    Attributes:
        module: where its functions are.
        devices: the kinds of devices that it runs on.
        default: the kinds on which it is used without being named.
        kinds: of calls that it is made for; another back end of the device computes the rest.
        folds: whether it takes stand-ins for dropped blocks into its own loop; else they are merged into what it gives.
    """

    module: str
    devices: tuple[str, ...]
    default: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = get_args(Kind)
    folds: bool = False


# In order of preference. The reference is exact and slow: on a GPU dense attention is the better answer.
BACKENDS = {
    "cpu": Backend(f"{_HERE}.cpu", ("cpu",), ("cpu",), folds=True),
    "gluon": Backend(f"{_HERE}.gluon.launch", ("cuda",), ("cuda",), ("attend", "fused"), folds=True),
    "triton": Backend(f"{_HERE}.triton.launch", ("cuda", "cpu"), ("cuda", "cpu"), folds=True),
    "reference": Backend(f"{_HERE}.reference", ("cpu", "cuda", "mps", "xpu"), ("cpu", "mps", "xpu"), folds=True),
    "flex": Backend(f"{_HERE}.flex", ("cuda", "cpu")),
    "flash-attn-4": Backend(f"{_HERE}.flash4", ("cuda",), kinds=("attend",)),
}
# Computed in few bits: `block_sparse_attention` with a precision, and `quantised_attention` with fewer than eight.
_OTHERS = {f"triton {precision}": f"{_HERE}.triton.eight_bits" for precision in PRECISIONS}
_OTHERS |= {f"{numbers} emulated": f"{_HERE}.emulated" for numbers in (*PRECISIONS, *(f"int{n}" for n in range(2, 8)))}
_OTHERS["torch"] = "diffsparse_kernels.summaries"  # makes and merges them where no kernel does


@cache
def load(name: str) -> ModuleType:
    """The module of a back end, imported at the first call."""
    return import_module(BACKENDS[name].module if name in BACKENDS else _OTHERS[name])
