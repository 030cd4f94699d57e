from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from diffsparse.site.ledger import Ledger, nbytes
from diffsparse.site.report import Report


def ledger() -> Ledger:
    book = Ledger()
    for step in range(4):
        for layer in ("a", "b"):
            call = book.open(layer, step, "cond")
            if step == 0:
                call.ran_dense("schedule", planned=True, backend="native")
            elif step == 1:
                call.ran_dense("search", planned=True, backend="cpu", kind="search")
                call.searched(torch.tensor([0.5, 0.7]))
            elif layer == "a":
                call.ran_sparse(torch.tensor(0.25), "cpu")
            else:
                call.ran_dense("gradients are wanted", planned=False, backend="native")
    book.memories = {"a": {"masks": torch.zeros(100, dtype=torch.uint8)}}
    return book


def test_summary_adds_up():
    report = Report.of("S()", 2, [ledger()])
    assert (report.steps, report.dense_steps) == (4, 2)
    assert (report.sparse_calls, report.dense_calls) == (2, 6)
    assert report.density == pytest.approx((6 + 0.5) / 8)
    assert report.sparse_density == pytest.approx(0.25)
    assert report.recall == pytest.approx(0.6)
    assert report.backends == {"native": 4, "cpu": 4}
    assert report.fallbacks == {"gradients are wanted": 2}
    assert report.memory_bytes == 100
    assert report.table("layer") == pytest.approx({"a": 0.625, "b": 1.0})
    assert report.table()["3"] == pytest.approx(0.625)


def test_work_counts_every_pass_over_the_keys():
    book = ledger()
    searching, choosing = book.calls[2], book.calls[4]
    searching.beside += 0.5
    choosing.beside += torch.tensor(0.25)
    report = Report.of("S()", 2, [book])
    assert report.work == pytest.approx(report.density + 0.75 / 8)
    assert report.table("step", "work") == pytest.approx({"0": 1.0, "1": 1.25, "2": 0.75, "3": 0.625})
    assert f"work               {report.work:.3f} of dense attention, searches included" in str(report)
    assert Report.of("S()", 2, []).work == 1


def test_shares_under_a_step_cache_say_what_they_are_of():
    report = Report.of("S()", 2, [ledger()])
    assert f"{report.density:.3f} over all calls, 0.250 over sparse ones" in str(report)
    assert "whole run" not in str(report)
    half = replace(report, cache="TaylorSeer", skipped_calls=8, skipped_steps=4)
    lines = str(half).splitlines()
    assert "step cache         TaylorSeer answered 8 of 16 calls" in lines
    assert f"density            {half.density:.3f} over executed calls, 0.250 over sparse ones" in lines
    assert f"work               {half.work:.3f} of dense attention in executed calls, searches included" in lines
    assert f"whole run          {half.work / 2:.3f} of the attention of a dense run without a step cache" in lines


def test_a_mass_that_nobody_measured_has_no_line():
    report = Report.of("S()", 2, [ledger()])
    assert "retained mass      0.600" in str(report).splitlines()
    assert "retained mass" not in str(replace(report, recall=None))


def test_modes_of_heads_and_notes():
    book = Ledger()
    for step, modes in enumerate((("full", "skip"), ("stripe", "skip"), ("full", "skip"))):
        call = book.open("a", step, "cond")
        call.heads, call.note = modes, "a plan of another size"
    report = Report.of("S()", 1, [book])
    assert report.modes == pytest.approx({"skip": 1 / 2, "full": 1 / 3, "stripe": 1 / 6})
    assert report.heads == {"a": {"0": "full skip", "1": "stripe skip", "2": "full skip"}}
    assert report.notes == ["a plan of another size"]
    lines = str(report).splitlines()
    assert "notes              a plan of another size" in lines
    assert "head modes         skip 50.0%, full 33.3%, stripe 16.7%" in lines
    assert "a                  full skip" in lines
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    nothing = Ledger()
    nothing.open("a", 0, "cond").ran_sparse(torch.tensor(0.0), "cpu")
    assert Report.of("S()", 1, [nothing]).density == 0


