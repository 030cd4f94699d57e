"""What the embedded model must show before its numbers are quoted: `python -m training.gates`.

1. At least 8 of 10 unselected clips show one object of the right colour that moves the right way.
2. Its attention has structure: the best of six token orders for each head keeps at least 0.1 more of the softmax mass
   in the top fifth of the blocks than the raster order, and blocks chosen by their true mass beat random ones by at
   least 5 dB at 50 and 80 % sparsity.
3. The same model with random weights fails gate 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from skimage.measure import label, regionprops
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

import diffsparse
import diffsparse_kernels as kernels
from diffsparse import Random, Schedule
from diffsparse.errors import ConfigError
from diffsparse.insight.inspection import best_recall, order_masses
from diffsparse.orders.named import AXES
from diffsparse.strategies.blocks import keep_count
from diffsparse_kernels import BlockLists, select_rows
from diffsparse_pipelines import tiny
from diffsparse_pipelines.tiny.captions import CAPTIONS, COLOURS, DIRECTIONS, Caption, sample
from diffsparse_pipelines.tiny.variants import VARIANTS
from training import build
from training.sheet import generate

BLOCK = 64
SPARSITIES = (0.5, 0.8)
_BRIGHT, _NEAR = 0.75, 0.5  # backgrounds are never brighter than 0.65
_PROGRESS = Console(stderr=True)
_LEAST_AREA, _LEAST_WAY = 0.02, 0.15  # shares of the frame; real objects cover 4 to 12 % and cross 36 to 70 %
_REAL_WAY = 0.36


@dataclass(frozen=True)
class Verdict:
    """What one clip shows. way: of the object's centre along the asked direction, in shares of the frame."""

    caption: str
    one_object: bool
    right_colour: bool
    right_way: bool
    way: float

    @property
    def passed(self) -> bool:
        """All three."""
        return self.one_object and self.right_colour and self.right_way


def judge(clip: Tensor, caption: Caption) -> Verdict:
    """Find the object of a clip float [F, 3, H, W] in [0, 1] by its colour and follow its centre."""
    masks = _masks(clip)
    wanted = masks[caption.colour]
    area = {name: float(mask.mean()) for name, mask in masks.items()}
    frames = [_object(mask) for mask in wanted]
    seen = [found for found in frames if found is not None]
    centres = np.array([found[0] for found in seen])  # (x, y)
    whole = [found[1] > 0.8 for found in seen]  # most of the colour hangs together
    others = sum(area.values()) - area[caption.colour]
    way, aside = _way(centres, DIRECTIONS[caption.direction], len(frames)) if len(seen) > 2 else (0.0, 0.0)
    return Verdict(
        caption=str(caption),
        one_object=bool(len(seen) >= 0.8 * len(frames) and sum(whole) >= 0.8 * len(frames)),
        right_colour=area[caption.colour] > _LEAST_AREA and others < 0.5 * area[caption.colour],
        right_way=way > _LEAST_WAY and way > 1.5 * aside,
        way=round(way, 3),
    )


