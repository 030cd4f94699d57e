"""`diffsparse bench`: our kernels beside torch's dense attention, or the tiles of the Triton kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.errors import BackendError, ConfigError
from diffsparse_eval.bench import DEFAULTS, INPUTS, Troubles, check_file, measure, write
from diffsparse_eval.suites import SUITES, Case
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks

if TYPE_CHECKING:
    from diffsparse_eval.rows import BenchRow

_MOST_TOKENS = 1_000_000
_HEADINGS = ("backend", "kind", "density", "ms", "TFLOP/s", "speed-up", "of limit")
_LEGEND = (
    "speed-up is over the fastest dense kernel of the same case; mass is the search pass without values",
    "dense-mass: dense attention that makes it on the way, as a search does",
    "means, first-order: with such summaries of dropped blocks, which are made in the same call",
    "raster and ordered: [B, N, H, D] in and out, without and with an order of the tokens for each head",
    "int8, fp8 and the like: in these eight bits, rounding included",
    "of limit: the time of that dense kernel times the density, over the time taken (`efficiency` in files)",
)


@dataclass(frozen=True)
class SizeOptions:
    """Sizes that are timed, if no suite is: all combinations."""

    tokens: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "1024,4096"
    sparsity: Annotated[str, typer.Option(help="Shares of blocks dropped.")] = "0.5,0.8,0.9"
    head_dim: Annotated[str, typer.Option(help="Channels of a head.")] = "64,128"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16"
    block: Annotated[str, typer.Option(help="Tokens of a block, or queries x keys such as 128x64.")] = "64,128"
    heads: Annotated[int, typer.Option(help="Heads.", callback=checks.whole(1, values.MOST_BLOCK))] = 4

    def cases(self) -> list[Case]:
        """The cases.

        Raises:
            ConfigError: a value that doesn't fit.
        """
        from diffsparse_pipelines.families import DTYPES

        dtypes = [name.strip() for name in self.dtype.split(",") if name.strip()]
        if not dtypes or not set(dtypes) <= set(DTYPES) - {"auto"}:
            raise ConfigError(f"--dtype wants some of {', '.join(DTYPES[1:])}; got {self.dtype!r}")
        shares = values.shares(self.sparsity, "--sparsity")
        lengths = values.wholes(self.tokens, "--tokens", 1, _MOST_TOKENS)
        widths = values.wholes(self.head_dim, "--head-dim", 1, values.MOST_BLOCK)
        blocks = values.blocks(self.block, "--block")
        product = itertools.product(dtypes, widths, lengths, blocks)
        return [Case(n, self.heads, d, name, b, shares) for name, d, n, b in product]


SIZES = SizeOptions()


def bench(
    suite: Annotated[
        str, typer.Option(help="gpu: the shapes of Wan, HunyuanVideo and Flux. Sizes below if empty.")
    ] = "",
    shrink: Annotated[
        int,
        typer.Option(
            help="Divide a suite's tokens by this, to try it without a GPU.", callback=checks.whole(1, values.MOST)
        ),
    ] = 1,
    sizes: SizeOptions = SIZES,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="Backends, separated by commas; if empty, all that run here, but flex on a GPU alone: on the CPU it "
            "needs a C++ compiler and a minute for each shape."
        ),
    ] = "",
    rounds: Annotated[
        int, typer.Option(help="Timed turns of each kernel.", callback=checks.whole(1, values.MOST_COUNT))
    ] = 7,
    tune: Annotated[bool, typer.Option("--tune", help="Time the Triton tiles instead, and keep the best.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A .csv or .json file for the rows; bench-SUITE.csv for one.", callback=checks.file),
    ] = None,
) -> None:
    """Time the attention kernels beside torch's dense ones: same tensors, same process, results checked first."""
    from diffsparse.files import writable
    from diffsparse_pipelines.machine import hold, place
    from diffsparse_pipelines.progress import say

    device = place(device)
    if tune:
        from diffsparse_eval.tune import tune_tiles

        return say(f"the best tiles are in {tune_tiles(device, rounds)}")
    if shrink > 1 and not suite:
        raise ConfigError("--shrink wants --suite; other sizes are given by --tokens")
    cases = _suite(suite, shrink) if suite else sizes.cases()
    out = Path(f"bench-{suite}.csv") if suite and out is None else out
    if out is not None:
        check_file(out)
        writable(out)
    for case in cases:
        hold(case.nbytes * INPUTS, device, f"the tensors of {case.label}", "lower --tokens, --heads or --head-dim")
    _run(cases, device, _named(backend, device), rounds, out)


def _run(cases: list[Case], device: str, backends: list[str], rounds: int, out: Path | None) -> None:
    """Time the cases and show the rows; those that are measured stay, whatever comes next."""
    from diffsparse.files import if_stopped
    from diffsparse_pipelines.progress import say, track

    rows: list[BenchRow] = []
    troubles = Troubles()
    with if_stopped(lambda: f"{len(rows)} rows are in {out}" if out is not None and rows else "no row is kept"):
        for case in track(cases, "cases"):
            rows += measure(case, device, backends, rounds, troubles)
            if out is not None and rows:
                write(rows, out)
    _show(rows, troubles)
    if out is not None and rows:
        say(f"{len(rows)} rows are in {out}")
    if troubles.failed:
        raise BackendError(f"wrong or broken, and not in the rows: {'; '.join(troubles.failed)}")


def _suite(name: str, shrink: int) -> list[Case]:
    if name not in SUITES:
        raise ConfigError(f"--suite wants one of {', '.join(SUITES)}; got {name!r}")
    return SUITES[name]() if shrink == 1 else [case.shrunk(shrink) for case in SUITES[name]()]


def _named(wanted: str, device: str) -> list[str]:
    """The backends to time."""
    import torch

    from diffsparse_kernels import backends

    known = backends(torch.device(device))
    if not wanted:
        return [name for name in DEFAULTS["cpu" if device == "cpu" else "gpu"] if known.get(name) == "available"]
    listed = list(values.names(wanted))
    for name in listed:
        if known.get(name) != "available":
            raise BackendError(f"backend {name!r}: {known.get(name, 'unknown')}; known: {', '.join(known)}")
    return listed


def _show(rows: list[BenchRow], troubles: Troubles) -> None:
    from diffsparse_pipelines.progress import say, show_table

    if rows:
        say(rows[0]["device"], highlight=False)
        for case, of_it in itertools.groupby(rows, _case):
            show_table([_cells(row) for row in of_it], "llrrrrr", _HEADINGS, f"\n{case}")
        say("\n" + "\n".join(_LEGEND), fill=True)
    for reason in sorted(troubles.left_out):
        say(f"left out: {reason}")
    for entry, reason in troubles.failed.items():
        say(f"wrong or broken: {entry}: {reason}")


def _case(row: BenchRow) -> str:
    size = f"{row['tokens']} x {row['heads']} x {row['head_dim']}"
    return f"{row['dtype']}, {size} (tokens x heads x D), blocks of {row['block']}"


def _cells(row: BenchRow) -> list[str]:
    figures = f"{row['density']:.2f}", f"{row['ms']:.2f}", f"{row['tflops']:.3f}"
    ratios = f"{row['speedup']:.2f}", f"{row['efficiency']:.2f}"
    return [row["backend"], row["kind"], *figures, *ratios]
