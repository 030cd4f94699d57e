"""`diffsparse doctor`: what is installed, which devices are there, which backends run and why others don't."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated, Any

import typer


def examine() -> dict[str, Any]:
    """All findings as plain values: `versions`, `system`, `devices`, `backends`, `measured`, `models`."""
    import torch

    import diffsparse_kernels
    from diffsparse.seam.models import SPECS
    from diffsparse_eval import environment

    return {
        "versions": environment.versions(),
        "system": environment.system(),
        "devices": {"cpu": diffsparse_kernels.backend_for(torch.device("cpu")), **_gpus()},
        "backends": diffsparse_kernels.backends(_main_device()),
        "trials": _trials(),
        "measured": _measured(),
        "models": {"embedded": _embedded(), "known layouts": f"{len(SPECS)} classes; all others by default"},
    }


def _main_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _gpus() -> dict[str, str]:
    import torch

    import diffsparse_kernels

    if not torch.cuda.is_available():
        return {"cuda": "no CUDA device" if torch.version.cuda else "torch was built without CUDA"}
    chosen = diffsparse_kernels.backend_for(torch.device("cuda"))
    return {f"cuda:{i}": f"{torch.cuda.get_device_name(i)}, {chosen}" for i in range(torch.cuda.device_count())}


def _trials() -> dict[str, str]:
    """What the trials of young kernels on this machine's GPU came to; those that most models need are made now."""
    from diffsparse_kernels import NoKernelError, registry, trials

    device = _main_device()
    if device.type != "cuda":
        return {"on a GPU": "kernels are tried at first use, in a process of their own"}
    for case in registry.USUAL:
        with suppress(NoKernelError):  # its reason is among the backends'
            registry.choose(case, device)
    return {f"{row['kernel']}: {row['case']}": row["verdict"] for row in trials.found(device)}


def _embedded() -> str:
    if find_spec("diffusers") is None:
        return "Diffusers is not installed"
    try:
        from diffsparse_pipelines import tiny
        from diffsparse_pipelines.tiny.variants import VARIANTS
    except (ImportError, RuntimeError) as error:  # the latter is Diffusers' own, from what it imports
        return f"can't be loaded: {error}"
    missing = [name for name in VARIANTS if not (tiny.folder(name) / "model_index.json").is_file()]
    return f"missing: {', '.join(missing)}; install the package anew" if missing else ", ".join(VARIANTS)


def _measured() -> dict[str, str]:
    """What the break-even on each device rests on."""
    from diffsparse_kernels.measured import BREAK_EVEN, cache_folder, read_rows

    rows = read_rows(BREAK_EVEN)
    if not rows:
        return {"break-even": "defaults; diffsparse doctor --measure finds this machine's in ten seconds"}
    found = {}
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        low, high = (pick(row["break_even"] for row in mine) for pick in (min, max))
        found[device] = f"{mine[0]['backend']}, break-even at a density of {low:.2f} to {high:.2f}"
    return {**found, "kept in": str(cache_folder())}


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

        measure_break_even(_main_device().type)
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        [topic if i == 0 else "", name, str(value)]
        for topic, values in found.items()
        for i, (name, value) in enumerate(values.items())
    ]
    show_table(rows, "lll")
