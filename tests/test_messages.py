"""What the sources can tell a user is on a page: reasons of dense calls, warnings, errors. Tables are as generated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffsparse import errors
from support import backends, reasons, results

DOCS = Path(__file__).parents[1] / "docs"
MEANS = 8  # letters that a message has of its own, for an example to be one of it
BACKENDS, QUESTIONS = (DOCS / f"{name}.md" for name in ("backends", "questions"))


def test_the_tables_of_back_ends_are_what_they_answer() -> None:
    text = BACKENDS.read_text()
    assert backends.page(text) == text, "run python -m support.backends"


def test_a_chip_is_there_only_within() -> None:
    before = reasons.missing([reasons.Message("gone", "here")], "`here`")
    with backends.chip((9, 0)) as device:
        assert device.type == "cuda"
        assert backends.registry.choose(backends.BFLOAT16, device).name == "gluon"
    assert before == ["here: gone"]
    assert backends.registry.capability("gluon", device) is not None


def test_every_reason_is_on_the_page() -> None:
    found = reasons.reasons()
    assert len(found) > 50
    assert not reasons.missing(found, BACKENDS.read_text() + QUESTIONS.read_text())


def test_every_warning_is_on_the_page() -> None:
    assert not reasons.missing(reasons.warned(), QUESTIONS.read_text())


def test_reasons_are_found_wherever_they_are_given() -> None:
    told = {str(message) for message in reasons.reasons()}
    assert told >= {
        "gradients are wanted",  # returned by a property
        "no geometry",  # an argument
        "renewal",  # a keyword
        "strategy",  # a default
        "cut off",  # one of several that are assigned at once
        "a mask that differs between video rows",  # from a constant
        "wants the package flash-attn-4: ...",  # raised while a back end is imported
        "density above the break-even of ...",  # with a hole
    }


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"closest"}))
def test_every_error_has_an_example_of_what_it_says(name: str) -> None:
    section = re.search(rf"^### {name}\n(.*?)(?=^#|\Z)", QUESTIONS.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    patterns = [message.within for message in reasons.raised(name) if len(re.findall(r"\w", str(message))) > MEANS]
    examples = [
        line for block in re.findall(r"```text\n(.*?)```", section[1], re.DOTALL) for line in block.splitlines()
    ]
    assert bool(examples) == bool(patterns)
    for line in examples:
        assert any(pattern.search(line) for pattern in patterns), f"no {name} says: {line}"


@pytest.mark.parametrize("page", results.PARTS, ids=lambda page: page.stem)
def test_results_are_what_the_rows_say(page: Path) -> None:
    assert dict(results.pages())[page] == page.read_text(), "run python -m support.results"


@pytest.mark.parametrize("name", [name for name, file in results.FILES.items() if not file.command])
def test_commands_run_as_many_prompts_as_the_rows_have(name: str) -> None:
    """The runs of all commands are the rows, but for dense: strategies x sparsities (one of a plan) x prompts."""
    runs = 0
    for command in results._evaluations(name):
        found = re.search(r"--strategy (\S+)(?: --sparsity (\S+))?.* --prompts (\d+) ", command)
        assert found is not None
        runs += len(found[1].split(",")) * len((found[2] or "0").split(",")) * int(found[3])
    left_out = ("dense", *results.FILES[name].left_out)
    assert runs == len([row for row in results.rows(name) if row["strategy"] not in left_out])


def test_the_summary_of_rows_has_none_of_an_earlier_release() -> None:
    text = results.TINY.read_text()
    assert "| digest" not in text
    assert "without its rows of an earlier `Digest`" in text.partition("|")[0]


def test_every_committed_file_of_rows_is_named() -> None:
    held = {str(path.relative_to(results.RESULTS)) for path in results.RESULTS.rglob("*.*")}
    assert {name for name in held if name.endswith((".json", ".jsonl", ".csv"))} == set(results.FILES)
