"""The parent: it never touches the device. Each stage is a child, and whatever a child does, the next begins."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import IO, NoReturn

from diffsparse_eval.gpu.stage import STAGES, WHOLE, Channel, Options, Stage, label, module_of, usual
from diffsparse_eval.gpu.table import summary
from diffsparse_eval.rows import SCHEMA, AccountFacts, AccountRow, Attempt, TileRow, TilesRow
from diffsparse_eval.tune import tiles_row
from diffsparse_kernels.child import Message, follow_parent, run_child

ROWS, TABLE, TILES = "rows.jsonl", "table.txt", "tiles.json"
_START = 90.0  # seconds to import torch and open a device
_MARGIN = 3.0  # seconds between the time that a child is given and its end
_LEAST = 4.0  # seconds: with fewer left nothing is begun
_FAILURES = 4  # of one child, after which its stage goes on without it
_EMPTY: Attempt = {  # fields that each row has
    "stage": "",
    "shape": None,
    "kernel": None,
    "verdict": "",
    "ms": None,
    "tflops": None,
    "share": None,
    "error": None,
    "repeat_equal": None,
}


def main(arguments: list[str] | None = None) -> None:
    """The command line of the parent, and of its children."""
    parsed = _parser().parse_args(arguments)
    options = Options(parsed.device, parsed.shrink, _names(parsed.kernels), _names(parsed.without))
    if parsed.stage:
        stage = next(stage for stage in STAGES if stage.name == parsed.stage)
        follow_parent()
        channel = Channel(tuple(map(int, _names(parsed.failed))), parsed.first, parsed.end)
        return module_of(stage).run(parsed.job, options, channel)
    if parsed.shrink < 1 or parsed.seconds <= 0:
        _stop("--shrink and --seconds want numbers of at least 1")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        rows = (parsed.out / ROWS).open("a")  # rows of an earlier account stay
    except OSError as error:
        _stop(f"can't write into {parsed.out}: {error.strerror or error}; choose another folder with --out")
    with rows:
        account = Account(options, parsed.out, rows, parsed.seconds)
        account.run()
    print(f"{account.count} rows are in {parsed.out / ROWS}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffsparse_eval.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu"), help="folder for rows.jsonl, table.txt, tiles.json")
    add("--seconds", type=float, default=WHOLE, help="budget; a short one drops the last stages")
    add("--device", default="cuda", help="cuda, or cpu to try the program itself")
    add("--shrink", type=int, default=1, help="divide tokens by this, on a machine without a GPU")
    add("--kernels", default="", help="kernels of one's own to try beside ours: module:attribute, separated by commas")
    for name in ("--stage", "--job", "--without", "--failed"):
        add(name, default="", help=argparse.SUPPRESS)
    add("--first", type=int, default=0, help=argparse.SUPPRESS)
    add("--end", type=float, default=math.inf, help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _stop(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


class Account:
    """Runs the stages, and writes each row as it comes: flushed and synced, since the machine may end at any time."""

    def __init__(self, options: Options, out: Path, rows: IO[str], seconds: float) -> None:
        self.options, self.out = options, out
        self.facts: AccountFacts = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.rows: list[AccountRow] = []
        self._file, self._lock, self._folders = rows, threading.Lock(), ExitStack()
        self._plan: dict[str, list[str] | str] = {}
        self._begun, self._seconds, self._missing = time.monotonic(), seconds, ""

    @property
    def count(self) -> int:
        """Rows so far."""
        return len(self.rows)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self._begun + self._seconds - time.monotonic()

    def run(self) -> None:
        """All stages, most important first; the table last."""
        with self._folders:
            # Compiled kernels and verdicts of this account alone, and none of them below the folder of results.
            caches = {
                name: self._folders.enter_context(tempfile.TemporaryDirectory(prefix="diffsparse-"))
                for name in ("TRITON_CACHE_DIR", "DIFFSPARSE_CACHE")
            }
            # On a CPU: Triton's interpreter, and one thread a child, since children run side by side.
            rehearsal = {} if self.options.on_gpu else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            for stage in STAGES:
                self._stage(stage, {**caches, **rehearsal})
                if self._missing:
                    _stop(f"this wants {self._missing}. To try the program itself: --device cpu --shrink 600")
        text = summary(self.rows, self.facts)
        (self.out / TABLE).write_text(text)
        print(text)

    def _stage(self, stage: Stage, environment: dict[str, str]) -> None:
        # Shares add up: what one stage leaves, the next may use.
        shares = sum(before.seconds for before in STAGES[: STAGES.index(stage) + 1])
        seconds = min(shares * max(1.0, self._seconds / WHOLE) - (self._seconds - self.left), self.left)
        if stage is STAGES[0]:  # all others need it, and a cold machine takes long to import torch
            seconds = self.left
        if seconds < _LEAST:
            return self.add(stage, {"verdict": "no time"})
        jobs = self._jobs(stage)
        if isinstance(jobs, str):
            return self.add(stage, {"verdict": "left out", "why": jobs})
        self._say(f"{stage.name}: {len(jobs)} children, {seconds:.0f} s at most")
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(min(stage.at_once, os.cpu_count() or 1)) as pool:
            for done in [pool.submit(self._job, stage, job, environment, end) for job in jobs]:
                done.result()

    def _jobs(self, stage: Stage) -> list[str] | str:
        if stage is STAGES[0]:
            return [stage.name]
        if stage.name != "sanitizer":
            return self._plan.get(stage.name, "the first stage did not report what there is to do")
        wrong = [row for row in self.rows if row.get("case") and row["verdict"] not in ("right", "no time")]
        return ["|".join([str(row["kernel"]), *row["case"]]) for row in wrong[:1]] or [""]

    def _job(self, stage: Stage, job: str, environment: dict[str, str], end: float) -> None:
        """One child, and if it fails another that goes on after the failure."""
        first, failed = 0, list[int]()
        for _ in range(_FAILURES):
            left = end - time.monotonic()
            if left < _LEAST:
                return self.add(stage, {"kernel": job, "verdict": "no time"})
            listener = _Listener(self, stage)
            command = ["-m", "diffsparse_eval.gpu", *self.options.arguments(), "--stage", stage.name, "--job", job]
            command += ["--without", ",".join(self._dangerous()), "--failed", ",".join(map(str, failed))]
            command += ["--first", str(first), "--end", str(end - _MARGIN)]
            limits = {"start": min(_START, left), "silence": stage.silence, "seconds": left}
            try:
                ending = run_child(command, listener.hear, **limits, environment=environment)
            except OSError as error:
                return self.add(stage, {"kernel": job, "verdict": "crash", "why": str(error)})
            if ending.how == "done":
                return
            verdict = "no time" if ending.how == "late" else ending.how
            if listener.open or listener.number < 0:
                trying = listener.trying or {"kernel": job}
                self.add(stage, {**trying, "verdict": verdict, "why": ending.why})
            if ending.how == "late" or listener.number < 0:  # another child would get no further
                return
            failed.append(listener.number)
            first = max(listener.number + 1, first)

    def _dangerous(self) -> list[str]:
        """Kernels that hung or crashed and are not timed: all but those that passed what most models need."""
        tried = [row for row in self.rows if row.get("case")]
        bad = {str(row["kernel"]) for row in tried if row["verdict"] in ("hang", "crash")}
        ended = {
            label(str(row["kernel"]), masked)
            for row in tried
            for masked in (False, True)
            if row["verdict"] in ("right", "wrong", "raised") and usual(row["case"], masked)
        }
        return sorted({label(kernel, masked) for kernel in bad for masked in (False, True)} - ended)

    def add(self, stage: Stage, row: Attempt) -> None:
        """Write one row."""
        whole: AccountRow = {**_EMPTY, **row, "stage": stage.name, **self.facts, "schema": SCHEMA}
        with self._lock:
            self.rows.append(whole)
            self._file.write(json.dumps(whole) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            if stage.name == "tune":
                (self.out / TILES).write_text(json.dumps(_best_tiles(self.rows), indent=1))
        if row["verdict"] not in ("compiled", "ran"):
            shown = (row.get("kernel"), row.get("kind"), row.get("shape"), row["verdict"], _ms(row), row.get("why"))
            self._say(f"  {stage.name}: " + ", ".join(str(x) for x in shown if x)[:160])

    def know(self, facts: AccountFacts) -> None:
        """Take facts that hold for all rows from now on."""
        self.facts.update(facts)

    def plan(self, jobs: dict[str, list[str] | str]) -> None:
        """Take the children of all stages, as the first one found them."""
        self._plan = jobs

    def miss(self, what: str) -> None:
        """Take the reason why nothing can be done here."""
        self._missing = what

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:5.0f} s  {text}", flush=True)


class _Listener:
    """What one child reported last."""

    def __init__(self, account: Account, stage: Stage) -> None:
        self.account, self.stage = account, stage
        self.number, self.open = -1, False
        self.trying: Attempt = {}

    def hear(self, message: Message) -> None:
        """Rows are written at once; an attempt is open until its row comes."""
        if "trying" in message:
            self.number, self.open, self.trying = message["number"], True, message["trying"]
        if "row" in message:
            self.open = self.open and message.get("number") != self.number
            self.account.add(self.stage, message["row"])
        if "facts" in message:
            self.account.know(message["facts"])
        if "jobs" in message:
            self.account.plan(message["jobs"])
        if "missing" in message:
            self.account.miss(message["missing"])


def _best_tiles(rows: list[AccountRow]) -> list[TilesRow]:
    """The table of tiles, as `diffsparse bench --tune` writes it into the cache folder."""
    sizes: dict[tuple[str, int, int, int], list[tuple[float, TileRow]]] = {}
    for row in rows:
        if row["stage"] == "tune" and row["ms"] is not None and row.get("tile") is not None:
            size = row["device"], row["head_dim"], row["q_block"], row["kv_block"]
            sizes.setdefault(size, []).append((row["ms"], row["tile"]))
    return [tiles_row(*size, (tile for _, tile in sorted(timed, key=itemgetter(0)))) for size, timed in sizes.items()]


def _ms(row: Attempt) -> str:
    ms = row.get("ms")
    return f"{ms:.3g} ms" if ms else ""
