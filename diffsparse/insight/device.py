"""How fast a device does what a run consists of: each rate was measured, by a committed row, or is assumed, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from diffsparse_kernels import Block


class Rate(NamedTuple):
    """A number that a model of time rests on.

    measured: the row of `eval/results/gpu` that gives it, as "file: stage | shape | kernel | kind | density".
    assumed: why it is believed, where nothing was measured.
    """

    value: float
    unit: str
    measured: str = ""
    assumed: str = ""

    @property
    def source(self) -> str:
        """Where the number comes from, in words."""
        return f"measured: {self.measured}" if self.measured else f"assumed: {self.assumed}"


@dataclass(frozen=True)
class Device:
    """A GPU, by the rates of its kernels for bfloat16 and heads of 128 channels. All that a kernel multiplies counts.

    dense: the user's dense attention.
    masked: the same with a key mask.
    own: our dense attention with its log-sum-exp.
    listed: blocks of a sparse product.
    summaries: mean keys of dropped blocks.
    mass: a pass that sums the mass of blocks; those that estimate the errors of summaries count as such.
    fused: a dense pass that sums masses too, in times of one that doesn't; None where a second pass does.
    product: a matrix product.
    rest: all of a model but its attention; of one model, for all.
    copy: bandwidth.
    usable: share of `copy` and `product` that kernels of other shapes reach.
    gather: bytes of tokens that move, read and written.
    choose, list_up: of a pair of blocks.
    solve: the fit of all heads to their probes.
    eigen: the directions of a residual.
    host: until a call of blocks alone returns.
    host_more: until one returns that is compensated.
    processors: each works on 128 queries of a head.
    block: queries and keys of a block that suit it.
    """

    dense: Rate
    masked: Rate
    own: Rate
    listed: Rate
    summaries: Rate
    mass: Rate
    fused: Rate | None
    product: Rate
    rest: Rate
    copy: Rate
    usable: Rate
    gather: Rate
    choose: Rate
    list_up: Rate
    solve: Rate
    eigen: Rate
    host: Rate
    host_more: Rate
    processors: Rate
    block: Block = (128, 64)

    def rates(self) -> Iterator[tuple[str, Rate]]:
        """All of them by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, value) for name, value in values if isinstance(value, Rate))

    def with_fastest_dense(self) -> Device:
        """The same where the user's dense attention is the fastest that was measured."""
        fastest = max(self.dense, self.own)
        return replace(self, dense=fastest, masked=max(self.masked, self.own))


_DAY = "h100-2026-11-27"  # NVIDIA H100 80GB HBM3, 700 W

# The kernels that the rows were measured with: a merge of means, a second pass for masses, torch for tokens and lists.
H100_UNFUSED = Device(
    dense=Rate(588.6, "TFLOP/s", f"{_DAY}: step | wan 14b 720p | digest, dense"),
    masked=Rate(395.7, "TFLOP/s", f"{_DAY}: step | hunyuan-video 720p | adaspa, dense"),
    own=Rate(599.2, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | gluon | dense with LSE, masked | 1.00"),
    listed=Rate(602.7, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | gluon | ragged lists, masked | 0.20"),
    summaries=Rate(462.3, "TFLOP/s", f"{_DAY}: step | wan 14b 720p | digest, sparse, profile | add_means"),
    mass=Rate(440.8, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | triton-tma | block mass, masked | 0.50"),
    fused=None,
    product=Rate(797.3, "TFLOP/s", f"{_DAY}: facts | 8192^3 bfloat16 | matrix product"),
    rest=Rate(327.2, "TFLOP/s", f"{_DAY}: end to end | hunyuan-video | dense"),
    copy=Rate(3020, "GB/s", f"{_DAY}: facts | 2048 MiB | copy"),
    usable=Rate(0.75, "of it", assumed="three quarters of what the plainest kernel reaches"),
    gather=Rate(832.6, "GB/s", f"{_DAY}: speed | hunyuan-video 720p | torch | orders, q k v out | 0.00"),
    choose=Rate(0.112, "ns", f"{_DAY}: speed | hunyuan-video 720p | torch | select by head | 0.00"),
    list_up=Rate(0.0479, "ns", f"{_DAY}: speed | hunyuan-video 720p | torch | lists from a mask | 0.00"),
    solve=Rate(0.3, "ms", assumed="two launches; 128 dependent steps for each head and penalty"),
    eigen=Rate(20, "ms", assumed="batched eigenvectors of 128 x 128, in dense steps that teach"),
    host=Rate(1.137, "ms", f"{_DAY}: step | wan 14b 720p | adaspa, sparse"),
    host_more=Rate(2.160, "ms", f"{_DAY}: step | wan 14b 720p | digest, sparse"),
    processors=Rate(132, "", assumed="the maker's data sheet"),
)
# The kernels as they are now, of which there is no row yet.
H100 = replace(
    H100_UNFUSED,
    summaries=Rate(602.7, "TFLOP/s", assumed="in the loop of the blocks, as fast as these"),
    fused=Rate(1.15, "times", assumed="the target for masses in the dense pass itself"),
    gather=Rate(2265, "GB/s", assumed="a launch each way, as near to a copy as other kernels"),
    choose=Rate(0.015, "ns", assumed="errors read four times, at half of what is usable of the bandwidth"),
    list_up=Rate(0.004, "ns", assumed="numbers of blocks written once, likewise"),
)

DEVICES: dict[str, Device] = {"h100": H100, "h100-unfused": H100_UNFUSED}
