"""A young kernel is tried in a process of its own: whatever it does there, the process that asks goes on, and knows."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffsparse_kernels import child, select, summaries, trials
from diffsparse_kernels.backend import cpu, emulated, reference
from diffsparse_kernels.backend import selftest as proof
from diffsparse_kernels.case import PRECISIONS, SELECTION, Case, Summary
from support import trial

SCRIPT = str(Path(trial.__file__))
CPU = torch.device("cpu")
CASE = Case("attend", torch.bfloat16, 16, 16, 16, 16)
MASSES = CASE._replace(kind="fused")
LIMITS = {"start": 60.0, "silence": 60.0, "seconds": 60.0}
OUTCOMES = {
    "raise": "raised RuntimeError: out of resource: shared memory",
    "wrong": r"wrong: the output is off by \S+, \S+ is explained \(lists\)",
    "unwritten": r"wrong: the output is off by inf",
    "race": r"wrong: not the same twice \(lists\)",
    "hang": r"hang in its trial \(lists\): killed after 8 s without a sign",
    "crash": r"crash in its trial \(lists\): ended by SIGSEGV",
    "exit": r"crash in its trial \(lists\): exit code 1: the driver said no",
}


@pytest.fixture(autouse=True)
def a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The CPU as if it were a device where kernels are young, with a cache folder of its own."""
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(trials, "_TRIED_ON", ("cpu",))
    monkeypatch.setattr(trials, "SECONDS", 8.0)
    trials.forget()
    yield tmp_path / "trials"
    trials.end()


def behave(monkeypatch: pytest.MonkeyPatch, mode: str) -> list[str]:
    """In trials the kernel gluon does so, and others what they are called -> what was tried in a process of its own."""
    started: list[str] = []

    def command(device: torch.device) -> list[str]:
        started.append(str(device))
        return [SCRIPT, mode, str(device)]

    monkeypatch.setattr(trials, "_command", command)
    return started


