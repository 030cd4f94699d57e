from __future__ import annotations

import json

import pytest
import torch

from diffsparse.report import Ledger, Report


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
