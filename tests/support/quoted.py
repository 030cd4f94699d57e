"""What committed rows say, as pages quote it: numbers of single methods, and sentences made of several rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from itertools import chain, permutations
from pathlib import Path
from statistics import mean
from typing import Any

from diffsparse.insight.cost import flops
from diffsparse.strategies.residual import affordable_rank
from diffsparse_eval import stack
from diffsparse_pipelines.architectures import ARCHITECTURES, heads_of
from diffsparse_pipelines.families import grid
from support import recipes, results
from support.results import RESULTS, ROOT, of

# Columns that pages quote, and how many digits they give.
DIGITS = {
    "psnr_db": (1, 2),
    "ssim": (3,),
    "work": (2, 3),
    "density": (2,),
    "sparse_density": (2,),
    "speedup": (1, 2),
    "cpu_speedup": (1, 2),
    "attention_speedup": (2,),
}
_NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?: ± \d+\.\d+)?(?![\d.])")
_ELSEWHERE = (
    r"<!-- (\w[\w-]*):.*?<!-- /\1 -->",  # generated, and held by tests of their own
    r"```.*?```|`[^`\n]*`",
    r"\]\([^)]*\)",
    r"\d{4}\.\d{5}",  # arXiv
    r"\b(?:[A-Z][\w-]*|torch) (?:[\d.]+, )*[\d.]+(?: and [\d.]+)*",  # versions
)


def numbers(page: str) -> list[str]:
    """Numbers with a decimal point that stand on a page by hand, with their intervals."""
    for pattern in _ELSEWHERE:
        page = re.sub(pattern, "", page, flags=re.DOTALL)
    return _NUMBER.findall(page)


def sources(page: str) -> list[str]:
    """The committed files that a page names, with or without ending, or by a pattern; all if it names none."""
    patterns = [
        *re.findall(r"[\w*-]+\*[\w*.-]*", page),
        *(f"*{Path(name).stem}.*" for name in results.FILES if Path(name).stem in page),
    ]
    named = [name for name in results.FILES if any(fnmatch(Path(name).name, pattern) for pattern in patterns)]
    return named or list(results.FILES)


def told(path: Path) -> set[str]:
    """All that the rows of the files say which a page names, and the cards that it links to, as texts."""
    page = path.read_text()
    cards = (path.parent / link for link in re.findall(r"\]\(([^)#:]*(?:card|results)/[\w-]+\.md)\)", page))
    return set().union(*map(_of_file, sources(page)), *(re.findall(r"\d+\.\d+", card.read_text()) for card in cards))


@cache
def _of_file(name: str) -> set[str]:
    if name.startswith("gpu/"):
        return _of_account(name)
    labels: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows(name):
        labels.setdefault(row.get("label") or row["kind"], []).append(row)
    means = (_means(rows, column, digits) for column, digits in DIGITS.items() for rows in labels.values())
    return {*chain.from_iterable(means), *_compared(labels)}


def _means(rows: list[dict[str, Any]], column: str, digits: tuple[int, ...]) -> Iterator[str]:
    values = [float(row[column]) for row in rows if row.get(column) is not None]
    for each in digits if values else ():
        yield from (results.with_interval(values, each), f"{mean(values):.{each}f}")


def _compared(labels: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """PSNR of two methods on the prompts that both ran on, and what one gains over the other."""
    psnr = {
        label: {(row["prompt"], row["seed"]): row["psnr_db"] for row in rows if row.get("psnr_db") is not None}
        for label, rows in labels.items()
    }
    for ours, theirs in permutations(psnr.values(), 2):
        common = ours.keys() & theirs
        if common:
            gain = [ours[key] - theirs[key] for key in common]
            yield from (results.with_interval(gain), f"{mean(gain):.1f}", f"{mean(ours[key] for key in common):.2f}")


def _of_account(name: str) -> set[str]:
    """All numbers of a GPU's rows, and of the page that is made of them."""
    found = set(re.findall(r"\d+\.\d+", (ROOT / "docs/gpu.md").read_text()))
    for line in (RESULTS / name).read_text().splitlines():
        values = [value for value in json.loads(line).values() if isinstance(value, float)]
        found |= {f"{value:.{digits}f}" for value in values for digits in (2, 3)}
    return found


# --- sentences ------------------------------------------------------------------------------------------------------


def sentences() -> Iterator[tuple[str, str]]:
    """A page, and what stands on it in these words: numbers that are made of several rows."""
    yield from _shares()
    yield from _means_and_orders()
    yield from _kernels()
    yield from _few_steps()
    yield from _stacks()
    yield from _kept()


def _psnr(label: str, file: str = "tiny.csv") -> float:
    return float(mean(of(file, label, "psnr_db")))