@pytest.mark.parametrize("mode", OUTCOMES)
def test_whatever_a_kernel_does_the_caller_goes_on(mode: str, a_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = behave(monkeypatch, mode)
    with pytest.warns(UserWarning, match="the kernel gluon is not used on"):
        told = trials.verdict("gluon", CASE, CPU)
    assert re.match(OUTCOMES[mode], told), told
    assert trials.verdict("gluon", CASE, CPU) == told
    trials.forget()  # as another process would begin
    assert trials.verdict("gluon", CASE, CPU) == told
    assert started == ["cpu"]
    (row,) = trials.found(CPU)
    assert row["verdict"] == told
    assert row["torch"] == torch.__version__
    assert len(list(a_machine.iterdir())) == 1


DONE = child.Ending("done")


class Pretended:
    """Children that say this of each case, and end so where nobody had enough of it."""

    def __init__(self, *messages: child.Message, ending: child.Ending = DONE) -> None:
        self.messages, self.ending = messages, ending
        self.started: list[list[str]] = []
        self.asked: list[child.Message] = []

    def start(self, arguments: list[str], environment: dict[str, str]) -> Pretended:
        assert environment == {"DIFFSPARSE_TRIAL": "1"}
        self.started.append(arguments)
        return self

    def tell(self, **request: Any) -> None:
        self.asked.append(request)

    def listen(self, hear: Callable[[child.Message], object], **_: Any) -> child.Ending:
        enough = any(hear(message) is True for message in self.messages)
        return child.Ending("heard") if enough else self.ending

    def kill(self) -> None:
        """There is nothing to end."""


def pretend(monkeypatch: pytest.MonkeyPatch, children: Pretended) -> Pretended:
    monkeypatch.setattr(trials, "Child", children.start)
    return children


RIGHT = {"verdict": "right"}


def test_the_right_one_is_tried_once_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    children = pretend(monkeypatch, Pretended(RIGHT))
    threads = [threading.Thread(target=trials.verdict, args=("gluon", CASE, CPU)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trials.verdict("gluon", CASE, CPU) == ""
    assert children.started == [["-m", "diffsparse_kernels.backend.selftest", "cpu"]]
    assert children.asked == [{"kernel": "gluon", "case": CASE.words()}]
    assert trials.verdict("gluon", CASE._replace(masked=True), CPU) == ""
    assert len(children.asked) == 2
    for count, name in enumerate(("driver", "_version"), 3):  # of the packages that kernels are borrowed from, too
        monkeypatch.setattr(trials, name, lambda *_: "another")
        trials.forget()
        trials.verdict("gluon", CASE, CPU)
        assert len(children.asked) == count
    assert len(children.started) == 1


def test_a_full_device_says_nothing_of_the_kernel(a_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does without the kernel, the next one tries again."""
    started = behave(monkeypatch, "full")
    for _ in range(2):
        assert trials.verdict("gluon", CASE, CPU).startswith("it could not be tried: OutOfMemoryError")
    assert started == ["cpu"]
    assert not a_machine.exists()
    for number, executable in enumerate(("/nowhere/python", None)):
        monkeypatch.setattr(sys, "executable", executable)
        assert trials.verdict(f"triton{number}", CASE, CPU).startswith("it could not be tried: ")


@pytest.mark.parametrize(
    "told", ["Triton Error [CUDA]: out of memory", "Failed to find C compiler.", "[Errno 28] No space left on device"]
)
def test_what_passes_is_no_verdict(
    told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError(told)

    monkeypatch.setattr(proof, "_verdict", fails)
    proof.attempt("cpu", "gluon", CASE.words())
    assert told in json.loads(capsys.readouterr().out.splitlines()[-1])["untried"]


def test_a_trial_killed_from_outside_is_no_verdict(a_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Pretended({"trying": "lists"}, ending=child.Ending("crash", "ended by SIGKILL")))
    assert trials.verdict("gluon", CASE, CPU) == "it could not be tried: ended by SIGKILL"
    assert not a_machine.exists()


def test_no_trial_within_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "Child", lambda *_, **__: pytest.fail("no child of a child"))
    monkeypatch.setenv("DIFFSPARSE_TRIAL", "1")
    assert "no Python of its own" in trials.verdict("gluon", CASE, CPU)
    monkeypatch.delenv("DIFFSPARSE_TRIAL")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "no Python of its own" in trials.verdict("gluon", CASE._replace(masked=True), CPU)


def numbers() -> list[int]:
    """Of the processes that wait for cases."""
    return [child.pid for child in trials._children.values()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def test_poison_is_cheap() -> None:
    """Torch's own switch imports a compiler, which takes as long as all else that a trial starts with."""
    code = """
import sys
import torch
from diffsparse_kernels.backend import selftest
from diffsparse_kernels.child import say
before = set(sys.modules)
selftest.poison()
say(more=len(set(sys.modules) - before), poisoned=bool(torch.empty(3).isnan().all()))
"""
    heard: list[child.Message] = []
    assert child.run_child(["-c", code], heard.append, **LIMITS) == ("done", "")
    assert heard == [{"more": 0, "poisoned": True}]


def test_one_process_tries_case_after_case(monkeypatch: pytest.MonkeyPatch) -> None:
    started = behave(monkeypatch, "right")
    assert trials.verdict("gluon", CASE, CPU) == ""
    (first,) = numbers()
    for kernel, case in (("gluon", CASE._replace(masked=True)), ("triton", CASE), ("triton", MASSES)):
        assert trials.verdict(kernel, case, CPU) == ""
    assert numbers() == [first]
    assert started == ["cpu"]
    trials.end()
    assert not is_alive(first)


@pytest.mark.parametrize("mode", ["wrong", "hang", "crash"])
def test_after_a_failure_another_process_goes_on(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others were tried before, they may have been the cause: the verdict is that of a process without any."""
    started = behave(monkeypatch, mode)
    assert trials.verdict("triton", CASE, CPU) == ""
    (first,) = numbers()
    with pytest.warns(UserWarning, match="the kernel gluon is not used on"):
        assert re.match(OUTCOMES[mode], trials.verdict("gluon", CASE, CPU))
    assert numbers() == []
    assert not is_alive(first)
    assert trials.verdict("triton", MASSES, CPU) == ""
    assert len(numbers()) == 1
    assert started == ["cpu"] * 3


def test_a_process_that_has_ended_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    started = behave(monkeypatch, "right")
    assert trials.verdict("triton", CASE, CPU) == ""
    (first,) = numbers()
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(first))
    assert trials.verdict("gluon", CASE, CPU) == ""
    assert numbers() != [first]
    assert started == ["cpu"] * 2


def test_a_fork_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves that of its parent alone."""
    children = pretend(monkeypatch, Pretended(RIGHT))
    assert trials.verdict("gluon", CASE, CPU) == ""
    monkeypatch.setattr(os, "getpid", lambda: -1)
    trials.end()
    assert len(trials._children) == 1
    assert trials.verdict("triton", CASE, CPU) == ""
    assert len(children.started) == len(trials._children) == 2
    trials.end()


def test_who_waits_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend(monkeypatch, Pretended(RIGHT))
    trials._announce.cache_clear()
    with caplog.at_level("INFO", logger=trials.__name__):
        for kernel in ("gluon", "triton"):
            trials.verdict(kernel, CASE, CPU)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO", "INFO"]
    assert "once on this machine" in told[0][1]
    assert "about a minute" in told[0][1]
    assert told[2][1] == f"trying the kernel triton ({CASE})"


ANSWERS = """
from diffsparse_kernels.child import requests, say
for request in requests({idle}):
    say(answer=request["number"])
say(idle=True)
"""


def test_a_child_answers_until_it_is_idle() -> None:
    waiting, heard = child.Child(["-c", ANSWERS.format(idle=2)]), list[child.Message]()
    try:
        for number in range(2):
            waiting.tell(number=number)
            assert waiting.listen(lambda message: heard.append(message) or True, **LIMITS) == ("heard", "")
        assert waiting.listen(heard.append, **LIMITS) == ("done", "")
        assert heard == [{"answer": 0}, {"answer": 1}, {"idle": True}]
        waiting.tell(number=2)  # nobody is there to hear it
        assert waiting.listen(heard.append, **LIMITS) == ("done", "")
    finally:
        waiting.kill()


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_the_process_that_tries_ends_with_its_parent(how: str, tmp_path: Path) -> None:
    parent = f"""
import os, signal, sys
import torch
from diffsparse_kernels import trials
from diffsparse_kernels.case import Case
from diffsparse_kernels.child import say
trials._TRIED_ON, trials._command = ("cpu",), lambda device: [{SCRIPT!r}, "right", str(device)]
say(told=trials.verdict("gluon", Case.read({CASE.words()!r}), torch.device("cpu")))
say(pids=[child.pid for child in trials._children.values()])
{how}
"""
    heard: list[child.Message] = []
    child.run_child(["-c", parent], heard.append, **LIMITS, environment={"DIFFSPARSE_CACHE": str(tmp_path)})
    assert heard[0] == {"told": ""}
    (pid,) = heard[1]["pids"]
    assert wait_until(lambda: not is_alive(pid))


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """However that ended."""
    alive = tmp_path / "alive"
    inner = "\n".join(
        [
            "import time",
            "from diffsparse_kernels.child import follow_parent, say",
            "follow_parent(); say(here=1); time.sleep(6)",
            f"open({str(alive)!r}, 'w')",
        ]
    )
    outer = "\n".join(
        [
            "import os, signal",
            "from diffsparse_kernels.child import run_child",
            "end = lambda message: os.kill(os.getpid(), signal.SIGKILL)",
            f"run_child(['-c', {inner!r}], end, start=60, silence=60, seconds=60)",
        ]
    )
    assert child.run_child(["-c", outer], print, **LIMITS).why == "ended by SIGKILL"
    time.sleep(8)
    assert not alive.exists()


def test_a_child_that_never_spoke_says_nothing_either(a_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Pretended())
    assert trials.verdict("gluon", CASE, CPU) == "it could not be tried: done"
    assert not a_machine.exists()


def test_a_cache_that_cannot_be_read_or_written_stops_nobody(a_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = pretend(monkeypatch, Pretended(RIGHT))
    trials._path("gluon", CASE, CPU).parent.mkdir()
    trials._path("gluon", CASE, CPU).write_text("half a fi")
    assert trials.verdict("gluon", CASE, CPU) == ""
    assert len(children.asked) == 1
    a_machine.rename(a_machine.with_name("moved"))
    a_machine.write_text("a file in the folder's place")
    trials.forget()
    assert trials.verdict("gluon", CASE, CPU) == ""
    assert len(children.asked) == 2
    assert trials.found(CPU) == []


@pytest.mark.parametrize("kind", ["attend", "mass", "fused", "summaries", "errors", "statistics"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("copyable", [False, True])
def test_the_proof_passes_what_is_right(kind: str, masked: bool, copyable: bool) -> None:
    case = Case(kind, torch.bfloat16, 24, 24, 16, 32, masked, 0, copyable)  # type: ignore[arg-type]
    kernel = SimpleNamespace(**{**vars(summaries), **vars(cpu)})
    for sample in proof.samples(case, CPU):
        assert proof.examine(case, kernel, sample).problem == ""
        assert (sample.key_mask is not None) == masked


@pytest.mark.parametrize("summary", summaries.SUMMARIES)
def test_the_proof_knows_what_a_loop_with_summaries_gives(summary: Summary) -> None:
    case = Case("attend", torch.bfloat16, 24, 24, 16, 32, True, summary=summary)
    names = {sample.name for sample in proof.samples(case, CPU)}
    assert ("first order" in names) == (summary == "first-order")

    def without_steps(*call: Any, stand_ins: summaries.StandIns) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.block_sparse_attention(*call, stand_ins=stand_ins._replace(slope=None))

    for sample in proof.samples(case, CPU):
        for kernel in (reference, cpu):
            assert proof.examine(case, kernel, sample).problem == ""
        off = proof.examine(case, SimpleNamespace(block_sparse_attention=without_steps), sample).problem
        assert off.startswith("wrong: the output is off") == (sample.summary == "first-order")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["attend", "summaries", "errors", "statistics"])
def test_the_proof_takes_summaries_as_devices_keep_them(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device they are in the inputs' dtype, as kernels multiply them, and plain torch is what judges those."""
    monkeypatch.setattr(summaries, "kept_dtype", lambda k: k.dtype)
    case = Case(kind, dtype, 24, 24, 16, 32, True, summary="first-order" if kind == "attend" else None)  # type: ignore[arg-type]
    kernel = SimpleNamespace(**{**vars(summaries), **vars(reference)})
    found = list(proof.samples(case, CPU, long=False))
    assert "first order" in {sample.name for sample in found}
    for sample in found:
        assert proof.examine(case, kernel, sample).problem == ""


def test_the_proof_covers_boxes() -> None:
    case = Case("attend", torch.float16, 16, 16, 16, 16, True, 2)
    for sample in proof.samples(case, CPU):
        assert sample.boxes is not None
        assert proof.examine(case, cpu, sample).problem == ""
        blind = SimpleNamespace(**{**vars(reference), "block_sparse_attention": lambda *x: trial.right(*x[:-1])})
        assert proof.examine(case, blind, sample).problem.startswith("wrong: the output is off")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_proof_knows_what_eight_bits_cost(precision: str) -> None:
    """Their own rounding passes, that of four bits does not, nor do rows that are mixed up."""
    case = Case("attend", torch.bfloat16, 64, 64, 64, 64, True, precision=precision)

    def kernel(bits: int, shift: int) -> SimpleNamespace:
        def attend(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
            eight = partial(emulated.block_sparse_attention, precision=precision)
            out, lse = (eight if bits == 8 else partial(emulated.quantised_attention, bits=bits))(*call[:-1])
            return out.roll(shift, 2), lse

        return SimpleNamespace(block_sparse_attention=attend)

    found = list(proof.samples(case, CPU, long=False))
    assert len(found) == 2
    for sample in found:
        assert proof.examine(case, kernel(8, 0), sample, 2).problem == ""
        for wrong in (kernel(4, 0), kernel(8, 1)):
            assert proof.examine(case, wrong, sample, 1).problem.startswith("wrong: the output is off")


@pytest.mark.parametrize(("scale", "shift"), [(0.97, 0.0), (1.0, 0.02)])
def test_the_proof_sees_small_faults(scale: float, shift: float) -> None:
    """An output that is three percent short, a log-sum-exp that is off by little."""

    def off(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = trial.right(*arguments)
        return out * scale, lse + shift

    case = CASE._replace(head_dim=64, value_dim=64, q_block=64, kv_block=64)
    for sample in itertools.islice(proof.samples(case, CPU, long=False), 2):
        kernel = SimpleNamespace(block_sparse_attention=off)
        assert proof.examine(case, kernel, sample, 1).problem.startswith("wrong: the ")
        out, _ = off(*sample[1:5], sample.scale, None)
        error, limit = proof.spot_check(out, sample)
        assert (error > limit) == (scale != 1)


def test_the_proof_of_a_selection() -> None:
    """Lists that are one block short are wrong, and so is an order that is another."""

    def short(*call: Any) -> tuple[torch.Tensor, ...]:
        idx, cnt, bits, order = select.lists_of_largest(*call)
        return idx, cnt - (torch.arange(cnt.numel()) == 5).int().view_as(cnt), bits, order

    def turned(*call: Any) -> tuple[torch.Tensor, ...]:
        *rest, order = select.lists_of_largest(*call)
        return *rest, order.roll(1)

    for sample in proof.samples(SELECTION, CPU):
        assert proof.examine(SELECTION, select, sample).problem == ""
        for wrong in (short, turned):
            kernel = SimpleNamespace(lists_of_largest=wrong, lists_of_bits=select.lists_of_bits)
            assert proof.examine(SELECTION, kernel, sample, 1).problem.startswith("wrong: the ")
    assert Case.read(SELECTION.words()) == SELECTION
    assert str(SELECTION) == "selection"


@pytest.mark.parametrize("kind", ["mass", "fused", "summaries", "errors"])
def test_the_proof_sees_what_is_wrong(kind: str) -> None:
    case = Case(kind, torch.bfloat16, 16, 16, 16, 16)  # type: ignore[arg-type]

    def mass(*arguments: object) -> torch.Tensor:
        return reference.block_mass(*arguments) * 1.2  # type: ignore[arg-type]

    def fused(*arguments: object) -> tuple[torch.Tensor, ...]:
        out, lse, found = reference.attention_with_mass(*arguments)  # type: ignore[arg-type]
        return out, lse + 0.1, found

    def error(*arguments: object) -> torch.Tensor:
        return summaries.summary_error(*arguments) * 1.2  # type: ignore[arg-type]

    def statistics(*arguments: object) -> summaries.Summaries:
        made = summaries.first_order(*arguments)  # type: ignore[arg-type]
        return made._replace(steepness=made.steepness * 1.2)

    off = SimpleNamespace(
        block_mass=mass,
        attention_with_mass=fused,
        stand_ins=summaries.stand_ins,
        merge=lambda *call: call[-2:],
        summary_error=error,
        first_order=statistics,
    )
    for sample in proof.samples(case, CPU):
        assert proof.examine(case, off, sample).problem.startswith("wrong: the")


def test_the_cases_are_read_as_they_were_written() -> None:
    for case in (
        CASE,
        Case("summaries", torch.float16, 64, 72, 128, 64, True, 3, False),
        CASE._replace(precision="int8-int8"),
        CASE._replace(summary="first-order"),
    ):
        assert Case.read(case.words()) == case


def test_the_real_child_runs_the_real_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU the triton backend wants the interpreter: told as what it is."""
    proof.attempt("cpu", "triton", CASE.words())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["verdict"].startswith("raised ")
    proof.attempt("nowhere", "triton", CASE.words())
    assert "untried" in json.loads(capsys.readouterr().out.splitlines()[-1])
    torch.set_deterministic_debug_mode("default")


def test_a_child_is_heard_and_killed_with_all_that_it_started(tmp_path: Path) -> None:
    heard: list[child.Message] = []
    alive = tmp_path / "alive"
    code = f"""
import json, subprocess, sys, time
print("a line of some library"); print("[1]"); print(json.dumps({{"a": 1}}), flush=True)
subprocess.Popen([sys.executable, "-c", "import time\\ntime.sleep(3)\\nopen({str(alive)!r}, 'w')"])
time.sleep(1000)
"""
    ending = child.run_child(["-c", code], heard.append, start=60, silence=1, seconds=60)
    assert ending == ("hang", "killed after 1 s without a sign")
    assert heard == [{"a": 1}]
    time.sleep(3)
    assert not alive.exists()
    late = child.run_child(["-c", "import time; time.sleep(1000)"], heard.append, start=60, silence=60, seconds=1)
    assert late == ("late", "killed when its time was over")
    assert child.run_child(["-c", "print(1)"], heard.append, **LIMITS) == ("done", "")
    assert child.run_child(["-c", "1 / 0"], heard.append, **LIMITS).why.endswith("ZeroDivisionError: division by zero")
