"""`diffsparse inspect`: pictures and numbers of what attention looks like, and of what a strategy makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse_pipelines import options
from diffsparse_pipelines.prompts import read_prompts

if TYPE_CHECKING:
    from diffsparse.insight.inspection import Inspector, LayerView

Row = dict[str, Any]
FILES = ("inspect.json", "recall.csv", "recall.png", "orders.png")  # and maps-*.png, one a layer


def inspect(
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures, inspect.json and recall.csv.", callback=options.file)
    ],
    strategy: options.Strategy = "adaspa",
    sparsity: options.Sparsity = None,
    orders: Annotated[
        str,
        typer.Option(
            help="Candidate token orders, separated by commas: FHW, ..., tile4x8x8, hilbert.", callback=options.text
        ),
    ] = "FHW,FWH,HFW,HWF,WFH,WHF",
    layers: Annotated[
        str, typer.Option(help="Self-attention layers, by number from 0, separated by commas.", show_default="all")
    ] = "",
    looks: Annotated[
        int,
        typer.Option(help="Steps at which to look, evenly spread.", callback=options.whole(1, options.MOST_COUNT)),
    ] = 3,
    prompts: options.Prompts = "1",
    seed: options.Seed = 0,
    model: options.Model = "tiny",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    vae_tiling: options.VaeTiling = False,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.NumFrames = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    block: options.Block = None,
    order: options.Order = None,
    searches: options.Searches = None,
    head_adaptive: options.HeadAdaptive = None,
    recall_threshold: options.RecallThreshold = None,
    dense_first: options.DenseFirst = "0.2",
    dense_last: options.DenseLast = "0",
    dense_layers: options.DenseLayers = "",
) -> None:
    """Draw attention mass, the blocks that a strategy computes, and recall by layer and head, in several token orders.

    Recall is the softmax mass inside the blocks that are kept. "raster" and "best" ask what the best blocks of each
    row could hold, before and after reordering; "chosen" is what the strategy's own blocks do hold.
    """
    from diffsparse_pipelines.preflight import admit

    knobs = {
        "sparsity": sparsity,
        "block": block,
        "order": order,
        "searches": options.searches(searches),
        "head_adaptive": head_adaptive,
        "recall_threshold": recall_threshold,
    }
    chosen = options.sampling(steps, height, width, frames, guidance_scale, negative_prompt)
    plan = options.schedule(dense_first, dense_last, dense_layers)
    numbers = options.amounts(layers, "--layers")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ConfigError(f"--layers wants whole numbers from 0, separated by commas; got {layers!r}")
    candidates = options.names(orders)
    settings = {"orders": candidates, "layers": numbers or None}
    made = _strategy(strategy, knobs)
    settings |= _measure(made, knobs)
    loading = {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}
    texts = read_prompts(prompts, model)
    admit(model, chosen, texts, device=device, dtype=dtype, offload=offload)
    _inspect(model, made, settings, looks, texts, seed, chosen, plan, loading, out)


def _inspect(
    model: str,
    strategy: Any,
    settings: dict[str, Any],
    looks: int,
    texts: tuple[str, ...],
    seed: int,
    chosen: dict[str, Any],
    plan: Any,
    loading: dict[str, Any],
    out: Path,
) -> None:
    import diffsparse
    from diffsparse import Dense, Schedule
    from diffsparse.files import if_stopped, writable
    from diffsparse.insight.inspection import Inspector
    from diffsparse.insight.inspection import looks as steps_to_look_at
    from diffsparse_eval.experiment import label
    from diffsparse_pipelines import families
    from diffsparse_pipelines.generation import call_arguments, generation
    from diffsparse_pipelines.preflight import argument, check
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    schedule = Schedule(0) if strategy == Dense() else plan
    for name in FILES:
        writable(out / name)
    with console.status(f"loading {model}"):
        pipe = families.load(model, **loading)
    arguments = call_arguments(pipe, families.defaults(model), chosen)
    check(pipe, arguments, schedule)
    count = argument(pipe, arguments, "num_inference_steps")
    if count is None:
        raise ConfigError(f"{type(pipe).__name__} has no number of steps of its own; say --steps")
    steps = steps_to_look_at(strategy, schedule, count, looks)
    inspector = Inspector(strategy, steps, **settings)
    with diffsparse.apply(pipe, inspector, schedule=schedule), bar(console) as progress:
        task = progress.add_task("runs", total=len(texts))
        for text in texts:
            generation(pipe, {**arguments, "prompt": text}, seed, progress)
            progress.advance(task)
    views = _found(inspector)
    facts = {
        "model": model,
        "label": label(strategy),
        "strategy": repr(strategy),
        "schedule": repr(schedule),
        "sparsity": inspector.sparsity,
        "block": inspector.block,
        "layout": str(inspector.sums.layout),
        "looks": sorted(step + 1 for step in steps),
        "prompts": list(texts),
        "seed": seed,
    }
    with console.status("drawing"), if_stopped(lambda: f"what is drawn so far is in {out}"):
        write(views, facts, out)
    console.print(table(views))
    console.print(_legend(facts), highlight=False)
    console.print(f"maps, recall.png, orders.png, inspect.json and recall.csv are in {out}", soft_wrap=True)


def _strategy(name: str, knobs: dict[str, Any]) -> Any:
    """The one strategy of that name; "dense" has neither sparsity nor block: there both say how to measure."""
    beside = {"sparsity": None, "block": None} if name.strip().lower() == "dense" else {}
    knobs = {**knobs, **beside}
    strategies = options.strategies(name, [knobs["sparsity"]], knobs)
    if len(strategies) != 1:
        raise ConfigError(f"inspect wants one strategy; got {name!r}")
    return strategies[0]


def _measure(strategy: Any, knobs: dict[str, Any]) -> dict[str, Any]:
    """Sparsity and block at which recall is measured: the strategy's own, where it has them, else those given."""
    plan = getattr(strategy, "plan", None)
    own = {name: getattr(strategy, name, None) for name in ("sparsity", "block")}
    own["block"] = plan.settings.get("block") if plan else own["block"]
    chosen = {name: value or knobs[name] for name, value in own.items()}
    return {name: value for name, value in chosen.items() if value is not None}