def _means_and_orders() -> Iterator[tuple[str, str]]:
    modes = "sparse-vdit 0.8 epsilon=100.0 modes=diagonal+multi-diagonal+stripe"
    labels = ("paro 0.8", "adaspa 0.8", "adaspa 0.8 order=auto", "gna 0.8", modes, "random 0.8")
    paro, adaspa, ordered, gna, vdit, random = (_psnr(f"{label} +means") - _psnr(label) for label in labels)
    assert abs(gna) < 0.05
    yield (
        "docs/results.md",
        f"At 80 % they add {paro:.1f} dB to `PARO`, {adaspa:.1f} to `AdaSpa`, {ordered:.1f} to `AdaSpa` in the order "
        f"of each head, nothing to `GNA`, and take {-vdit:.1f} from `SparseVDiT` and {-random:.1f} from `Random`. "
        f"Order alone is worth {_psnr('paro 0.8') - _psnr('paro 0.8 orders=FHW'):.1f} dB to `PARO`.",
    )
    digest, tangent = (_psnr(f"{name} 0.9", "tiny-tangent.json") for name in ("digest", "tangent"))
    yield "docs/strategies/tangent.md", f"[`Digest`](digest.md) is {digest - tangent:.1f} dB better there"
    better = _psnr("digest 0.8", "tiny-tangent.json") - _psnr("adaspa 0.8")
    yield "docs/strategies/adaspa.md", f"[`Digest`](digest.md) is {better:.1f} dB better at 80 % on the embedded model"


def _kernels() -> Iterator[tuple[str, str]]:
    one, two = (_speeds(name) for name in ("bench-cpu-one-thread.csv", "bench-cpu.csv"))
    means, first = (_on_top("bench-cpu-one-thread.csv", kind) for kind in ("means", "first-order"))
    yield "docs/results.md", f"is {one} times as fast as torch's dense attention on one core, and {two} times on two."
    yield "docs/results.md", f"On one core summaries take {means} % (means) or {first} % (first order) on top."
    yield (
        "docs/strategies/compensated.md",
        f"On one CPU core they take {means} % on top of a sparse product at a fifth of the blocks, "
        f"first order {first} %",
    )


