"""The figures by name, and what draws them."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from diffsparse_eval.figures import drawings, measured, methods
from diffsparse_eval.style import Theme

FIGURES: dict[str, Callable[[Theme], Figure]] = {
    "chart-fidelity": measured.fidelity,
    "chart-all": measured.everything,
    "chart-stack": measured.stacked,
    "chart-few-steps": measured.few_steps,
    "chart-gpu": measured.gpus,
    "digest": methods.digest,
    "tangent": methods.tangent,
    "adaspa": methods.adaspa,
    "paro": methods.paro,
    "sparse-vdit": methods.sparse_vdit,
    "gna": methods.gna,
    "random": methods.random,
    "rivals": methods.rivals,
    "compensated": methods.compensated,
    "rounded": methods.rounded,
    "guidance": methods.guidance,
    "one-call": drawings.one_call,
    "schedule": drawings.schedule,
    "stack": drawings.stacked,
    "seam": drawings.seam,
}
CARD = {"loss": measured.loss}  # of the embedded model, one PNG each
