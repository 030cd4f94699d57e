"""Which back end computes a call: decided once for each class of calls and device, and recorded when it runs.

A back end is used if its `capability` has nothing against the device and the case, and if its kernel, where it is
young, was right in a trial on this device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from diffsparse_kernels import measured, trials
from diffsparse_kernels.case import SELECTION, Case, Kind
from diffsparse_kernels.catalog import BACKENDS, load
from diffsparse_kernels.errors import BackendError, NoKernelError
from diffsparse_kernels.machine import device_name

_YOUNG = ("gluon", "triton", "flash-attn-4")  # tried in a process of their own before they are used
_EIGHT_BIT_DEVICES = ("cuda",)  # where eight bits are faster than none; in the interpreter they run if they are named
_SUBSTITUTE = {"gluon": "triton", "flash-attn-4": "triton"}  # what computes the cases that a named one can't
_USUAL = Case("attend", torch.bfloat16, 128, 128, 128, 128)  # what most models ask for
_FINER = _USUAL._replace(kv_block=64)  # Digest's blocks; the others are AdaSpa's
_MASKED = (
    _USUAL,
    _USUAL._replace(kind="fused"),
    _USUAL._replace(kind="mass"),
    _FINER._replace(summary="first-order"),
    _FINER._replace(kind="summaries"),
)
USUAL = (
    *(case._replace(masked=masked) for masked in (False, True) for case in _MASKED),
    *(_FINER._replace(kind=kind) for kind in ("errors", "statistics")),
    *(_USUAL._replace(kind=kind) for kind in ("rows", "fit")),
    SELECTION,
)


class Choice(NamedTuple):
    """What computes a call.

    Attributes:
        name: of the back end.
        passed_over: those of this device that come before it and can't compute this, or were wrong in their trial; each
            with its reason.
        folds: whether it takes the summaries of this call into its own loop.
    """

    name: str
    passed_over: tuple[str, ...] = ()
    folds: bool = False

    @property
    def module(self) -> ModuleType:
        """Where its functions are."""
        return load(self.name)


_records: ContextVar[tuple[list[Choice], ...]] = ContextVar("records", default=())


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Record what computes each call of a public function in this block, in the order in which the calls run.

    One entry a call: of `attention_with_mass`, what gives the output; where a call also makes summaries or merges them,
    what does that follows. Calls of other threads are not recorded. Code made by `torch.compile` is recorded when it
    runs; open the block outside of it.

    Yields:
        The list that fills, with one `Choice` a call.

    Examples:
        >>> import torch
        >>> from diffsparse_kernels import attention, record
        >>> q, k, v = torch.randn(3, 1, 2, 128, 64)
        >>> with record() as ran:
        ...     out, lse = attention(q, k, v)
        >>> ran[0].name
        'cpu'
    """
    ran: list[Choice] = []
    token = _records.set((*_records.get(), ran))
    try:
        yield ran
    finally:
        _records.reset(token)


def running(choice: Choice) -> ModuleType:
    """The module of a choice that is about to compute a call, which is recorded."""
    for ran in _records.get():
        ran.append(choice)
    return choice.module


def choose(case: Case, device: torch.device, named: str = "") -> Choice:
    """The back end that computes calls of this case.

    Args:
        named: by the caller, or by DIFFSPARSE_BACKEND; that one is used without a trial.

    Raises:
        BackendError: nothing runs on this device, or what was named doesn't.
        NoKernelError: none can do this.
    """
    return _choose(case, device, named or _named())


@cache
def _choose(case: Case, device: torch.device, named: str) -> Choice:
    passed_over: list[str] = []
    absent: list[str] = []
    for name in _candidates(case.kind, device, named):
        reason = capability(name, device)
        if reason is not None:
            absent.append(f"{name}: {reason}")
            continue
        for asked in _ways(name, case):
            reason = capability(name, device, asked) or ("" if name == named else _trial(name, asked, device))
            if not reason:
                return Choice(name, tuple(passed_over), asked.summary is not None)
            passed_over.append(f"{name}: {reason}" if asked.summary is None else f"{name}, summaries too: {reason}")
    reason = f"no kernel on {device} can do this ({case}): {'; '.join(passed_over + absent)}"
    raise NoKernelError(reason, tuple(passed_over))


def _ways(name: str, case: Case) -> list[Case]:
    """What a back end is asked to compute of a case: all of it, if it can take summaries; then without these."""
    apart = case._replace(summary=None)
    return [case, apart] if case.summary is not None and BACKENDS[name].folds else [apart]


