"""Rows of results: one definition of their fields and units for all that write and read them.

A row is a plain dictionary, as JSON and CSV hold it. Fields marked `NotRequired` are missing in files of releases
before the field was added. Names carry units: `psnr_db` is in dB, `*_seconds` in s, `ms` in milliseconds, `tflops` in
10^12 operations a second, `*_gib` in GiB, `*_bytes` in bytes. Shares and densities lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

SCHEMA = 1  # of the files written today; files without the key `schema` have the same fields
SCHEMA_KEY = "schema"


class Origin(TypedDict):
    """Where a row was measured.

    Attributes:
        device: name of the GPU, or of the processor with its threads.
        dtype: of the model's weights, without the prefix "torch.".
        versions: of Python and of the packages that decide a result.
        commit: of the checkout, "+" behind it if files were changed; None outside of one.
    """

    device: str
    dtype: str
    versions: dict[str, str]
    commit: str | None


class Fidelity(TypedDict):
    """How close a video is to the dense one; all None where there is none to compare.

    The PSNR is None, too, where both are identical.

    Attributes:
        psnr_db: over all frames together, in dB.
        psnr_db_min: of the worst frame.
        ssim: mean over frames.
        latent_cosine: of the last latents.
    """

    psnr_db: float | None
    psnr_db_min: float | None
    ssim: float | None
    latent_cosine: float | None


class RunRow(Origin, Fidelity):
    """One run of one strategy beside the dense run: what `evaluate` writes with and without weights.

    Reports explain each column by `DEFINITIONS`.

    Attributes:
        model: its name.
        strategy: the strategy's name.
        label: its name, with what differs from the defaults.
        arguments: its `repr`.
        sparsity: as asked for; None if the strategy decides it.
        density: mean share of attention computed, over all self-attention calls; those that a step cache answered as 0.
        work: the same, with what searches compute beside it.
        executed: share of the self-attention calls that no step cache answered.
        sparse_density: mean density of the sparse calls; None if there was none.
        steps: denoising steps that reached attention.
        dense_steps: those of them without any sparse call.
        dense_seconds: time of the dense run.
        seconds: time of this run.
        speedup: their ratio.
        attention_seconds: time inside self-attention.
        attention_share: share of self-attention in the dense run's time.
        attention_speedup: of self-attention alone.
        recall: mean softmax mass that the chosen blocks held when they were chosen; None if none were.
        memory_bytes: what the strategy keeps between steps.
        fallbacks: calls that went dense unplanned, by their reason.
        backends: all calls, by their backend.
        dense_backend: the user's own, on which dense calls ran.
        prompt: what was generated.
        seed: of the random numbers.
        size: width x height x frames in pixels.
        schedule: `repr` of the schedule of the sparse run.
    """

    model: str
    strategy: str
    label: str
    arguments: str
    sparsity: float | None
    density: float
    work: NotRequired[float]
    executed: NotRequired[float]
    sparse_density: float | None
    steps: int
    dense_steps: int
    dense_seconds: float
    seconds: float
    speedup: float
    attention_seconds: float
    attention_share: float | None
    attention_speedup: float | None
    recall: float | None
    memory_bytes: int
    fallbacks: dict[str, int]
    backends: dict[str, int]
    dense_backend: str
    prompt: str
    seed: int
    size: str
    schedule: str


class ResultRow(RunRow):
    """A run with the model's weights, compared with the dense video of the same prompt and seed.

    Attributes:
        cpu_speedup: by the time of this process on the processor, which other processes disturb less.
        modes: share of heads in each mode, of a strategy that chooses by head.
        heads: the modes of a layer's heads separated by spaces, by layer and step.
        file: of the video or image, in the folder of the results.
    """

    cpu_speedup: NotRequired[float | None]
    modes: dict[str, float]
    heads: dict[str, dict[str, str]]
    file: str


class StepSeconds(TypedDict):
    """Seconds of a step of each kind; None if the run has no such step."""

    dense_step_seconds: float | None
    search_step_seconds: float | None
    refresh_step_seconds: float | None
    tail_step_seconds: NotRequired[float | None]
    sparse_step_seconds: float | None


class SpeedRow(RunRow, StepSeconds):
    """A run that is extrapolated from passes with random weights; it has no fidelity. See `SPEED_DEFINITIONS`.

    Attributes:
        weights: "random".
        passes: forward passes in a step: 2 with classifier-free guidance.
    """

    weights: str
    expected_attention_share: float
    expected_speedup: float | None
    dense_pass_tflop: float
    passes: int
    layers: int | None


class BenchRow(TypedDict):
    """One kernel on one case of `bench`.

    Attributes:
        case: name of the case in a suite, or empty.
        device: name of the GPU, or of the processor with its threads.
        backend: name of the kernel.
        kind: dense, mass, dense-mass, sparse, means, first-order, raster or ordered, or the eight bits of a sparse
            product.
        tokens: N.
        heads: H.
        head_dim: D.
        dtype: of q, k and v.
        block: tokens of a block, or "128x64", queries and keys.
        pattern: of the block lists, random or ragged.
        density: share of blocks computed.
        ms: median time of a call.
        tflops: of the operations that are needed.
        speedup: over the fastest dense kernel of the same case.
        efficiency: share of the block limit, which is that kernel's time times the density.
        max_error: against the reference in float64; None where it was not compared.
        torch: its version.
        triton: its version.
        commit: of the checkout.
        seed: of the random numbers.
    """

    case: str
    device: str
    backend: str
    kind: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    block: int | str
    pattern: str
    density: float
    ms: float
    tflops: float
    speedup: float
    efficiency: float
    max_error: float | None
    torch: str
    triton: str | None
    commit: str | None
    seed: int


class TileRow(TypedDict):
    """One tile of the Triton kernel: see `diffsparse_kernels.measured.Tile`."""

    keys: int
    warps: int
    stages: int
    copy: str


class TilesRow(TypedDict):
    """A row of `tiles.json` in the cache folder: the fastest tiles of a device at one size, best first.

    Attributes:
        q_block: tokens of a block of queries.
        kv_block: tokens of a block of keys.
    """

    device: str
    head_dim: int
    q_block: int
    kv_block: int
    tiles: list[TileRow]


class BreakEvenRow(TypedDict):
    """A row of `break_even.json` in the cache folder.

    Attributes:
        block: as in `BenchRow`.
        dense_ms: of torch's dense attention.
        break_even: density above which dense attention is faster than `backend`.
    """

    device: str
    backend: str
    dtype: str
    head_dim: int
    block: int | str
    tokens: int
    dense_ms: float
    break_even: float


class Attempt(TypedDict, total=False):
    """What one attempt of the GPU account gives; each stage fills in its own fields.

    Attributes:
        kernel: what was tried.
        shape: on which size.
        kind: of what was tried.
        case: words of the kernel's case, for `diffsparse_kernels.case.Case.read`.
        verdict: done, right, wrong, ran, timed, compiled, profiled, raised, hang, crash, no time, left out, ...
        why: of a verdict that is not good.
        error: largest error against float64.
        repeat_equal: whether repeated launches agree to the bit.
        ms: time on the device.
        host_ms: time on the host, until the call returns.
        share: of the fastest dense kernel's speed for each operation.
        executed: share of the steps that reach attention, beside a step cache.
        launches: of a profile: kernels launched.
        ops: of a profile: milliseconds of the operations that take the most.
        tile: of a tile that was timed.
        head_dim: of a tile that was timed.
        q_block: of a tile that was timed.
        kv_block: of a tile that was timed.
    """

    stage: str
    shape: str | None
    kernel: str | None
    verdict: str
    why: str
    case: list[str]
    kind: str
    tokens: int
    heads: int
    density: float
    executed: float
    ms: float | None
    host_ms: float
    tflops: float | None
    gb_per_s: float
    share: float | None
    speedup: float
    error: float | None
    repeat_equal: bool | None
    peak_gib: float | None
    backend: str
    backends: dict[str, int]
    fallbacks: dict[str, int]
    passed_over: dict[str, int]
    launches: int
    ops: dict[str, float]
    psnr_db: float
    seconds: float
    dense_seconds: float
    attention_share: float | None
    attention_speedup: float | None
    dense_step_seconds: float | None
    search_step_seconds: float | None
    sparse_step_seconds: float | None
    layers: int | None
    size: str
    tile: TileRow
    head_dim: int
    q_block: int
    kv_block: int


class AccountFacts(TypedDict, total=False):
    """What holds for all rows of one account of a GPU.

    Attributes:
        date: ISO 8601, of the start.
        driver: of CUDA.
        source: digest of the kernels' source.
    """

    date: str
    device: str
    driver: str
    versions: dict[str, str]
    commit: str | None
    source: str


class AccountRow(Attempt, AccountFacts, total=False):
    """A row of `rows.jsonl`: an attempt, and where it was made."""

    schema: int


class InspectionFacts(TypedDict):
    """How an inspection was made: the head of `inspect.json`.

    Attributes:
        label: the strategy's name, with what differs from the defaults.
        strategy: its `repr`.
        sparsity: at which recall is measured.
        block: at which recall is measured.
        layout: of the tokens.
        looks: steps that were sampled, counted from 1.
    """

    model: str
    label: str
    strategy: str
    schedule: str
    sparsity: float
    block: int | str
    layout: str
    looks: list[int]
    prompts: list[str]
    seed: int


class HeadRow(TypedDict):
    """One head of one layer in `inspect.json` and `recall.csv`; `recall_<order>` follows for each candidate order.

    Attributes:
        raster_recall: recall of the best blocks in raster order.
        best_recall: recall of the best blocks in the best order.
        best_order: that order.
        own_order: the strategy's order.
        chosen_recall: recall of the strategy's own blocks; None if it did not run sparse.
        chosen_density: density of the strategy's own blocks; None if it did not run sparse.
    """

    model: str
    layer: str
    number: int
    head: int
    raster_recall: float
    best_recall: float
    best_order: str
    own_order: str
    chosen_recall: float | None
    chosen_density: float | None


class ReplayFacts(TypedDict):
    """What a replay is made of: the head of `replay.json`.

    Attributes:
        recorded: what the recording says of itself: model, and where it was made.
        layout: of the tokens.
        layers: by name, with their model's.
        steps: recorded ones, counted from 1; every second of a pair is measured.
        run_steps: length of the run; None if it was unknown.
        heads: recorded ones, by number from 0.
    """

    recorded: dict[str, object]
    layout: str
    layers: list[str]
    steps: list[int]
    run_steps: int | None
    heads: list[int]
    head_dim: int


class ReplayRow(Origin):
    """One strategy at one sparsity on recorded calls.

    Attributes:
        strategy: as in a `RunRow`.
        label: as in a `RunRow`.
        arguments: as in a `RunRow`.
        sparsity: as asked for.
        error_db: -20 log10 of |output - dense| / |dense|, by the mean square over calls; None: identical, or no output.
        work: of a call, in dense passes; what was learned in the step before is not in it. None where it can't run.
        residual_mean: share of the square of dense output less its own that the first singular directions of a head
            hold, by their number; mean and least over heads and calls.
        residual_worst: share of the square of dense output less its own that the first singular directions of a head
            hold, by their number; mean and least over heads and calls.
        fallbacks: calls that went dense unplanned, by their reason.
        refused: why the strategy can't run there; empty if it can.
        calls: that were measured.
    """

    strategy: str
    label: str
    arguments: str
    sparsity: float
    error_db: float | None
    work: float | None
    residual_mean: dict[str, float]
    residual_worst: dict[str, float]
    fallbacks: dict[str, int]
    refused: str
    calls: int


DEFINITIONS = {
    "label": "the strategy's name, its sparsity, and what differs from the defaults",
    "density": "share of attention blocks computed, over all self-attention calls: dense steps count as 1, calls that "
    "a step cache answered as 0",
    "sparse_density": "share of attention blocks computed, over the calls that ran sparse",
    "work": "all attention computed, as a share of a dense run: density, and what searches compute beside it (a mass "
    "pass is a half)",
    "recall": "softmax mass inside the chosen blocks when they were chosen; null: the strategy sums no mass of blocks",
    "psnr_db": "peak signal-to-noise ratio to the dense video in dB, over all frames at once; null: identical",
    "psnr_db_min": "the lowest PSNR of a single frame, in dB; null: all frames identical",
    "ssim": "structural similarity to the dense video (7x7 window), mean over frames; null: frames under 7 pixels",
    "latent_cosine": "cosine similarity of the last step's latents",
    "seconds": "wall time of the call with the strategy on, its dense steps and searches included",
    "speedup": "dense_seconds / seconds",
    "attention_speedup": "time inside self-attention, dense over sparse, dense steps and searches included",
    "model": "as `--model` names it",
    "strategy": "the strategy's name, with its step cache and variants, without its knobs",
    "arguments": "the strategy as Python: all knobs",
    "sparsity": "as asked for; null: the strategy decides it",
    "executed": "share of the self-attention calls that no step cache answered; 1 without a cache",
    "steps": "denoising steps in which attention ran; those that a step cache answered whole are not in it",
    "dense_steps": "those of `steps` without any sparse call",
    "dense_seconds": "wall time of the untouched pipeline call, same prompt and seed, same process",
    "cpu_speedup": "the same ratio as `speedup` by processor time of this process, which other processes disturb less",
    "attention_seconds": "time inside self-attention in the call with the strategy on",
    "attention_share": "share of the dense call's wall time that is spent in self-attention",
    "memory_bytes": "what the strategy keeps between steps (blocks, summaries, log-sum-exp), in bytes",
    "dense_backend": "what computed the dense calls: the pipeline's own attention back end",
    "device": "name of the GPU, or of the processor with its threads",
    "dtype": "of the model's weights",
    "commit": "of the checkout that ran, + behind it: with changed files; null: outside of a checkout",
    "prompt": "what was generated",
    "seed": "of the starting noise",
    "size": "width x height x frames, in pixels",
    "schedule": "which steps are dense, as Python",
    "file": "of the video or image, in the folder of the results",
    "modes": "share of heads in each mode, of a strategy that chooses by head (in results.json alone)",
    "heads": "the modes of a layer's heads, by layer and step (in results.json alone)",
    "fallbacks": "calls that went dense unplanned, by reason (in results.json alone)",
    "backends": "calls, by what computed them (in results.json alone)",
    "versions": "of Python and of the packages that decide a result (in results.json alone)",
}

SPEED_DEFINITIONS = {
    "dense_step_seconds": "seconds of a step that is dense in all layers, on the user's own backend",
    "search_step_seconds": "of a dense step that also sums block masses and chooses blocks",
    "refresh_step_seconds": "of a sparse step that chooses its blocks again on the cached log-sum-exp",
    "tail_step_seconds": "of a step that runs dense beside sparse, to keep what the dropped blocks gave (+tail)",
    "sparse_step_seconds": "of a sparse step",
    "dense_seconds": "seconds of a run of dense steps: transformer only, extrapolated",
    "seconds": "the same with the strategy on, by its schedule: dense steps and searches included",
    "speedup": "dense_seconds / seconds",
    "attention_share": "share of a dense step that is spent in self-attention",
    "attention_speedup": "time inside self-attention, dense over sparse, dense steps and searches included",
    "work": "attention computed, in dense passes a step: density, and what searches compute beside it",
    "expected_speedup": "from the count of operations alone, as if the machine did all of them equally fast; "
    "null: what the strategy computes is not known before it runs",
    "dense_pass_tflop": "operations of one dense forward pass, in units of 10^12",
    "layers": "blocks of each kind that were built and timed, their times scaled to all; null: all were timed",
    "passes": "forward passes of a step: 2 with classifier-free guidance",
    "expected_attention_share": "share of self-attention in the operations of a dense step",
    "weights": "`random`",
}


def number(row: Mapping[str, object], column: str) -> float | None:
    """The number in a column; None where the row has none: rows of earlier releases lack some columns."""
    value = row.get(column)
    return value if isinstance(value, int | float) else None


def flat(rows: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Rows of equal keys for CSV, without what fits into no cell; None where a row lacks a key."""
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows for key in row)
    plain = [key for key in keys if not any(isinstance(row.get(key), dict) for row in rows)]
    return [{key: row.get(key) for key in plain} for row in rows]


def check_schema(kept: Mapping[str, object]) -> None:
    """Refuse a file of a later release; files without a schema are those of earlier ones.

    Raises:
        ValueError: the schema is not one that this release reads.
    """
    schema = kept.get(SCHEMA_KEY, SCHEMA)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise ValueError(f"schema {schema!r}, and this release reads up to {SCHEMA}")
