"""Each kernel against float64, simplest first: outputs poisoned with NaN, many launches that must agree to a bit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor

from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt
from diffsparse_kernels import registry
from diffsparse_kernels.backend.nvidia import chip
from diffsparse_kernels.backend.selftest import KERNELS, compute, examine, kernel_of, poison, samples
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.case import INTEGERS, SELECTION, Case
from diffsparse_kernels.measured import Copy, tiles_for

LAUNCHES = 50
EIGHT_BITS = {"int8": 0.012, "int8-int8": 0.020, "int8-fp8": 0.037, "fp8": 0.052}  # relative errors, as in `eight_bits`
FIRST_USE = "first use"
AROUND = ("summaries", "errors", "statistics", "selection", "rows", "fit")  # kinds of cases of no attention
_BF16, _FP16 = torch.bfloat16, torch.float16
_USUAL = registry.USUAL[0]
_ALL = (  # of every kernel that can do them
    _USUAL,
    *(_USUAL._replace(**change) for change in (
        {"head_dim": 64, "value_dim": 64},
        {"head_dim": 72, "value_dim": 72},
        {"head_dim": 96, "value_dim": 96, "dtype": _FP16},
        {"kv_block": 64},
        {"q_block": 64, "kv_block": 64},
        {"masked": True},
        {"masked": True, "kv_block": 64},
        {"masked": True, "biased": True},
        {"axes": 3},
        {"axes": 3, "masked": True},
        {"copyable": False},
        {"dtype": torch.float32},
        {"kind": "fused"},
        {"kind": "fused", "masked": True},
        {"kind": "mass"},
        {"kind": "mass", "q_block": 16, "masked": True},
        {"summary": "means"},
        {"summary": "first-order", "kv_block": 64},
        {"summary": "first-order", "masked": True, "head_dim": 72, "value_dim": 72},
        {"summary": "first-order", "dtype": torch.float32},
        {"kind": "summaries"},
        {"kind": "summaries", "masked": True, "head_dim": 72, "value_dim": 72},
        {"kind": "summaries", "masked": True, "biased": True},
        {"kind": "errors"},
        {"kind": "errors", "masked": True, "q_block": 64, "kv_block": 64, "head_dim": 72, "value_dim": 72},
        {"kind": "errors", "q_block": 16, "dtype": torch.float32},
        {"kind": "statistics", "kv_block": 64},
        {"kind": "statistics", "masked": True, "kv_block": 16, "head_dim": 72, "value_dim": 72},
        {"kind": "statistics", "dtype": torch.float32},
        {"kind": "rows"},
        {"kind": "rows", "dtype": torch.float32, "head_dim": 72, "value_dim": 72},
        {"kind": "fit"},
        {"kind": "fit", "q_block": 64, "head_dim": 64, "value_dim": 64},
    )),
    SELECTION,
)  # fmt: skip
_GLUON = tuple(
    Case("attend", dtype, dim, dim, 128, kv_block, masked)
    for masked, dtype, dim, kv_block in itertools.product((False, True), (_BF16, _FP16), (128, 64, 72, 96), (128, 64))
)
_WORK = (  # of the same kernel beside attention to lists
    _USUAL._replace(kind="fused"),
    _USUAL._replace(summary="means"),
    _USUAL._replace(summary="first-order"),
)
_VARIED = tuple(
    case._replace(head_dim=dim, value_dim=dim, kv_block=kv_block, masked=masked)
    for case, masked, (dim, kv_block) in itertools.product(
        _WORK, (False, True), ((128, 128), (128, 64), (64, 128), (72, 64))
    )
)


def kernels(options: Options) -> list[str]:
    """Names of the kernels that this device can run, simplest first, and one's own last."""
    if not options.on_gpu:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return ["reference", "cpu", *(["triton"] if interpreted else []), *options.custom]
    device, found = torch.device(options.device), ["triton"]
    major, minor = torch.cuda.get_device_capability(device)
    found += [f"triton-{kind}" for kind in ("tma", "specialised") if kind in _kinds_of_tiles(10 * major + minor)]
    found += [name for name in ("gluon", "flash-attn-4") if registry.capability(name, device) is None]
    return [*found, *options.custom]


def _kinds_of_tiles(chip: int) -> set[str]:
    return {
        tile.copy
        for dim, block in itertools.product((64, 128), (64, 128))
        for tile in tiles_for(chip, dim, block, block)
    }


def cases(kernel: str, options: Options) -> list[Case]:
    """The cases that a kernel is tried with: all that it can do; on a CPU with small blocks."""
    if kernel == "gluon":
        return [*_GLUON, *_VARIED]
    listed = [case for case in _ALL if does(kernel, case, torch.device(options.device))]
    return listed if options.on_gpu else _small(kernel, listed)


def does(kernel: str, case: Case, device: torch.device) -> bool:
    """Whether a kernel can do this; a kind of tiles, by such tiles. A kernel of one's own is tried with attention."""
    if kernel not in KERNELS:
        return case.kind == "attend" and case.summary is None
    backend, kind = KERNELS[kernel]
    if registry.capability(backend, device, case) is not None:
        return False
    if kind in ("", "pointers"):
        return True
    if case.kind in ("mass", *AROUND):
        return case.kind == "mass" and triton.measure_tile(chip(device), case.kv_block, 2, True).copy == kind
    flags = triton.flags_of(True, True, case.masked, None, case.kind == "fused")
    flags |= {"BIASED": case.biased, "AXES": case.axes, "SUMMARISED": case.summary is not None}
    return triton.attend_tile(case, device, flags, cast(Copy, kind)).copy == kind