def agreement(clips: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """How well clips [F, H, W, C] show what their captions ask for, each in [0, 1]: an objective for `diffsparse hunt`.

    The mean of three shares: of the asked colour in its largest patch, over frames (0 where it is missing); of the
    asked colour among the object colours; and of the way along the asked direction, out of the least that real objects
    go, less the way across.
    """
    asked = {str(caption): caption for caption in CAPTIONS}
    strange = sorted(set(prompts) - asked.keys())
    if strange:
        raise ConfigError(f"agreement wants captions of the tiny model, such as {CAPTIONS[0]}; got {strange[0]!r}")
    return [_agreement(clip, asked[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]


def _agreement(clip: np.ndarray, caption: Caption) -> float:
    masks = _masks(torch.from_numpy(clip).permute(0, 3, 1, 2))
    wanted, vivid = masks[caption.colour], np.any(list(masks.values()), axis=0)
    frames = [_object(mask) for mask in wanted]
    seen = [found for found in frames if found is not None]
    whole = sum(share for _, share in seen) / len(frames)
    colour = float(wanted.sum() / max(vivid.sum(), 1))
    way, aside = 0.0, 0.0
    if len(seen) > 2:
        way, aside = _way(np.array([centre for centre, _ in seen]), DIRECTIONS[caption.direction], len(frames))
    return float(np.mean([whole, colour, np.clip((way - aside) / _REAL_WAY, 0, 1)]))


def _masks(clip: Tensor) -> dict[str, np.ndarray]:
    """Pixels of each object colour, bool [F, H, W]."""
    pixels = clip.permute(0, 2, 3, 1).numpy()  # [F, H, W, 3]
    palette = np.array(list(COLOURS.values()))
    distance = np.linalg.norm(pixels[..., None, :] - palette, axis=-1)  # [F, H, W, colours]
    vivid = (pixels.max(-1) > _BRIGHT) & (distance.min(-1) < _NEAR)
    return {name: vivid & (distance.argmin(-1) == i) for i, name in enumerate(COLOURS)}


def _object(mask: np.ndarray) -> tuple[tuple[float, float], float] | None:
    """Centre (x, y) in shares of the frame of the largest patch of colour, and its share of the colour."""
    patches = regionprops(label(mask))
    if mask.mean() < _LEAST_AREA:
        return None
    largest = max(patches, key=lambda patch: patch.area)
    y, x = largest.centroid
    return (x / mask.shape[1], y / mask.shape[0]), largest.area / mask.sum()


def _way(centres: np.ndarray, heading: tuple[int, int], frames: int) -> tuple[float, float]:
    """Way along `heading` and across it over the clip, by a straight line through the centres."""
    slope = np.polyfit(np.arange(len(centres)), centres, 1)[0] * (frames - 1)  # (x, y)
    along = float(slope @ np.array(heading))
    across = float(abs(slope @ np.array(heading[::-1])))
    return along, across


@dataclass(frozen=True)
class Oracle:
    """Keeps the blocks with the most true softmax mass, searched again at each call: an upper bound for any search."""

    sparsity: float

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        """Block-sparse attention on the best blocks of each row."""
        _, lse = kernels.attention(q, k, v, scale=site.scale)
        mass = site.block_mass(q, k, lse, BLOCK)
        n = q.shape[2]
        mask = select_rows(mass, keep_count(self.sparsity, mass.shape[-1]))
        lists = BlockLists.from_mask(mask, q_block=BLOCK, kv_block=BLOCK, q_len=n, kv_len=n)
        out: Tensor = site.sparse(q, k, v, lists)
        return out


class Recall:
    """Runs dense and measures the mass in the top fifth of the blocks, for six orders of the axes."""

    def __init__(self, steps: tuple[int, ...] = (2, 7, 12), share: float = 0.2) -> None:
        self.steps, self.share = steps, share
        self.found: dict[str, list[Tensor]] = defaultdict(list)  # order -> recall of each head

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        """Dense attention."""
        out: Tensor = site.dense(q, k, v)
        if site.step in self.steps:
            _, lse = kernels.attention(q, k, v, scale=site.scale)
            for name, mass in zip(AXES, order_masses(q, k, lse, site, AXES, BLOCK), strict=True):
                held, every = best_recall(mass, 1 - self.share)
                self.found[name].append(held / every)
        return out

    def summary(self) -> tuple[float, float]:
        """Mean over heads, layers and steps: in raster order, and in the best order of each."""
        each = torch.stack([torch.cat(values) for values in self.found.values()])
        return each[list(self.found).index("FHW")].mean().item(), each.amax(0).mean().item()


@dataclass(frozen=True)
class Structure:
    """Gate 2: recall of the top fifth of the blocks, and PSNR in dB against dense for each sparsity."""

    raster: float
    best: float
    oracle_db: dict[float, float]
    random_db: dict[float, float]

    @property
    def passed(self) -> bool:
        """Whether order and choice of blocks both matter."""
        choice = all(self.oracle_db[s] - self.random_db[s] >= 5 for s in self.oracle_db)
        return self.best - self.raster >= 0.1 and choice


def visual(pipe: Any, options: dict[str, Any], clips: int) -> list[Verdict]:
    """Gate 1: verdicts on the first clips, prompts of seed 0, clip i drawn once with seed i."""
    jobs = track(list(enumerate(sample(clips, 0))), "clips", console=_PROGRESS, transient=True)
    return [judge(generate(pipe, str(c), i, **options), c) for i, c in jobs]


def structure(pipe: Any, options: dict[str, Any], clips: int) -> Structure:
    """Gate 2 on the first clips; the first fifth of the steps runs dense in all of them."""
    recall = Recall()
    oracle: dict[float, list[float]] = {s: [] for s in SPARSITIES}
    random: dict[float, list[float]] = {s: [] for s in SPARSITIES}
    jobs = track(list(enumerate(sample(clips, 0))), "structure", console=_PROGRESS, transient=True)
    for i, caption in jobs:
        with diffsparse.apply(pipe, recall, schedule=Schedule(dense_first=0)):
            dense = generate(pipe, str(caption), i, **options).numpy()
        for kind, found in ((Oracle, oracle), (Random, random)):
            for sparsity, values in found.items():
                with diffsparse.apply(pipe, kind(sparsity), schedule=Schedule(dense_first=0.2)):
                    frames = generate(pipe, str(caption), i, **options).numpy()
                values.append(float(peak_signal_noise_ratio(dense, frames, data_range=1.0)))
    raster, best = recall.summary()
    means = ({s: float(np.mean(v)) for s, v in found.items()} for found in (oracle, random))
    return Structure(raster, best, *means)


def random_weights(pipe: Any, variant: str) -> None:
    """Replace the trained transformer by an untrained one: the control of gate 3."""
    pipe.transformer.load_state_dict(build.transformer(VARIANTS[variant], seed=2).state_dict())


def _describe(found: Structure) -> str:
    psnr = ", ".join(
        f"{s:.0%} sparse: best blocks {found.oracle_db[s]:.1f} dB, random {found.random_db[s]:.1f} dB"
        for s in found.oracle_db
    )
    return f"top-20 % recall {found.raster:.3f} in raster order, {found.best:.3f} in the best of six; {psnr}"


def main() -> None:
    """Run the gates on the embedded weights; exit status 1 if one of them is not met."""
    parser = argparse.ArgumentParser(prog="python -m training.gates", description=main.__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--clips", type=int, default=10, help="clips for gate 1 (default: %(default)s)")
    parser.add_argument("--structure-clips", type=int, default=3, help="clips for gate 2 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    chosen = parser.parse_args()
    pipe, options = tiny.load(chosen.variant), tiny.defaults(chosen.variant)
    pipe.set_progress_bar_config(disable=True)
    verdicts = visual(pipe, options, chosen.clips)
    trained = structure(pipe, options, chosen.structure_clips)
    random_weights(pipe, chosen.variant)
    control = structure(pipe, options, 1)
    good = sum(verdict.passed for verdict in verdicts)
    gates = [good >= 0.8 * len(verdicts), trained.passed, not control.passed]
    if chosen.json:
        findings = {"verdicts": [asdict(v) for v in verdicts], "trained": asdict(trained), "random": asdict(control)}
        print(json.dumps({**findings, "gates": gates}, indent=1))
    else:
        for verdict in verdicts:
            print(verdict)
        print(f"gate 1 {_word(gates[0])}: {good} of {len(verdicts)} clips show what was asked for")
        print(f"gate 2 {_word(gates[1])}: {_describe(trained)}")
        print(f"gate 3 {_word(gates[2])}: with random weights {_describe(control)}")
    sys.exit(0 if all(gates) else 1)


def _word(passed: bool) -> str:
    return "passed" if passed else "NOT MET"


if __name__ == "__main__":
    main()
