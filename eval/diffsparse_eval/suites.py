"""What `diffsparse bench` measures: sizes, block patterns, and the suite of real models' shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn.attention import SDPBackend

    from diffsparse_kernels import Block, BlockLists

    QKV = tuple[Tensor, Tensor, Tensor]

Pattern = Literal["random", "ragged"]
_FRAMES = 21  # of the video on which ragged lists are modelled


@dataclass(frozen=True)
class Case:
    """One size, of batch 1.

    Attributes:
        tokens: N; inputs are [1, H, N, D].
        heads: H.
        head_dim: D.
        dtype: such as "bfloat16".
        block: tokens of a block, or its queries and keys.
        sparsities: shares of the blocks that are dropped.
        pattern: "random" keeps equally many blocks in each row, anywhere; "ragged" keeps those that attention over a
            video would: near in space and time, some everywhere, by one threshold a head, so that rows differ in
            length.
        name: in a suite.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    block: Block
    sparsities: tuple[float, ...]
    pattern: Pattern = "random"
    name: str = ""

    def tensors(self, device: str, seed: int = 0) -> QKV:
        """q, k, v [1, H, N, D], normally distributed.

        Args:
            device: where they are.
            seed: of the random numbers.
        """
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        shape, dtype = (1, self.heads, self.tokens, self.head_dim), getattr(torch, self.dtype)
        q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
        return q, k, v

    def lists(self, sparsity: float, device: str) -> BlockLists:
        """The blocks that are kept: (1 - sparsity) of all, about, and at least one in each row.

        Args:
            sparsity: share of the blocks that are dropped.
            device: where the lists are.
        """
        from diffsparse_kernels import BlockLists, select_heads, select_rows
        from diffsparse_kernels.lists import blocks_of

        rows, columns = blocks_of(self.tokens, self.q_block), blocks_of(self.tokens, self.kv_block)
        mass = (_video_mass if self.pattern == "ragged" else _noise)(self.heads, rows, columns).to(device)
        if self.pattern == "ragged":
            mask = select_heads(mass, 1 - sparsity) | (mass == mass.amax(-1, keepdim=True))
        else:
            mask = select_rows(mass, max(1, round((1 - sparsity) * columns)))
        sizes = {"q_block": self.q_block, "kv_block": self.kv_block, "q_len": self.tokens, "kv_len": self.tokens}
        return BlockLists.from_mask(mask, **sizes)

    def shrunk(self, by: int) -> Case:
        """The same case in small, for a machine without a GPU."""
        return replace(self, tokens=max(self.tokens // by, 2 * max(self.q_block, self.kv_block) + 1), heads=2)

    @property
    def q_block(self) -> int:
        """Queries of a block."""
        from diffsparse_kernels import edges

        return edges(self.block)[0]

    @property
    def kv_block(self) -> int:
        """Keys of a block."""
        from diffsparse_kernels import edges

        return edges(self.block)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of q, k and v."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return 3 * self.heads * self.tokens * self.head_dim * dtype.itemsize

    @property
    def label(self) -> str:
        """The name, if there is one, and the sizes."""
        from diffsparse_kernels import written

        sizes = f"{self.tokens} x {self.heads} x {self.head_dim} in blocks of {written(self.block)}, {self.dtype}"
        return f"{self.name}, {self.pattern}, {sizes}" if self.name else sizes

    @property
    def flops(self) -> float:
        """Floating-point operations of dense attention: two matrix products."""
        return 4.0 * self.heads * self.tokens**2 * self.head_dim


def _noise(heads: int, rows: int, columns: int) -> torch.Tensor:
    import torch

    return torch.rand(1, heads, rows, columns, generator=torch.Generator().manual_seed(1))


def _video_mass(heads: int, rows: int, columns: int) -> torch.Tensor:
    """Mass that falls with the distance in space and in time, at another rate in each head, under heavy noise."""
    import torch

    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.arange(count) * _FRAMES / count for count in (rows, columns))  # in frames
    distances = [
        (queries.floor()[:, None] - keys.floor()).abs() / _FRAMES,
        (queries.frac()[:, None] - keys.frac()).abs(),
    ]
    rate = 2 + 30 * torch.rand(heads, 2, 1, 1, generator=generator)
    noise = torch.randn(heads, rows, columns, generator=generator).exp()
    mass = (-rate[:, 0] * distances[0] - rate[:, 1] * distances[1]).exp() * noise
    mass[..., 0] += 1.0  # keys that all queries attend to
    return mass[None]


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by one of torch's kernels."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def gpu_suite() -> list[Case]:
    """Shapes of the models that people run, D = 128 in bfloat16, blocks of 128."""
    shapes = {
        "flux 1024 px": (4608, 24),
        "wan 480p 81 frames": (32_760, 12),
        "flux 4096 px": (66_048, 24),
        "wan 14b 720p 81 frames": (75_600, 40),
        "hunyuan-video 720p 129 frames": (119_056, 24),
    }
    densities = (0.0, 0.5, 0.7, 0.8, 0.9)
    return [
        Case(tokens, heads, 128, "bfloat16", 128, densities, pattern, name)
        for name, (tokens, heads) in shapes.items()
        for pattern in ("random", "ragged")
    ]


SUITES = {"gpu": gpu_suite}