def _found(inspector: Inspector) -> list[LayerView]:
    views = inspector.views()
    if views:
        return views
    if inspector.seen:
        raise ConfigError(
            f"--layers wants some of 0 to {len(inspector.seen) - 1}; got {', '.join(map(str, inspector.layers or ()))}"
        )
    raise ConfigError("the run held no self-attention that the strategy had a say in; look at more steps")


def rows(views: list[LayerView]) -> list[Row]:
    """One row for each head of each layer."""
    return [row for view in views for row in _head_rows(view)]


def _head_rows(view: LayerView) -> list[Row]:
    return [
        {
            "model": view.model,
            "layer": view.layer,
            "number": view.number,
            "head": head,
            "raster_recall": view.raster[head].item(),
            "best_recall": view.recall[:, head].max().item(),
            "best_order": view.best[head],
            "own_order": view.own_orders[head],
            "chosen_recall": None if view.chosen is None else view.chosen[head].item(),
            "chosen_density": None if view.density is None else view.density[head].item(),
            **{f"recall_{order}": view.recall[i, head].item() for i, order in enumerate(view.orders)},
        }
        for head in range(len(view.best))
    ]


def write(views: list[LayerView], facts: dict[str, Any], out: Path) -> None:
    """Write pictures, `inspect.json` and `recall.csv` into `out`, each whole or not at all."""
    from diffsparse.files import write_csv, write_json
    from diffsparse_eval import charts

    found = rows(views)
    write_json({**facts, "rows": found}, out / "inspect.json")
    write_csv(found, out / "recall.csv")
    charts.save(charts.recall(views, facts), out / "recall.png")
    charts.save(charts.orders(views, facts), out / "orders.png")
    for view in views:
        charts.save(charts.maps(view, facts), out / f"maps-{view.number:02}-{view.model}.{view.layer}.png")


def table(views: list[LayerView]) -> Any:
    """Recall of each layer, mean over its heads, and the best order of each head."""
    from rich import box
    from rich.table import Table

    shown = Table(title="recall, mean over heads", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    shown.add_column("layer", no_wrap=True)
    for name in ("raster", "best order", "chosen", "density"):
        shown.add_column(name, justify="right")
    shown.add_column("best order of each head, and its recall")
    for view in views:
        best = view.recall.amax(0)
        heads = "  ".join(f"{name} {value:.2f}" for name, value in zip(view.best, best.tolist(), strict=True))
        means = (view.raster, best, view.chosen, view.density)
        figures = ("-" if x is None else f"{x.mean():.3f}" for x in means)
        shown.add_row(f"{view.number} {view.layer}", *figures, heads)
    return shown


def _legend(facts: dict[str, Any]) -> str:
    return (
        f"{facts['model']}, {facts['strategy']}; {facts['layout']}; steps {', '.join(map(str, facts['looks']))}; "
        f"raster and best order: the best blocks of each row at {facts['sparsity']:.0%} sparsity; chosen: the "
        "strategy's own blocks"
    )
