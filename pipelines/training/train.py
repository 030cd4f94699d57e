"""Train the embedded model: `python -m training.train --minutes 60`. One process, CPU or GPU.

The transformer predicts the clean latents x0 from x_t = (1 - t) x0 + t noise. A full clip is expensive, so most steps
see pieces of it: tokens picked on a regular grid, each at its true position, so that even a sixteenth of the tokens
teaches where things are and how they move. Steps on all tokens come at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsparse_pipelines.tiny.captions import CAPTIONS
from diffsparse_pipelines.tiny.variants import TEXT_LENGTH, VARIANTS, Variant
from training import build, data

DROPPED = len(CAPTIONS)  # place of the empty caption
CHECKPOINT = "checkpoint"
Axis = tuple[int, int]  # how many tokens, and how far apart


@dataclass(frozen=True)
class Piece:
    """A regular grid of tokens out of the whole clip, at a random place; how often it is drawn early and late."""

    name: str
    frames: Axis
    height: Axis
    width: Axis
    batch: int
    shift: float
    early: float
    late: float

    def pick(self, grid: tuple[int, int, int], rng: random.Random) -> tuple[range, range, range]:
        """Indices along frames, height and width."""
        places = []
        for (count, stride), length in zip((self.frames, self.height, self.width), grid, strict=True):
            start = rng.randrange(length - (count - 1) * stride)
            places.append(range(start, start + (count - 1) * stride + 1, stride))
        return places[0], places[1], places[2]


# The more tokens show an object, the more noise it takes to hide where it is: hence the large shifts.
PIECES = {
    "default": (
        Piece("coarse17", (17, 1), (4, 4), (4, 4), batch=16, shift=9, early=6, late=2),
        Piece("strided17", (17, 1), (8, 2), (8, 2), batch=6, shift=12, early=4, late=2),
        Piece("strided9", (9, 2), (8, 2), (8, 2), batch=10, shift=9, early=2, late=1),
        Piece("frame", (1, 1), (16, 1), (16, 1), batch=20, shift=4, early=4, late=0.5),
        Piece("dense5", (5, 1), (16, 1), (16, 1), batch=5, shift=5, early=1, late=1),
        Piece("window17", (17, 1), (8, 1), (8, 1), batch=5, shift=5, early=1, late=1),
        Piece("rows17", (17, 1), (8, 2), (16, 1), batch=2, shift=9, early=0.3, late=1),
        Piece("columns17", (17, 1), (16, 1), (8, 2), batch=2, shift=9, early=0.3, late=1),
        Piece("full", (17, 1), (16, 1), (16, 1), batch=1, shift=12, early=0, late=6),
    ),
    "twin": (
        Piece("strided", (9, 1), (4, 2), (4, 2), batch=24, shift=5, early=3, late=0),
        Piece("full", (9, 1), (8, 1), (8, 1), batch=8, shift=7, early=3, late=4),
        Piece("dense3", (3, 1), (8, 1), (8, 1), batch=16, shift=4, early=1, late=0.5),
    ),
}


class Denoiser(nn.Module):
    """The stock transformer on picked tokens: on all tokens it computes what the stock forward does."""

    def __init__(self, model: WanTransformer3DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Predict clean tokens.

        Args:
            tokens: noisy patches [B, N, 4 * LATENT], channels last within a patch.
            t: noise level in [0, 1], [B].
            text: caption features [B, L, TEXT_DIM].
            rotary: what `model.rope` gives, at the picked tokens.
        """
        model = self.model
        weight = model.patch_embedding.weight.permute(0, 2, 3, 4, 1).flatten(1)
        hidden = nn.functional.linear(tokens, weight, model.patch_embedding.bias)
        time_features, modulation, text, _ = model.condition_embedder(t * 1000, text, None)
        for block in model.blocks:
            hidden = block(hidden, text, modulation.unflatten(1, (6, -1)), rotary)
        shift, scale = (model.scale_shift_table + time_features.unsqueeze(1)).chunk(2, dim=1)
        hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        clean: Tensor = model.proj_out(hidden)
        return clean


def patches(latents: Tensor) -> Tensor:
    """Cut latents [B, C, F, H, W] into the tokens of the transformer: [B, F, H/2, W/2, 4 * C]."""
    cells: Tensor = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    return cells.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)


