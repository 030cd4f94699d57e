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
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

Message = dict[str, Any]  # as JSON has it
_PATIENCE = 5.0  # seconds for a killed process to end; one stuck in a driver never does


class Ending(NamedTuple):
    """How a child ended.

    Attributes:
        how: "done" or "crash"; "hang" or "late" where it is to be killed; "heard" where it goes on.
        why: what is known of the reason.
    """

    how: str
    why: str = ""


class Child:
    """`python arguments` on this process's paths, started at once.

    Args:
        arguments: of the Python interpreter.
        environment: what differs from this process's.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        # The child must find the packages where this process did, and nothing else in the folder that it starts in.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        with contextlib.ExitStack() as opened:
            self._errors = opened.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [sys.executable, "-P", *arguments],
                stdin=subprocess.PIPE,  # closed when this process is gone, which `follow_parent` notices
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
            opened.pop_all()  # `kill` closes it
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def tell(self, **message: object) -> None:
        """Send one message; where the child has ended, `listen` tells how."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def listen(self, hear: Callable[[Message], object], *, start: float, silence: float, seconds: float) -> Ending:
        """Pass each JSON line of its output to `hear` as it comes, until it ends, or `hear` returns True.

        Args:
            hear: called with each message.
            start: seconds to the first line.
            silence: seconds without a line, from then on, after which it counts as hanging.
            seconds: that it may take in all.
        """
        end, patience = time.monotonic() + seconds, start
        while True:
            left = min(patience, end - time.monotonic())
            try:
                line = self._lines.get(timeout=max(left, 0.0))
            except queue.Empty:
                if left < patience:
                    return Ending("late", "killed when its time was over")
                return Ending("hang", f"killed after {patience:.0f} s without a sign")
            if line is None:
                self._lines.put(None)  # for who listens again
                return self._ended()
            with contextlib.suppress(ValueError):  # libraries print, too
                message = json.loads(line)
                if isinstance(message, dict):
                    patience = silence
                    if hear(message) is True:
                        return Ending("heard")

    def kill(self) -> None:
        """End it, and whatever it started."""
        # One that has ended was not waited for, but by `listen` just now: its number is no other process's yet.
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._errors.close()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _ended(self) -> Ending:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return Ending("hang", "it closed its output and did not end")
        return Ending("done") if code == 0 else Ending("crash", _reason(code, self._errors))


def run_child(
    arguments: list[str],
    hear: Callable[[Message], None],
    *,
    start: float,
    silence: float,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Ending:
    """Run a `Child` to its end, and `listen` to it.

    Raises:
        OSError: it can't be started.
    """
    child = Child(arguments, environment)
    try:
        return child.listen(hear, start=start, silence=silence, seconds=seconds)
    finally:
        child.kill()


def say(**message: object) -> None:
    """Called in a child: one message to the process that runs it."""
    sys.stdout.write(json.dumps(message) + "\n")  # one write, since threads may talk too
    sys.stdout.flush()


def follow_parent(hear: Callable[[str], object] = lambda line: None) -> None:
    """Called in a child: it ends when the process that runs it does, however that ended.

    Args:
        hear: called with each line from that process, in a thread.
    """

    def wait() -> None:
        for line in sys.stdin:
            hear(line)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def requests(idle: float) -> Iterator[Message]:
    """Called in a child: what `Child.tell` sends, until nothing comes for `idle` seconds; follows the parent."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    follow_parent(lines.put)
    with contextlib.suppress(queue.Empty):
        while True:
            yield json.loads(lines.get(timeout=idle))


def _forward(output: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with output:
        for line in output:
            lines.put(line)
    lines.put(None)


def _reason(code: int, errors: IO[bytes]) -> str:
    """The signal that ended a process, or the last line of its error output."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}" + (f": {lines[-1][:200]}" if lines else "")
