from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffsparse
from diffsparse import Dense, Random
from diffsparse.errors import ConfigError
from diffsparse.schedule import Schedule, resolve
from diffsparse.seam.hooks import run_of
from support.tiny_transformers import build


@pytest.mark.parametrize(("steps", "dense"), [(50, 10), (30, 6), (15, 3), (8, 2), (4, 1), (1, 1), (None, 1)])
def test_default_is_a_fifth_of_the_steps(steps, dense):
    assert Schedule().bounds(steps)[0] == dense


def test_ints_are_steps_and_floats_are_shares():
    assert resolve(3, 50) == 3
    assert resolve(3, None) == 3
    assert resolve(0.5, 9) == 5
    assert resolve(0.1, 25) == 3
    assert resolve(0.1, 15) == 2
    assert resolve(1.0, 9) == 9
    assert resolve(0.0, 9) == resolve(0, 9) == 0


def test_layers():
    schedule = Schedule(0, 0, (0, -1))
    assert [schedule.excludes(layer, 4) for layer in range(4)] == [True, False, False, True]


@given(st.integers(0, 9) | st.floats(0, 1), st.integers(0, 9) | st.floats(0, 1), st.integers(1, 60))
def test_dense_steps_are_a_prefix_and_a_suffix(first, last, steps):
    schedule = Schedule(first, last)
    begin, end = resolve(first, steps), resolve(last, steps)
    assert schedule.bounds(steps) == (begin, steps - end)
    kinds = Random().kinds(schedule, steps)
    assert [kind == "dense" for kind in kinds] == [step < begin or step >= steps - end for step in range(steps)]


def test_describe():
    assert Schedule().describe(15) == "dense steps 1-3 of 15"
    assert Schedule(1, 2).describe(15) == "dense steps 1, 14-15 of 15"
    assert Schedule(0).describe(15) == "dense steps none of 15"
    assert Schedule(1.0, 1.0).describe(4) == "dense steps 1-4 of 4"


@pytest.mark.parametrize("amount", [-1, -0.5, 1.5, math.nan, "3", True])
def test_bad_amounts_are_refused(amount):
    with pytest.raises(ConfigError, match="dense_first wants"):
        Schedule(dense_first=amount)


@pytest.mark.parametrize("schedule", [0.2, 3, "0.2", Schedule, (1, 2)])
def test_what_is_no_schedule_is_refused_at_the_door(schedule):
    model = build("WanTransformer3DModel")
    with pytest.raises(ConfigError, match=r"schedule wants a Schedule, such as .*; got "):
        diffsparse.apply(model, Dense(), schedule=schedule)
    assert run_of(model) is None


@pytest.mark.parametrize("layers", [3, ("a",), [0]])
def test_bad_layers_are_refused(layers):
    with pytest.raises(ConfigError, match="dense_layers wants a tuple"):
        Schedule(dense_layers=layers)


def test_what_an_unknown_length_changes_is_told():
    assert Schedule(2).of_unknown_length() == Schedule(0.0).of_unknown_length() == ""
    assert "dense_first=0.2 is 1 step:" in Schedule().of_unknown_length()
    assert "so dense_last=0.1 is not kept:" in Schedule(1, 0.1).of_unknown_length()