def _small(kernel: str, listed: list[Case]) -> list[Case]:
    """The same with blocks a quarter as large; few for the interpreter, which is slow."""
    small = [case._replace(q_block=max(case.q_block // 4, 16), kv_block=max(case.kv_block // 4, 16)) for case in listed]
    if kernel.startswith("triton"):
        return small[::4]
    return [case for case in small if case.kind not in AROUND]


def jobs(options: Options) -> list[str]:
    """A child for each kernel, for the eight-bit ones together, and for the first use as a user's process has it."""
    if not options.on_gpu:
        return kernels(options)
    return [FIRST_USE, *kernels(options), "eight bits"]  # the first takes the longest


def run(job: str, options: Options, channel: Channel) -> None:
    """One kernel."""
    if job == FIRST_USE:
        return _first_use(options, channel)
    poison()
    if job == "eight bits":
        return _eight_bits(options, channel)
    for case in cases(job, options):
        channel.attempt(job, str(case), partial(_examine, job, case, options, channel), known={"case": case.words()})


def _examine(job: str, case: Case, options: Options, channel: Channel) -> Attempt:
    kernel, device, worst = kernel_of(job), torch.device(options.device), 0.0
    repeats = LAUNCHES if options.on_gpu else 3
    for sample in samples(case, device, long=options.on_gpu):
        channel.alive()
        found = examine(case, kernel, sample, repeats)
        worst = max(worst, found.error)
        if found.problem:
            return {"verdict": "wrong", "why": found.problem, "error": found.error, "repeat_equal": found.equal}
    return {"verdict": "right", "error": worst, "repeat_equal": True}


def launches(options: Options) -> Iterator[tuple[str, str, Case]]:
    """Kernel, shape and case of all that the stage that compiles has to build."""
    for kernel in kernels(options):
        if kernel not in options.custom:
            yield from ((kernel, str(case), case) for case in cases(kernel, options))


def launch(kernel: str, case: Case, options: Options) -> None:
    """Launch all samples of a case; the results are dropped."""
    for sample in samples(case, torch.device(options.device)):
        compute(case, kernel_of(kernel), sample)


def _first_use(options: Options, channel: Channel) -> None:
    """The trials that a user's first run makes, in a process of their own."""
    plain = [case for case in registry.USUAL if not case.masked and case != SELECTION]
    embedded = [case._replace(head_dim=64, value_dim=64, q_block=64, kv_block=64) for case in plain]
    for case in dict.fromkeys((*registry.USUAL, *embedded)):
        with channel.heartbeat(60):
            channel.attempt(FIRST_USE, str(case), partial(_choose, case, torch.device(options.device)))
    with channel.heartbeat(60):
        channel.attempt(FIRST_USE, "eight bits", partial(_choose_eight_bits, torch.device(options.device)))


def _choose(case: Case, device: torch.device) -> Attempt:
    """The trials are made when a backend is chosen, and those of its tiles when it is first called."""
    choice = registry.choose(case, device)
    compute(case, choice.module, next(iter(samples(case, device, long=False))))
    return _verdict(choice)


def _choose_eight_bits(device: torch.device) -> Attempt:
    return _verdict(registry.choose_rounded(_USUAL._replace(precision=INTEGERS), device))


def _verdict(choice: registry.Choice) -> Attempt:
    return {
        "verdict": "wrong" if choice.passed_over else "right",
        "why": "; ".join(choice.passed_over),
        "backend": choice.name,
    }


def _eight_bits(options: Options, channel: Channel) -> None:
    from diffsparse_kernels.backend import reference
    from diffsparse_kernels.backend.triton.eight_bits import block_sparse_attention

    def measure(precision: str, case: Case) -> Attempt:
        worst, equal = 0.0, True
        for sample in itertools.islice(samples(case, torch.device(options.device)), 2):
            q, k, v, lists, key_mask, _, scale = sample[1:8]
            assert lists is not None
            results = [block_sparse_attention(q, k, v, lists, scale, key_mask, precision) for _ in range(LAUNCHES)]
            exact, _ = reference.block_sparse_attention(q.double(), k.double(), v.double(), lists, scale, key_mask)
            worst = max(worst, _relative(results[0][0], exact))
            equal &= all(torch.equal(x, y) for again in results for x, y in zip(again, results[0], strict=True))
        right = worst <= 2 * EIGHT_BITS[precision] and equal
        return {"verdict": "right" if right else "wrong", "error": worst, "repeat_equal": equal}

    for precision, dim, masked in itertools.product(EIGHT_BITS, (64, 128), (False, True)):
        case = _USUAL._replace(head_dim=dim, value_dim=dim, masked=masked)
        channel.attempt(precision, str(case), partial(measure, precision, case))


def _relative(got: Tensor, exact: Tensor) -> float:
    """L2 error over the L2 norm."""
    return float((got.double() - exact).norm() / exact.norm())
