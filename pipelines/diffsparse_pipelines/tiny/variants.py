"""The sizes of the shipped models."""

from __future__ import annotations

from dataclasses import dataclass

VAE_PATCH = 2  # pixels per latent along height and width
TEXT_LENGTH = 32  # tokens of a caption, padding included


@dataclass(frozen=True)
class Variant:
    """Sizes of one shipped model: of its transformer, and of the clips it is trained for."""

    heads: int
    ffn: int
    frames: int
    pixels: int
    layers: int = 6
    head_dim: int = 64

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        side = self.pixels // (2 * VAE_PATCH)
        return self.frames, side, side


VARIANTS = {
    "default": Variant(heads=3, ffn=576, frames=17, pixels=64),
    "twin": Variant(heads=2, ffn=384, frames=9, pixels=32),
}
