"""The backends, and which of them answers a call: asked once for each class of calls and device."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from diffsparse_kernels import measured as cached
from diffsparse_kernels import trials
from diffsparse_kernels.backend.triton import tiles
from diffsparse_kernels.case import Case
from diffsparse_kernels.errors import BackendError, NoKernelError
from diffsparse_kernels.measured import device_name, measured_backend


class Backend(NamedTuple):
    """module: where its functions are. devices: the kinds it runs on. unasked: those on which nobody need name it."""

    module: str
    devices: tuple[str, ...]
    unasked: tuple[str, ...] = ()


# In this order they are asked. The reference is exact and slow: on a GPU dense attention is the better answer.
BACKENDS = {
    "cpu": Backend("diffsparse_kernels.backend.cpu", ("cpu",), ("cpu",)),
    "gluon": Backend("diffsparse_kernels.backend.gluon.launch", ("cuda",), ("cuda",)),
    "triton": Backend("diffsparse_kernels.backend.triton.launch", ("cuda", "cpu"), ("cuda", "cpu")),
    "reference": Backend("diffsparse_kernels.backend.reference", ("cpu", "cuda", "mps", "xpu"), ("cpu", "mps", "xpu")),
    "flex": Backend("diffsparse_kernels.backend.flex", ("cuda", "cpu")),
    "flash-attn-4": Backend("diffsparse_kernels.backend.flash4", ("cuda",)),
}
_YOUNG = ("gluon", "triton", "flash-attn-4")  # tried in a process of their own before they are trusted
_BESIDE = {"gluon": "triton", "flash-attn-4": "triton"}  # who does what these can't
_USUAL = Case("attend", torch.bfloat16, 128, 128, 128, 128)  # what most models ask for
USUAL = tuple(
    _USUAL._replace(kind=kind, masked=masked) for masked in (False, True) for kind in ("attend", "mass", "means")
)


class Choice(NamedTuple):
    """The backend that answers, and those of this device that can't or may not, with their reasons."""

    name: str
    passed_over: tuple[str, ...] = ()

    @property
    def module(self) -> ModuleType:
        """Where its functions are."""
        return load(self.name)


def choose(case: Case, device: torch.device, named: str = "") -> Choice:
    """The backend that answers calls of this case.

    named: by the caller, or by DIFFSPARSE_BACKEND; such a one is taken at its word, without a trial.

    Raises:
        BackendError: nothing runs on this device, or what was named doesn't. NoKernelError: none can do this.
    """
    return _choose(case, device, named or os.environ.get("DIFFSPARSE_BACKEND", ""))


@cache
def _choose(case: Case, device: torch.device, named: str) -> Choice:
    passed_over: list[str] = []
    absent: list[str] = []
    for name in _asked(device, named):
        reason = obstacle(name, device)
        if reason:
            absent.append(f"{name}: {reason}")
            continue
        reason = refusal(name, case) or ("" if name == named else _distrust(name, case, device))
        if not reason:
            return Choice(name, tuple(passed_over))
        passed_over.append(f"{name}: {reason}")
    raise NoKernelError(f"no kernel on {device} can do this ({case}): {'; '.join(passed_over + absent)}")


def _asked(device: torch.device, named: str) -> list[str]:
    """Backends in the order in which they are asked: the one that was measured to be the fastest comes first."""
    if named:
        check_named(named, device)
        return [named, *([_BESIDE[named]] if named in _BESIDE else [])]
    listed = [name for name, backend in BACKENDS.items() if device.type in backend.unasked]
    if not listed:
        raise BackendError(f"no backend runs on {device.type!r}; known: {', '.join(BACKENDS)}")
    fastest = measured_backend(device_name(device))
    known = fastest in BACKENDS and device.type in BACKENDS[fastest].devices
    return list(dict.fromkeys([fastest, *listed])) if fastest and known else listed


def check_known(name: str) -> None:
    """Raise BackendError unless `name` is a backend."""
    if name not in BACKENDS:
        raise BackendError(f"no backend is called {name!r}; known are {', '.join(BACKENDS)}")


def check_named(name: str, device: torch.device) -> None:
    """Raise BackendError unless `name` is a backend that runs on `device`."""
    check_known(name)
    reason = obstacle(name, device)
    if reason:
        raise BackendError(f"backend {name!r} can't run on {device}: {reason}")


def backends(device: torch.device | None = None) -> dict[str, str]:
    """Every backend by name: "available", or the reason why it does not run here, or on `device` if that is given.

    On a GPU, kernels that were never tried on it are tried now, in a process of their own.
    """
    found = {}
    for name in BACKENDS:
        reason = obstacle(name, device)
        if not reason and device is not None:
            reason = refusal(name, _USUAL) or _distrust(name, _USUAL, device)
        found[name] = reason or "available"
    return found


def backend_for(device: torch.device) -> str:
    """Name of the backend that calls on `device` take by default: of the usual heads of 128, in blocks of 128.

    DIFFSPARSE_BACKEND if set, else the one that `diffsparse doctor --measure` found the fastest, else the first that
    fits.
    """
    return choose(_USUAL, device).name


@cache
def load(name: str) -> ModuleType:
    """The module of a backend, imported now if it was not."""
    return import_module(BACKENDS[name].module)


@cache
def obstacle(name: str, device: torch.device | None = None) -> str:
    """Why a backend does not run here at all; modules that know more of devices than their kind have `unfit`."""
    known = BACKENDS[name].devices
    if device is not None and device.type not in known:
        return f"runs on {', '.join(known)}, not on {device.type}"
    try:
        module = load(name)
        unfit = getattr(module, "unfit", None)
        return "" if unfit is None or device is None else str(unfit(device))
    except Exception as error:  # of somebody else's package, or of a compiler that renamed things
        return str(error) or type(error).__name__


def refusal(name: str, case: Case) -> str:
    """What a backend can't do of this case; modules that can't do all have `refuses`."""
    refuses = getattr(load(name), "refuses", None)
    return "" if refuses is None else str(refuses(case))


def _distrust(name: str, case: Case, device: torch.device) -> str:
    """Why a backend's kernel may not be used where nobody named it."""
    return trials.verdict(name, case, device) if name in _YOUNG else ""


def forget_measurements() -> None:
    """Read what is measured on this machine anew, when it is next asked for."""
    for known in (_choose, obstacle, cached.break_even_rows, tiles.tuned):
        known.cache_clear()
    trials.forget()