def choose(grid: Tensor, picked: tuple[range, range, range]) -> Tensor:
    """Tokens of [B, F, H, W, ...] at picked frames, rows and columns, in raster order: [B, N, ...]."""
    frames, rows, columns = (torch.tensor(places, device=grid.device) for places in picked)
    return grid[:, frames[:, None, None], rows[:, None], columns].flatten(1, 3)


def rotary_at(model: WanTransformer3DModel, variant: Variant, picked: tuple[range, range, range]) -> tuple[Tensor, ...]:
    """Rotary embedding of the picked tokens, at their places in the whole clip."""
    frames, rows, columns = variant.grid
    whole = torch.empty(1, 1, frames, 2 * rows, 2 * columns, device="meta")  # only its shape is read
    return tuple(choose(part.unflatten(1, variant.grid), picked) for part in model.rope(whole))


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Stratified logit-normal levels in (0, 1), moved towards noise by `shift` as the sampler's are: [count]."""
    uniform = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    level = torch.sigmoid(torch.special.ndtri(uniform.clamp(0.002, 0.998)))
    return shift * level / (1 + (shift - 1) * level)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run beside its data; progress runs from 0 to 1 by steps, minutes or both."""

    variant: str = "default"
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    rate: float = 0.012
    warm_up: int = 40
    hold: float = 0.3
    late: float = 0.6
    average: float = 0.998
    drop: float = 0.1

    def rate_at(self, step: int, progress: float) -> float:
        """Warm-up, constant, then a straight line to zero at progress 1."""
        left = 1.0 if progress < self.hold else (1 - progress) / (1 - self.hold)
        return self.rate * min(1.0, (step + 1) / self.warm_up) * max(left, 0.0)


class Trainer:
    """One run: weights, optimisers, average and step count; each step's chance comes from seed and step alone."""

    def __init__(self, recipe: Recipe, out: Path, init: Path | None = None, cpu: bool = True) -> None:
        self.recipe, self.out, self.variant = recipe, out, VARIANTS[recipe.variant]
        self.accelerator = Accelerator(mixed_precision="bf16", cpu=cpu)
        model = build.transformer(self.variant)
        if init is not None:
            model.load_state_dict({name: tensor.float() for name, tensor in load_file(init).items()})
        self.denoiser = Denoiser(model.to(self.accelerator.device))
        matrices, rest = _groups(model)
        self.denoiser, self.muon, self.adam = self.accelerator.prepare(
            self.denoiser,
            torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=0.02, ns_steps=4),
            torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rest = rest
        self.average = EMAModel(model.parameters(), decay=recipe.average)
        self.captions = build.caption_embeddings(TEXT_LENGTH).to(self.accelerator.device)
        self.step, self.seconds = 0, 0.0
        self.accelerator.register_for_checkpointing(self.average, self)

    @property
    def model(self) -> WanTransformer3DModel:
        """The transformer in training."""
        model: WanTransformer3DModel = self.accelerator.unwrap_model(self.denoiser).model
        return model

    @property
    def progress(self) -> float:
        """Share of the run that is done: whichever limit is closer."""
        recipe = self.recipe
        by_steps = self.step / recipe.steps if recipe.steps else 0.0
        by_time = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return max(by_steps, by_time)

    def run(self, save_seconds: float = 150.0, log_steps: int = 25) -> Iterator[dict[str, Any]]:
        """Train to the end, yielding a row of figures every `log_steps` steps; continues from a checkpoint."""
        self._resume()
        losses: dict[str, list[float]] = {}
        saved = self.seconds
        while self.progress < 1:
            started = time.monotonic()
            piece, loss = self.advance()
            self.seconds += time.monotonic() - started
            losses.setdefault(piece, []).append(loss)
            if self.step % log_steps == 0:
                yield self._row(losses)
                losses = {}
            if self.seconds - saved > save_seconds:
                saved = self.seconds
                self.save()
        if losses:
            yield self._row(losses)
        self.save()

    def advance(self) -> tuple[str, float]:
        """One optimiser step; returns the kind of piece it saw and its loss."""
        recipe, progress = self.recipe, self.progress
        rng = random.Random(recipe.seed * 1_000_003 + self.step)
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        pieces = PIECES[recipe.variant]
        weights = [piece.late if progress > recipe.late else piece.early for piece in pieces]
        piece = rng.choices(pieces, weights)[0]
        rate = recipe.rate_at(self.step, progress)
        _set_rate(self.muon, rate)
        _set_rate(self.adam, 0.08 * rate)
        loss = self._loss(piece, piece.pick(self.variant.grid, rng), generator)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.rest, 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad()
        self.average.step(self.model.parameters())
        self.step += 1
        return piece.name, loss.item()

    def _loss(self, piece: Piece, picked: tuple[range, range, range], generator: torch.Generator) -> Tensor:
        variant, device = self.variant, self.accelerator.device
        video, caption = data.clips(piece.batch, variant.frames, variant.pixels, generator)
        clean = choose(patches(build.latents(video)), picked)  # [B, N, 4 * LATENT]
        noise = torch.randn(clean.shape, generator=generator)
        t = noise_levels(piece.batch, piece.shift, generator)
        caption = torch.where(torch.rand(piece.batch, generator=generator) < self.recipe.drop, DROPPED, caption)
        clean, noise, t, caption = (tensor.to(device) for tensor in (clean, noise, t, caption))
        noisy = torch.lerp(clean, noise, t[:, None, None])
        with self.accelerator.autocast():
            guess = self.denoiser(noisy, t, self.captions[caption], rotary_at(self.model, variant, picked))
        errors: Tensor = (guess.float() - clean).square().mean((1, 2))
        return (errors / t.clamp(min=0.2) ** 2).mean()

    def save(self) -> None:
        """Write a checkpoint to continue from, and the averaged weights as `ema.safetensors`; each in one move."""
        fresh, kept, old = (self.out / f"{CHECKPOINT}{suffix}" for suffix in (".new", "", ".old"))
        self.accelerator.save_state(str(fresh))
        if kept.exists():
            kept.rename(old)
        fresh.rename(kept)
        if old.exists():
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        weights = self.averaged()
        save_file(weights, self.out / "ema.new")
        (self.out / "ema.new").rename(self.out / "ema.safetensors")

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the stock transformer, float32."""
        names = [name for name, _ in self.model.named_parameters()]
        return {n: p.detach().cpu().contiguous() for n, p in zip(names, self.average.shadow_params, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; weights and optimisers are saved by the accelerator."""
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.seconds = state["step"], state["seconds"]

    def _resume(self) -> None:
        kept, old = self.out / CHECKPOINT, self.out / f"{CHECKPOINT}.old"
        if old.exists() and not kept.exists():  # stopped between the two renames of `save`
            old.rename(kept)
        if kept.exists():
            self.accelerator.load_state(str(kept))

    def _row(self, losses: dict[str, list[float]]) -> dict[str, Any]:
        means = {name: round(sum(values) / len(values), 5) for name, values in sorted(losses.items())}
        rate = self.recipe.rate_at(self.step, self.progress)
        return {"step": self.step, "seconds": round(self.seconds, 1), "rate": round(rate, 6), "loss": means}


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, for Muon, and all the rest, for AdamW."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if name.startswith("blocks") and parameter.ndim == 2 else rest).append(parameter)
    return matrices, rest


