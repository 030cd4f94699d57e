"""The first use of an untried Hopper kernel, on the CPU in Triton's interpreter: `first_use.py MODE`, see trial.py.

Prints what is reported of two passes of a small HunyuanVideo, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

import diffsparse
import diffsparse_kernels as dk
from diffsparse_kernels import measured as cached
from diffsparse_kernels import registry, trials
from diffsparse_kernels.backend.gluon import launch as gluon
from support import tiny_transformers, trial


def command(device: torch.device) -> list[str]:
    return [trial.__file__, sys.argv[1], str(device)]


def pretend() -> None:
    """The CPU is a device where gluon comes first, and nothing was ever tried."""
    here = registry.BACKENDS["gluon"]._replace(devices=("cpu",), default=("cpu",))
    registry.BACKENDS.pop("cpu")
    registry.BACKENDS["gluon"] = here
    gluon.device_capability = lambda device: None
    registry._YOUNG = ("gluon",)  # of triton, tests have shown what there is to see here
    trials._TRIED_ON, trials.SECONDS, trials._command = ("cpu",), 8.0, command
    cached._DEFAULTS.update(dict.fromkeys(cached._DEFAULTS, 1.0))  # so small, all of it would be faster dense


def sixteen_bits(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


if __name__ == "__main__":
    pretend()
    name = "HunyuanVideoTransformer3DModel"
    model, inputs = tiny_transformers.build(name).bfloat16(), sixteen_bits(tiny_transformers.inputs(name))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with diffsparse.apply(model, diffsparse.AdaSpa(0.0, block=128), schedule=diffsparse.Schedule(0)) as handle:
            outputs = [tiny_transformers.tensors(model, inputs) for _ in range(2)]
            report = handle.report()
        known = dk.backends(torch.device("cpu"))
    dense = tiny_transformers.tensors(model, inputs)
    found = {
        "backends": report.backends,
        "passed_over": report.passed_over,
        "text": str(report),
        "said": [str(warning.message) for warning in told],
        "error": max((x - y).abs().max().item() for out in outputs for x, y in zip(out, dense, strict=True)),
        "known": known,
    }
    print(json.dumps(found))
