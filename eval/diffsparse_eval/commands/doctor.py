"""`diffsparse doctor`: what is installed, which devices are there, which backends run and why others don't."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffsparse_eval.doctor import examine, main_device


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a bug report.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure first when dense is faster: ten seconds.")
    ] = False,
) -> None:
    """Show versions, devices, and which backends run here."""
    from diffsparse_pipelines.progress import show_table

    if measure:
        from diffsparse_eval.tune import measure_break_even

        measure_break_even(main_device().type)
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        [topic if i == 0 else "", name, str(value)]
        for topic, named in found.items()
        if isinstance(named, dict)
        for i, (name, value) in enumerate(named.items())
    ]
    show_table(rows, "lll")