def _set_rate(optimiser: Any, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def main() -> None:
    """Train the tiny model, or go on from the checkpoint in the output folder."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and weights")
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--minutes", type=float, help="length of the run in minutes of training")
    parser.add_argument("--steps", type=int, help="length of the run in steps; the closer limit counts")
    parser.add_argument("--init", type=Path, help="safetensors file of weights to start from")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="peak rate of Muon (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="(default: %(default)s)")
    parser.add_argument("--hold", type=float, default=Recipe.hold, help="share of the run before the rate falls")
    parser.add_argument("--late", type=float, default=Recipe.late, help="share of the run before the late mix")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU that accelerate finds")
    parser.add_argument("--export", type=Path, help="pipeline folder to write at the end")
    chosen = parser.parse_args()
    if not (chosen.minutes or chosen.steps):
        parser.error("say how long: --minutes or --steps")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    limits = {"steps": chosen.steps, "minutes": chosen.minutes, "hold": chosen.hold, "late": chosen.late}
    recipe = Recipe(variant=chosen.variant, seed=chosen.seed, rate=chosen.rate, **limits)
    chosen.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, chosen.out, chosen.init, cpu=not chosen.gpu)
    with (chosen.out / "log.jsonl").open("a") as log:
        for row in trainer.run():
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
    if chosen.export:
        build.export(trainer.averaged(), trainer.variant, chosen.export)


if __name__ == "__main__":
    main()
