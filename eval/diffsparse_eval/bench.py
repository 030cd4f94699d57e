"""`diffsparse bench`: our kernels beside torch's dense attention, same tensors, same process, correctness first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from diffsparse.errors import ConfigError, DiffsparseError

if TYPE_CHECKING:
    import torch

    from diffsparse_kernels import BlockLists

Row = dict[str, Any]
_BACKENDS = ("cpu", "triton", "gluon")  # what is timed by default, where it runs


class WrongResultError(DiffsparseError, ArithmeticError):
    """A kernel's result is further from the exact one than its number format explains."""


@dataclass(frozen=True)
class Case:
    """One size: batch 1, `heads` x `tokens` x `head_dim`, square blocks, shares of them dropped at random."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    block: int
    sparsities: tuple[float, ...]

    def tensors(self, device: str) -> list[torch.Tensor]:
        """q, k, v [1, H, N, D], normally distributed, seeded."""
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.tokens, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

    def lists(self, sparsity: float, device: str) -> BlockLists:
        """Random blocks, equally many in each row: (1 - sparsity) of a row, rounded, at least one."""
        import torch

        from diffsparse_kernels import BlockLists, select_rows
        from diffsparse_kernels.lists import blocks_of

        edge = blocks_of(self.tokens, self.block)
        mass = torch.rand(1, self.heads, edge, edge, generator=torch.Generator().manual_seed(1))
        mask = select_rows(mass, max(1, round((1 - sparsity) * edge))).to(device)
        sizes = {"q_block": self.block, "kv_block": self.block, "q_len": self.tokens, "kv_len": self.tokens}
        return BlockLists.from_mask(mask, **sizes)

    @property
    def flops(self) -> float:
        """Of dense attention, two matrix products."""
        return 4.0 * self.heads * self.tokens**2 * self.head_dim


class Entry(NamedTuple):
    """One contestant of a case; error is that of `check`."""

    backend: str
    kind: Literal["dense", "mass", "sparse"]
    density: float = 1.0
    error: float | None = None


def dense_backends(device: str) -> dict[str, Any]:
    """torch's dense kernels by name."""
    from torch.nn.attention import SDPBackend

    if device == "cpu":
        return {"sdpa": SDPBackend.FLASH_ATTENTION}
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {f"sdpa-{name}": getattr(SDPBackend, member) for name, member in names.items()}


def measure(case: Case, device: str, backends: list[str], rounds: int) -> list[Row]:
    """Time one case: each dense kernel, then block-sparse attention and the mass pass of each backend.

    Contestants take turns, `rounds` times, and the median counts, so that a busy machine slows all of them alike.

    Raises:
        WrongResultError: a kernel that is not exact enough is not timed.
    """
    import torch

    from diffsparse_kernels import attention, block_mass, block_sparse_attention

    q, k, v = case.tensors(device)
    _, lse = attention(q, k, v)
    contestants: dict[Entry, Callable[[], Any]] = {
        Entry(name, "dense"): _sdpa(member, q, k, v) for name, member in dense_backends(device).items()
    }
    for name in backends:
        mass = partial(block_mass, q, k, lse, q_block=case.block, kv_block=case.block, backend=name)
        contestants[Entry(name, "mass")] = mass
    for sparsity, name in itertools.product(case.sparsities, backends):
        lists = case.lists(sparsity, device)
        entry = Entry(name, "sparse", float(lists.density()), check(q, k, v, lists, name))
        contestants[entry] = partial(block_sparse_attention, q, k, v, lists, backend=name)
    with torch.inference_mode():
        seconds = _take_turns(contestants, rounds)
    dense = min(value for entry, value in seconds.items() if entry.kind == "dense")
    return [_row(case, device, entry, value, dense) for entry, value in seconds.items()]


def _sdpa(member: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(member):
            return scaled_dot_product_attention(q, k, v)

    return call


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists, backend: str) -> float:
    """Largest error of `backend` on the first head, against the reference in float64.

    Raises:
        WrongResultError: it is over twice the error of a plain eager computation in the same number format.
    """
    import torch

    from diffsparse_kernels import BlockLists, block_sparse_attention

    head = BlockLists(lists.idx[:, :1], lists.cnt[:, :1], lists.q_block, lists.kv_block, lists.q_len, lists.kv_len)
    q, k, v = (x[:, :1] for x in (q, k, v))
    exact, _ = block_sparse_attention(q.double(), k.double(), v.double(), head, backend="reference")
    ours, _ = block_sparse_attention(q, k, v, head, backend=backend)
    eager = _eager(q, k, v, head)
    error, limit = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    limit = 2 * limit + torch.finfo(q.dtype).eps * exact.abs().max().item()
    if not error <= limit:
        raise WrongResultError(f"backend {backend!r} is off by {error:.2e}; at most {limit:.2e} is explained")
    return error


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists) -> torch.Tensor:
    """Masked softmax attention, every step rounded to the inputs' dtype."""
    mask = lists.to_mask().repeat_interleave(lists.q_block, 2).repeat_interleave(lists.kv_block, 3)
    mask = mask[..., : lists.q_len, : lists.kv_len]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    out: torch.Tensor = scores.softmax(-1) @ v
    return out