def choose_summary(case: Case, device: torch.device) -> Choice:
    """What computes this case of summaries, or a selection: never none, for plain torch can compute all of them."""
    try:
        return choose(case, device)
    except NoKernelError as error:
        return Choice("torch", error.passed_over)


def choose_rounded(case: Case, device: torch.device, named: str = "") -> Choice:
    """What computes this case in its eight bits: never none, for plain torch can emulate all of them.

    It is the triton backend where that can and its kernel was right in its trial, or is named by DIFFSPARSE_BACKEND.

    Args:
        named: "triton" by the caller.

    Raises:
        BackendError: what the caller named doesn't run here.
        NoKernelError: it can't do this.
    """
    if not named:
        return _choose_rounded(case, device, _named())
    check_named(named, device)
    if (reason := capability(named, device, case)) is not None:
        raise NoKernelError(f"the triton backend can't compute {case}: {reason}")
    return Choice(f"triton {case.precision}")


@cache
def _choose_rounded(case: Case, device: torch.device, named: str) -> Choice:
    emulated, fast = f"{case.precision} emulated", f"triton {case.precision}"
    usual = named == "triton" or (not named and device.type in _EIGHT_BIT_DEVICES)
    if not usual or capability("triton", device) is not None:
        return Choice(emulated)
    tried = f"triton-{case.precision}"
    reason = capability("triton", device, case) or ("" if named else trials.verdict(tried, case, device))
    return Choice(emulated, (f"{fast}: {reason}",)) if reason else Choice(fast)


def _named() -> str:
    return os.environ.get("DIFFSPARSE_BACKEND", "")


def _candidates(kind: Kind, device: torch.device, named: str) -> list[str]:
    """Back ends for this kind of calls, in order of preference."""
    return [name for name in _preferred(device, named) if kind in BACKENDS[name].kinds]


def _preferred(device: torch.device, named: str) -> list[str]:
    """Back ends in order of preference; the one that was measured to be the fastest comes first."""
    if named:
        check_named(named, device)
        return [named, *([_SUBSTITUTE[named]] if named in _SUBSTITUTE else [])]
    listed = [name for name, backend in BACKENDS.items() if device.type in backend.default]
    if not listed:
        raise BackendError(f"no backend runs on {device.type!r}; known: {', '.join(BACKENDS)}")
    fastest = measured.measured_backend(device_name(device))
    known = fastest in BACKENDS and device.type in BACKENDS[fastest].devices
    return list(dict.fromkeys([fastest, *listed])) if fastest and known else listed


@cache
def capability(name: str, device: torch.device | None = None, case: Case | None = None) -> str | None:
    """Why a back end does not run here, or on `device`, or can't compute `case` there; None if it can."""
    known = BACKENDS[name].devices
    if device is not None and device.type not in known:
        return f"runs on {', '.join(known)}, not on {device.type}"
    try:
        module = load(name)
        reason: str | None = None if device is None else module.capability(device, case)
    except Exception as error:  # of another package, or of a compiler that renamed things
        return str(error) or type(error).__name__
    return reason


def _trial(name: str, case: Case, device: torch.device) -> str:
    """Why a back end's kernel was wrong in its trial; empty if it was right, or needs none."""
    return trials.verdict(name, case, device) if name in _YOUNG else ""


def check_known(name: str) -> None:
    """Raise BackendError unless `name` is a back end."""
    if name not in BACKENDS:
        raise BackendError(f"no backend is called {name!r}; known are {', '.join(BACKENDS)}")


def check_named(name: str, device: torch.device) -> None:
    """Raise BackendError unless `name` is a back end that runs on `device`."""
    check_known(name)
    reason = capability(name, device)
    if reason is not None:
        raise BackendError(f"backend {name!r} can't run on {device}: {reason}")


def backends(device: torch.device | None = None) -> dict[str, str]:
    """Every back end by name: "available", or the reason why it does not run here, or on `device` if that is given.

    On a GPU, kernels that were never tried on it are tried now, in a process of their own.
    """
    found = {}
    for name in BACKENDS:
        reason = capability(name, device)
        if reason is None and device is not None:
            reason = capability(name, device, _USUAL) or _trial(name, _USUAL, device)
        found[name] = reason or "available"
    return found


def backend_for(device: torch.device) -> str:
    """Name of the back end that calls on `device` take by default: of the usual heads of 128, in blocks of 128.

    DIFFSPARSE_BACKEND if set, else the one that `diffsparse doctor --measure` found the fastest, else the first that
    can.
    """
    return choose(_USUAL, device).name


def forget_measurements() -> None:
    """Read what was measured on this machine again, when it is next asked for."""
    for known in (_choose, _choose_rounded, capability):
        known.cache_clear()
    measured.forget()
    trials.forget()
