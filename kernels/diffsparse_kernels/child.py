"""A Python process of its own for what may hang or crash: it talks in JSON lines, and is killed when it is silent."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

Message = dict[str, Any]  # as JSON has it
_PATIENCE = 5.0  # seconds for a killed process to end; one stuck in a driver never does


class Ending(NamedTuple):
    """How a child ended.

    how: "done" or "crash"; "hang" or "late" where it was killed.
    why: what is known of the reason.
    """

    how: str
    why: str = ""


def run_child(
    arguments: list[str],
    hear: Callable[[Message], None],
    *,
    start: float,
    silence: float,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Ending:
    """Run `python arguments` on this process's paths, and pass each JSON line of its output to `hear` as it comes.

    Args:
        arguments: of the Python interpreter.
        hear: called with each message.
        start: seconds to its first line.
        silence: seconds without a line, from then on, after which it counts as hanging.
        seconds: that it may take in all.
        environment: what differs from this process's.

    Raises:
        OSError: it can't be started.
    """
    # The child must find the packages where this process did, and nothing else in the folder that it starts in.
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    world = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **(environment or {})}
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.PIPE,  # closed when this process is gone, which `follow_parent` notices
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=world,
            start_new_session=True,
        )
        try:
            return _listen(process, errors, hear, (start, silence, end))
        finally:
            _kill(process)


def say(**message: object) -> None:
    """Called in a child: one message to the process that runs it."""
    sys.stdout.write(json.dumps(message) + "\n")  # one write, since threads may talk too
    sys.stdout.flush()


def follow_parent() -> None:
    """Called in a child: it ends when the process that runs it does, however that ended."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _listen(
    process: subprocess.Popen[str],
    errors: IO[bytes],
    hear: Callable[[Message], None],
    limits: tuple[float, float, float],
) -> Ending:
    patience, silence, end = limits
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
    while True:
        left = min(patience, end - time.monotonic())
        try:
            line = lines.get(timeout=max(left, 0.0))
        except queue.Empty:
            if left < patience:
                return Ending("late", "killed when its time was over")
            return Ending("hang", f"killed after {patience:.0f} s without a sign")
        if line is None:
            break
        with contextlib.suppress(ValueError):  # libraries print, too
            message = json.loads(line)
            if isinstance(message, dict):
                patience = silence
                hear(message)
    try:
        code = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        return Ending("hang", "it closed its output and did not end")
    return Ending("done") if code == 0 else Ending("crash", _reason(code, errors))


def _forward(output: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with output:
        for line in output:
            lines.put(line)
    lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    """The child and whatever it started."""
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)


def _reason(code: int, errors: IO[bytes]) -> str:
    """The signal that ended a process, or the last line of its error output."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}" + (f": {lines[-1][:200]}" if lines else "")