def test_two_transformers_make_one_report():
    once, twice = Report.of("S()", 2, [ledger()]), Report.of("S()", 4, [ledger(), ledger()])
    assert twice.sparse_calls == 2 * once.sparse_calls
    assert twice.density == pytest.approx(once.density)


def test_empty_report():
    report = Report.of("S()", 2, [Ledger()])
    assert report.density == 1.0
    assert report.sparse_density is None
    assert "no self-attention call yet" in str(report)


def test_to_dict_is_json_and_text_names_the_fall_back():
    report = Report.of("S()", 2, [ledger()])
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "calls" not in report.to_dict()
    assert "gradients are wanted x2" in str(report)


def test_times_are_measured():
    book = Ledger()
    call = book.open("a", 0, "cond")
    with call.timed(torch.device("cpu")):
        torch.randn(200, 200) @ torch.randn(200, 200)
    assert Report.of("S()", 1, [book]).attention_seconds == call.seconds > 0


def filled(book: Ledger, most: int | None) -> Ledger:
    """200 calls of 25 steps of all kinds, folded on the way."""
    draw = random.Random(0)
    for number in range(200):
        call = book.open(draw.choice("ab"), number // 8, "cond")
        kind = draw.choice(["schedule", "search", "sparse", "no kernel"]) if number >= 16 else "schedule"
        if kind == "sparse":
            call.ran_sparse(torch.tensor(draw.random()), draw.choice(["cpu", "flex"]), ("flex: no",))
            call.heads = (draw.choice(["full", "skip"]),)
        else:
            call.ran_dense(kind, planned=kind != "no kernel", backend="native")
        if kind == "search":
            call.searched(torch.tensor([draw.random()]))
        call.note = draw.choice(["", "one", "two"])
        call._marks = [float(number), number + 0.25]
        if most is not None:
            book.bound(most)
            assert len(book.calls) <= most
    return book


@pytest.mark.parametrize("most", [1, 8, 40, 500])
def test_a_report_of_folded_calls_is_that_of_all(most):
    """But for the list of calls, and what heads did call by call."""
    want, book = Report.of("S()", 2, [filled(Ledger(), None)]), filled(Ledger(), most)
    got = Report.of("S()", 2, [book])
    assert got.steps == 25
    assert len(got.calls) <= most
    if most >= 8:  # a step's calls fit
        sums = ("density", "sparse_density", "recall", "attention_seconds")
        assert [getattr(got, x) for x in sums] == pytest.approx([getattr(want, x) for x in sums])
        rest = {x: getattr(want, x) for x in sums}
        shares = pytest.approx(want.modes)
        assert got.modes == shares
        same = replace(got, **rest, heads=want.heads, modes=want.modes, notes=sorted(got.notes))
        assert same == replace(want, notes=sorted(want.notes))


class Event:
    """A CUDA event that the device reaches when it is told to."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        assert self.reached, "somebody waits for the device"

    def elapsed_time(self, other: Event) -> float:
        return 250.0


def test_events_go_once_the_device_has_passed_them(monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    book = Ledger()
    calls = []
    for step in range(4):
        calls.append(book.open("a", step, "cond"))
        calls[-1]._marks = [Event(), Event()]
    calls[0]._marks[1].reached = calls[1]._marks[1].reached = calls[3]._marks[1].reached = True
    book.open("a", 4, "cond")
    assert all(len(call._marks) == 2 for call in calls)  # nobody may ask while a graph is captured
    capturing[0] = False
    book.open("a", 4, "cond")
    assert [len(call._marks) for call in calls] == [0, 0, 2, 2]
    for _ in range(4):
        book.bound(1)
    assert book.calls[0] is calls[2]  # the device is not through it
    calls[2]._marks[1].reached = True
    book.open("a", 5, "cond")
    assert not any(call._marks for call in calls)
    assert [call.seconds for call in calls] == [0.25] * 4


def test_a_run_that_is_over_keeps_the_size_of_its_memories():
    book, x = Ledger(memories={}), torch.zeros(10)
    book.memories["a"] = {"x": x, "view": x[2:], "more": ([torch.zeros(3, dtype=torch.int8)],)}
    assert book.memory_bytes == nbytes(book.memories) == 43
    book.close()
    assert not book.memories
    book.close()
    assert book.memory_bytes == 43