def _fifth(name: str, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of our own kernel over a fifth of the blocks, by their case."""
    keys = ("head_dim", "block", "dtype", "pattern", "density")
    return {tuple(row[key] for key in keys): row for row in results.fifth(name, "cpu", kind)}


def _speeds(name: str) -> str:
    return _range([row["speedup"] for row in _fifth(name, "sparse").values()], ".1f")


def _on_top(name: str, kind: str) -> str:
    alone = _fifth(name, "sparse")
    return _range([100 * (row["ms"] / alone[case]["ms"] - 1) for case, row in _fifth(name, kind).items()], ".0f")


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _few_steps() -> Iterator[tuple[str, str]]:
    def of_few(label: str, steps: int, dense: int, column: str = "psnr_db") -> float:
        return float(mean(of(f"few-{steps}-steps-{dense}-dense.json", label, column)))

    shares = (0.5, 0.6, 0.7, 0.8)
    worth = [of_few(f"digest {share}", 4, 1) - of_few(f"digest {share}", 4, 0) for share in shares]
    four = of_few("digest 0.6", 4, 1) - of_few("digest 0.8", 4, 1)
    eight = of_few("digest 0.7", 8, 2) - of_few("digest 0.8", 8, 2)
    more = of_few("digest 0.7", 8, 2, "work") - of_few("digest 0.8", 8, 2, "work")
    work = [f"{of_few(f'digest {share}', 4, 1, 'work'):.2f}" for share in (0.6, 0.8)]
    tangent = [f"{of_few(f'tangent {share}', 4, 1):.1f}" for share in shares[1:]]
    page = "docs/few-steps.md"
    yield page, f"A dense first step is worth {_range(worth, '.1f')} dB in four steps."
    yield (
        page,
        f"From 0.8 to 0.6 in four steps is {four:.1f} dB for a fifth of dense attention more (work {work[0]} for "
        f"{work[1]}); from 0.8 to 0.7 in eight steps with two dense {eight:.1f} dB for {100 * more:.0f} points more.",
    )
    yield page, f"in four steps ({tangent[0]}, {tangent[1]} and {tangent[2]} with one dense)"


def _stacks() -> Iterator[tuple[str, str]]:
    without, guided = (stack.points(stack.read(RESULTS / f"stack-guidance-{scale}.json")) for scale in (1, 5))
    one, five = ({point.label: point for point in points} for points in (without, guided))
    page = "docs/stack.md"

    def psnr(point: stack.Point) -> str:
        return f"{mean(point.psnr_db):.1f}"

    caches = [psnr(one[f"taylor-seer:interval={interval}/dense"]) for interval in (2, 3, 4)]
    yield (
        page,
        f"has {caches[0]} dB with every second step, {caches[1]} with every third, {caches[2]} with every fourth.",
    )
    near, far = _margins(without), _margins(guided)[0]
    fourth = five["taylor-seer:interval=4/dense"]
    above = _margins([point for point in guided if point is fourth or point.kind == "stack"])[0].gain_db
    yield (
        page,
        f"At {near[0].speedup:.1f}x the stack is {near[0].gain_db:.1f} dB closer than the best cache alone, at "
        f"{near[1].speedup:.1f}x {near[1].gain_db:.1f} dB ({far.gain_db:.1f} and {above:.1f} dB at {far.speedup:.1f}x "
        f"and {fourth.measured:.1f}x with guidance)",
    )
    late, balanced = one["taylor-seer:interval=2/digest 0.65"], one[stack.BALANCED]
    yield page, f'has {psnr(late)} dB at {late.measured:.1f}x, `"balanced"` {psnr(balanced)}.'
    second, later = (five[f"taylor-seer:interval=2{wait}/dense"] for wait in ("", ":warm_up=0.45"))
    ours = five["taylor-seer:interval=2:warm_up=0.45/digest 0.8"]
    yield (
        page,
        f"every second step after three alone has {psnr(second)} dB at {second.measured:.2f}x; after 45 % of the run "
        f"{psnr(later)} at {later.measured:.2f}x, and with `Digest` on top {psnr(ours)} at {ours.measured:.2f}x.",
    )
    pairs = [
        (point, by[point.label.replace("digest", "tangent")])
        for by in (one, five)
        for point in by.values()
        if point.label.endswith("/digest 0.8")
    ]
    gains = [mean(digest.psnr_db) - mean(tangent.psnr_db) for digest, tangent in pairs]
    slower = [100 * (1 - digest.measured / tangent.measured) for digest, tangent in pairs]
    yield page, f"It is {_range(gains, '.1f')} dB better and {_range(slower, '.0f')} % slower"
    eight = {point.label: point for point in stack.points(stack.read(RESULTS / "cache-8-steps.json"))}
    both, alone = eight["taylor-seer:interval=2:warm_up=4/tangent 0.8"], eight["tangent 0.8"]
    yield (
        page,
        f"every second left out after four: {psnr(both)} dB at {both.measured:.2f}x with `Tangent` on top, `Tangent` "
        f"alone {psnr(alone)} at {alone.measured:.2f}x.",
    )
    fifth = five["taylor-seer:interval=5/dense"]
    yield (
        page,
        f"(every fifth step, {psnr(fifth)} dB); every fourth has {psnr(fourth)} at {fourth.measured:.2f}x, and the "
        f"stacks are {above:.1f} above that.",
    )


def _margins(points: list[stack.Point]) -> list[stack.Margin]:
    return stack.margins(points, stack.measured)


def _shares() -> Iterator[tuple[str, str]]:
    runs = (recipes.foretold(name, {}) for name in ("wan2.1-1.3b", "wan2.1-14b", "hunyuan-video"))
    small, large, hunyuan = (float(run["attention_share"]) for run in runs if run)
    bounds = [f"{1 / (1 - 0.8 * round(share, 2)):.1f}x" for share in (small, large, hunyuan)]
    yield (
        "README.md",
        f"Attention is {small:.2f} of a step of Wan 1.3B at 480p, {large:.2f} of Wan 14B at 720p (`diffsparse "
        f"simulate`): at 80 % sparsity no kernel gives more than {bounds[0]} and {bounds[1]} (HunyuanVideo: "
        f"{hunyuan:.2f}, {bounds[2]}).",
    )
    others = f"{large:.2f} of Wan 14B and {hunyuan:.2f} of HunyuanVideo at 720p"
    told = f"{small:.2f} of a dense step of Wan 1.3B at 480p, {others}"
    yield "docs/questions.md", told
    yield "docs/evaluate.md", f"{told}: a perfect kernel at 80 % gives {bounds[0]}, {bounds[1]} and {bounds[2]}"
    yield (
        "docs/stack.md",
        f"{small:.2f} for Wan 1.3B at 480p, {large:.2f} for Wan 14B and {hunyuan:.2f} for HunyuanVideo at 720p.",
    )


def _kept() -> Iterator[tuple[str, str]]:
    """What `Digest` keeps in runs of 50 steps, by the formulas that the page gives, and a step cache."""
    for name, text, digits in (
        ("wan2.1-1.3b", "Wan 2.1 1.3B, 480p, 81 frames", 3),
        ("wan2.1-14b", "Wan 2.1 14B, 720p, 81 frames", 2),
        ("hunyuan-video", "HunyuanVideo, 720p, 129 frames", 2),
    ):
        built, video = ARCHITECTURES[name], math.prod(grid(name, {}))
        tokens = video + (built.text if built.masked else 0)  # joint attention sees the text, too
        model = built.build(device="meta")
        count = flops(model, video, built.text)
        heads, channels = heads_of(model) * sum(map(bool, count.attention)), count.head_dim or 0
        blocks = -(-tokens // 128) * -(-tokens // (64 * 8))
        rank = affordable_rank(4, 1.2 * 2**30 / heads - blocks, tokens, channels)
        residual = tokens * (rank + 2) + 4 * rank * channels
        sizes = (f"{heads * each / 2**30:.{digits}f}" for each in (residual, blocks))
        yield "docs/recipes/memory.md", f"| {' | '.join((text, str(rank), *sizes))} |"
    outputs = 4 * math.prod(grid("wan2.1-14b", {})) * 40 * 128  # bytes of a block's output in float32
    yield (
        "docs/recipes/memory.md",
        f"For Wan 14B at 720p that is {2 * outputs / 1e9:.1f} GB for each branch, where extrapolating every block "
        f"would keep {2 * 40 * outputs / 1e9:.0f} GB.",
    )
