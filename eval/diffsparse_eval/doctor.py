"""What is installed, which devices are there, which backends run and why others don't."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class Findings(TypedDict):
    """What `examine` finds, by name.

    Attributes:
        devices: their names and the backends that run there by default.
        backends: "available", or why not.
        trials: verdicts of the trials of kernels, in a process of their own.
        measured: what the break-even on each device rests on.
    """

    versions: dict[str, str]
    system: dict[str, str | int | None]
    devices: dict[str, str]
    backends: dict[str, str]
    trials: dict[str, str]
    measured: dict[str, str]
    models: dict[str, str]


def examine() -> Findings:
    """All findings as plain values."""
    import torch

    import diffsparse_kernels
    from diffsparse.seam.models import SPECS
    from diffsparse_eval import environment

    return {
        "versions": environment.versions(),
        "system": environment.system(),
        "devices": {"cpu": diffsparse_kernels.backend_for(torch.device("cpu")), **_gpus()},
        "backends": diffsparse_kernels.backends(main_device()),
        "trials": _trials(),
        "measured": _measured(),
        "models": {
            "embedded": _embedded(),
            "layouts": f"a row each for {len(SPECS)} classes, sparse or not; others by a common rule",
        },
    }


def main_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
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
    """Verdicts of the trials of kernels on this machine's GPU; those that most models need are made now."""
    from diffsparse_kernels import NoKernelError, registry, trials

    device = main_device()
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
        from diffsparse_pipelines import families, tiny
    except (ImportError, RuntimeError) as error:  # the latter is Diffusers' own, from what it imports
        return f"can't be loaded: {error}"
    names = [name for name, family in families.FAMILIES.items() if not family.hub]
    missing = [
        name for name in names if not (tiny.folder(families.variant(name) or name) / "model_index.json").is_file()
    ]
    return f"missing: {', '.join(missing)}; install the package again" if missing else ", ".join(names)


def _measured() -> dict[str, str]:
    """What the break-even on each device rests on."""
    from diffsparse_kernels.machine import cache_folder
    from diffsparse_kernels.measured import BREAK_EVEN, read_rows

    rows = read_rows(BREAK_EVEN)
    if not rows:
        return {"break-even": "defaults; diffsparse doctor --measure finds this machine's in ten seconds"}
    found = {}
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        low, high = (pick(row["break_even"] for row in mine) for pick in (min, max))
        found[device] = f"{mine[0]['backend']}, break-even at a density of {low:.2f} to {high:.2f}"
    return {**found, "kept in": str(cache_folder())}