def _take_turns(contestants: dict[Entry, Callable[[], Any]], rounds: int) -> dict[Entry, float]:
    """Median seconds of each; a dense kernel that can't run here is left out."""
    import torch
    from torch.utils.benchmark import Timer

    timers = {
        entry: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for entry, call in contestants.items()
    }
    times: dict[Entry, list[float]] = {}
    for turn, (entry, timer) in itertools.product(range(rounds + 1), timers.items()):
        try:
            elapsed = timer.timeit(1).mean
        except RuntimeError:
            if entry.kind != "dense":
                raise
            continue
        if turn > 0:  # the first warms up
            times.setdefault(entry, []).append(elapsed)
    return {entry: sorted(found)[len(found) // 2] for entry, found in times.items()}


def _row(case: Case, device: str, entry: Entry, seconds: float, dense: float) -> Row:
    from diffsparse_eval import environment

    share = 0.5 if entry.kind == "mass" else entry.density  # the mass pass has one product of two
    return {
        "device": environment.device_name(device),
        "backend": entry.backend,
        "kind": entry.kind,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "block": case.block,
        "density": entry.density,
        "ms": seconds * 1e3,
        "tflops": share * case.flops / seconds / 1e12,
        "speedup": dense / seconds,
        "max_error": entry.error,
        "torch": environment.versions()["torch"],
        "commit": environment.commit(),
        "seed": 0,
    }


def bench(
    tokens: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "1024,4096",
    sparsity: Annotated[str, typer.Option(help="Shares of blocks dropped.")] = "0.5,0.8,0.9",
    head_dim: Annotated[str, typer.Option(help="Channels of a head.")] = "64,128",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    block: Annotated[str, typer.Option(help="Edges of a block in tokens.")] = "64,128",
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    backend: Annotated[str, typer.Option(help="Backends, separated by commas; all that run here if empty.")] = "",
    rounds: Annotated[int, typer.Option(help="Timed turns of each contestant.")] = 7,
    out: Annotated[Path | None, typer.Option(help="A .csv or .json file for the rows.")] = None,
) -> None:
    """Time the attention kernels beside torch's dense ones: same tensors, same process, results checked first."""
    import torch

    from diffsparse.files import folder
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if out is not None:
        _check_out(out)
        folder(out.parent)
    cases = _cases(tokens, sparsity, head_dim, dtype, block, heads)
    if rounds < 1:
        raise ConfigError(f"--rounds wants at least 1; got {rounds}")
    named = _named(backend, device)
    rows: list[Row] = []
    with bar(console) as progress:
        for case in progress.track(cases, description="cases"):
            rows += measure(case, device, named, rounds)
    console.print(_table(rows))
    console.print("speed-up is over the fastest dense kernel of the same case; mass is the search pass without values")
    if out is not None:
        _write(rows, out)
        console.print(f"{len(rows)} rows are in {out}", soft_wrap=True)


def _cases(tokens: str, sparsity: str, head_dim: str, dtype: str, block: str, heads: int) -> list[Case]:
    from diffsparse_pipelines.families import DTYPES
    from diffsparse_pipelines.options import amounts

    dtypes = [name.strip() for name in dtype.split(",") if name.strip()]
    if not dtypes or not set(dtypes) <= set(DTYPES) - {"auto"}:
        raise ConfigError(f"--dtype wants some of {', '.join(DTYPES[1:])}; got {dtype!r}")
    shares = amounts(sparsity, "--sparsity")
    if not shares or not all(0 <= share < 1 for share in shares):
        raise ConfigError(f"--sparsity wants numbers in [0, 1), separated by commas; got {sparsity!r}")
    counts = {"--tokens": tokens, "--head-dim": head_dim, "--block": block, "--heads": str(heads)}
    sizes = {name: amounts(text, name) for name, text in counts.items()}
    for name, values in sizes.items():
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise ConfigError(f"{name} wants whole numbers of at least 1; got {counts[name]!r}")
    product = itertools.product(dtypes, sizes["--head-dim"], sizes["--tokens"], sizes["--block"])
    dropped = tuple(map(float, shares))
    return [Case(int(n), heads, int(d), name, int(b), dropped) for name, d, n, b in product]


def _named(wanted: str, device: str) -> list[str]:
    from diffsparse_kernels import BackendError, backends

    known = backends()
    if not wanted:
        kind = ("cpu",) if device == "cpu" else _BACKENDS[1:]
        return [name for name in kind if known.get(name) == "available"]
    listed = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in listed:
        if known.get(name) != "available":
            raise BackendError(f"backend {name!r}: {known.get(name, 'unknown')}; known: {', '.join(known)}")
    return listed


def _check_out(out: Path) -> None:
    if out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out wants a .csv or .json file; got {out.name!r}")


def _write(rows: list[Row], out: Path) -> None:
    import json

    from diffsparse.files import whole
    from diffsparse_eval.report import write_csv

    if out.suffix == ".csv":
        return write_csv(rows, out)
    with whole(out) as temporary:
        temporary.write_text(json.dumps({"rows": rows}, indent=1))


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    shown = Table(title=rows[0]["device"], title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for name in ("dtype", "tokens x heads x D", "block", "backend", "kind"):
        shown.add_column(name, no_wrap=True)
    for name in ("density", "ms", "tflops", "speed-up"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        size = f"{row['tokens']} x {row['heads']} x {row['head_dim']}"
        figures = f"{row['density']:.2f}", f"{row['ms']:.2f}", f"{row['tflops']:.3f}", f"{row['speedup']:.2f}"
        shown.add_row(row["dtype"], size, str(row["block"]), row["backend"], row["kind"], *figures)
    return shown
