"""A young kernel is tried in a process of its own before it is used, once for each device, driver and version.

A compiler that is new to a chip can make a kernel that is wrong, raises, takes the process down or never ends. None of
that may happen to the caller: `backend/selftest.py` runs in a child, and the verdict is kept in the cache folder. The
child takes case after case as long as kernels are right: to start it takes longer than to try a kernel.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from diffsparse_kernels.case import Case
from diffsparse_kernels.child import Child, Ending, Message
from diffsparse_kernels.machine import cache_folder, device_name, driver

RIGHT = "right"
SECONDS = 30.0  # that a trial may be silent: compiling, copying, computing
_START = 90.0  # to import torch and to open the device
_LONGEST = 300.0
_MARK = "DIFFSPARSE_TRIAL"  # set in a trial's own process
_COMPILERS = ("triton", "flash-attn-4", "nvidia-cutlass-dsl")  # packages that make kernels, or hold others' source
_TRIED_ON = ("cuda",)  # kinds of device; on others tests show whether a kernel is right
_LOG = logging.getLogger(__name__)
_lock = threading.RLock()
_verdicts: dict[tuple[str, Case, str], str] = {}
_children: dict[tuple[int, str], Child] = {}  # of the process that started each (one may fork), and the device


def verdict(kernel: str, case: Case, device: torch.device) -> str:
    """Why `kernel` must not be used for `case` on `device`; empty if it was right. May run a child for some seconds.

    Args:
        kernel: a name in `selftest.KERNELS`.
        case: the class of calls.
        device: where it would run.
    """
    if device.type not in _TRIED_ON:
        return ""
    key = kernel, case, str(device)
    with _lock:
        if key not in _verdicts:
            result = _kept(kernel, case, device) or _tried(kernel, case, device)
            _verdicts[key] = "" if result == RIGHT else result
        return _verdicts[key]


def found(device: torch.device) -> list[dict[str, str]]:
    """The verdicts that the cache folder holds for `device`, its driver, and what is installed."""
    rows, world = [], _world(device)
    for path in sorted(_folder().glob("*.json")):
        with suppress(OSError, ValueError):
            rows.append(json.loads(path.read_text()))
    return [row for row in rows if isinstance(row, dict) and row.items() >= world.items() and "verdict" in row]


def forget() -> None:
    """Read verdicts from the cache folder again when they are next asked for."""
    with _lock:
        _verdicts.clear()


@atexit.register
def end() -> None:
    """End the processes that wait for cases of this one; the next trial starts another."""
    for key in [key for key in _children if key[0] == os.getpid()]:
        _children.pop(key).kill()


def _kept(kernel: str, case: Case, device: torch.device) -> str:
    """A verdict of the cache folder; empty if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_path(kernel, case, device).read_text())["verdict"])
    return ""


def _tried(kernel: str, case: Case, device: torch.device) -> str:
    """Try it in the child -> "right", or what is wrong."""
    if os.environ.get(_MARK) or getattr(sys, "frozen", False):  # an application's executable would start it once more
        return "it could not be tried: this process has no Python of its own to try it in"
    _announce(device)
    _LOG.info("trying the kernel %s (%s)", kernel, case)
    try:
        result, final = _result(*_asked(kernel, case, device))
    except (OSError, TypeError, ValueError) as error:
        return f"it could not be tried: {error}"
    if final:
        _keep(kernel, case, device, result)
        if result != RIGHT:
            warnings.warn(f"the kernel {kernel} is not used on {device_name(device)}: {result} ({case})", stacklevel=2)
    return result


@cache
def _announce(device: torch.device) -> None:
    """Told once, whatever is tried after it."""
    _LOG.warning(
        "kernels are tried on %s before their first use, once on this machine, in a process of their own; "
        "in all this may take about a minute",
        device_name(device),
    )


def _asked(kernel: str, case: Case, device: torch.device) -> tuple[Ending, list[Message]]:
    """How the trial of one case ended, and what was said of it."""
    key = os.getpid(), str(device)
    while True:
        warm, messages = _children.pop(key, None), list[Message]()
        child = warm or Child(_command(device), {_MARK: "1"})
        try:
            ending = _heard(child, messages, {"kernel": kernel, "case": case.words()}, SECONDS if warm else _START)
        finally:
            if right := bool(messages) and messages[-1].get("verdict") == RIGHT:
                _children[key] = child
            else:
                child.kill()  # who knows what a kernel that was wrong has left in its memory
        if right or warm is None:  # else an earlier kernel may be the cause, or the child had just ended, idle
            return ending, messages


def _heard(child: Child, messages: list[Message], request: Message, start: float) -> Ending:
    """Ask for one trial, and collect what is said of it. start: seconds to the first message."""

    def hear(message: Message) -> bool:
        messages.append(message)
        return "verdict" in message or "untried" in message

    child.tell(**request)
    return child.listen(hear, start=start, silence=SECONDS, seconds=_LONGEST)


def _result(ending: Ending, messages: list[Message]) -> tuple[str, bool]:
    """What the end of a trial says of the kernel, and whether it is final; if not, the next process tries again."""
    last = messages[-1] if messages else {}
    killed = ending.why.endswith("SIGKILL")  # by the system, which ran out of memory
    if "untried" in last or not messages or ending.how == "late" or killed:
        return f"it could not be tried: {last.get('untried') or ending.why or ending.how}", False
    if ending.how in ("heard", "done"):
        return str(last.get("verdict", "its trial ended early")), True
    return f"{ending.how} in its trial ({last.get('trying', 'start')}): {ending.why}", True


def _command(device: torch.device) -> list[str]:
    return ["-m", "diffsparse_kernels.backend.selftest", str(device)]


def _keep(kernel: str, case: Case, device: torch.device, result: str) -> None:
    """Write the verdict whole or not at all; where the folder takes no files, the next process tries again."""
    path, row = _path(kernel, case, device), {**_world(device), "kernel": kernel, "case": str(case), "verdict": result}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(number, "w") as file:
            json.dump(row, file, indent=1)
        os.replace(temporary, path)


def _path(kernel: str, case: Case, device: torch.device) -> Path:
    text = json.dumps([_world(device), kernel, case.words()])
    return _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _folder() -> Path:
    return cache_folder() / "trials"


def _world(device: torch.device) -> dict[str, str]:
    """All that a verdict depends on besides the case."""
    known = {"device": device_name(device), "driver": driver(), "torch": torch.__version__}
    return known | {name: _version(name) for name in _COMPILERS} | {"source": source()}


@cache
def source() -> str:
    """A hash of this package: what a verdict, or a measurement, was made of."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
