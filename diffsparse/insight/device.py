"""How fast a device does what a run consists of: each rate was measured, by a committed row, or is assumed, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from diffsparse_kernels import Block


class Rate(NamedTuple):
    """A number that a model of time rests on.

    Attributes:
        value: the number.
        unit: of the number, such as "TFLOP/s".
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

    Attributes:
        dense: the user's dense attention.
        dense_masked: the same with a key mask.
        dense_with_lse: our dense attention with its log-sum-exp.
        listed_blocks: blocks of a sparse product.
        mean_keys: mean keys of dropped blocks.
        block_mass: a pass that sums the mass of blocks; those that estimate the errors of summaries count as such.
        fused_mass: a dense pass that sums masses too, in times of one that doesn't; None where a second pass does.
        matrix_product: a matrix product.
        rest_of_model: all of a model but its attention; of one model, for all.
        copy: bandwidth.
        usable_share: share of `copy` and `matrix_product` that kernels of other shapes reach.
        moved_tokens: bytes of tokens that move, read and written.
        selection_of_a_pair: the selection, for each pair of blocks.
        lists_of_a_pair: the making of lists, for each pair of blocks.
        fit: the fit of all heads to their probes.
        residual_directions: the directions of a residual.
        host_of_blocks: until a call of blocks alone returns.
        host_of_compensated: until one returns that is compensated.
        processors: each works on 128 queries of a head.
        block: queries and keys of a block that suit it.
    """

    dense: Rate
    dense_masked: Rate
    dense_with_lse: Rate
    listed_blocks: Rate
    mean_keys: Rate
    block_mass: Rate
    fused_mass: Rate | None
    matrix_product: Rate
    rest_of_model: Rate
    copy: Rate
    usable_share: Rate
    moved_tokens: Rate
    selection_of_a_pair: Rate
    lists_of_a_pair: Rate
    fit: Rate
    residual_directions: Rate
    host_of_blocks: Rate
    host_of_compensated: Rate
    processors: Rate
    block: Block = (128, 64)

    def rates(self) -> Iterator[tuple[str, Rate]]:
        """All of them by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, value) for name, value in values if isinstance(value, Rate))

    def with_fastest_dense(self) -> Device:
        """The same where the user's dense attention is the fastest that was measured."""
        fastest = max(self.dense, self.dense_with_lse)
        return replace(self, dense=fastest, dense_masked=max(self.dense_masked, self.dense_with_lse))


_DAY = "h100-2026-11-27"  # NVIDIA H100 80GB HBM3, 700 W

# The kernels that the rows were measured with: a merge of means, a second pass for masses, torch for tokens and lists.
H100_UNFUSED = Device(
    dense=Rate(588.6, "TFLOP/s", f"{_DAY}: step | wan 14b 720p | digest, dense"),
    dense_masked=Rate(395.7, "TFLOP/s", f"{_DAY}: step | hunyuan-video 720p | adaspa, dense"),
    dense_with_lse=Rate(
        599.2, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | gluon | dense with LSE, masked | 1.00"
    ),
    listed_blocks=Rate(602.7, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | gluon | ragged lists, masked | 0.20"),
    mean_keys=Rate(462.3, "TFLOP/s", f"{_DAY}: step | wan 14b 720p | digest, sparse, profile | add_means"),
    block_mass=Rate(440.8, "TFLOP/s", f"{_DAY}: speed | hunyuan-video 720p | triton-tma | block mass, masked | 0.50"),
    fused_mass=None,
    matrix_product=Rate(797.3, "TFLOP/s", f"{_DAY}: facts | 8192^3 bfloat16 | matrix product"),
    rest_of_model=Rate(327.2, "TFLOP/s", f"{_DAY}: end to end | hunyuan-video | dense"),
    copy=Rate(3020, "GB/s", f"{_DAY}: facts | 2048 MiB | copy"),
    usable_share=Rate(0.75, "of it", assumed="three quarters of what the plainest kernel reaches"),
    moved_tokens=Rate(832.6, "GB/s", f"{_DAY}: speed | hunyuan-video 720p | torch | orders, q k v out | 0.00"),
    selection_of_a_pair=Rate(0.112, "ns", f"{_DAY}: speed | hunyuan-video 720p | torch | select by head | 0.00"),
    lists_of_a_pair=Rate(0.0479, "ns", f"{_DAY}: speed | hunyuan-video 720p | torch | lists from a mask | 0.00"),
    fit=Rate(0.3, "ms", assumed="two launches; 128 dependent steps for each head and penalty"),
    residual_directions=Rate(1, "ms", assumed="109 launches, products of 128 x 128, in dense steps that teach"),
    host_of_blocks=Rate(1.137, "ms", f"{_DAY}: step | wan 14b 720p | adaspa, sparse"),
    host_of_compensated=Rate(2.160, "ms", f"{_DAY}: step | wan 14b 720p | digest, sparse"),
    processors=Rate(132, "", assumed="the maker's data sheet"),
)
# The kernels as they are now, of which there is no row yet.
H100 = replace(
    H100_UNFUSED,
    mean_keys=Rate(602.7, "TFLOP/s", assumed="in the loop of the blocks, as fast as these"),
    fused_mass=Rate(1.15, "times", assumed="the target for masses in the dense pass itself"),
    moved_tokens=Rate(2265, "GB/s", assumed="a launch each way, as near to a copy as other kernels"),
    selection_of_a_pair=Rate(0.015, "ns", assumed="errors read four times, at half of what is usable of the bandwidth"),
    lists_of_a_pair=Rate(0.004, "ns", assumed="numbers of blocks written once, likewise"),
)

DEVICES: dict[str, Device] = {"h100": H100, "h100-unfused": H100_UNFUSED}
