"""--plan: what each IPU would hold, as a table and a chart, without IPU, SDK, data or weights.

python train.py --config L16 --plan          # the configured division of layers
python train.py --config L16 --plan auto     # and the best one
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from args import Config
from engines.ipu import plan, plan_costs
from engines.ipu.plan import LAYER, Placement
from engines.ipu.plan_costs import IPU_MEMORY, IpuCost, PartCost
from models.building import shapes_only
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN
from models.vqgan_config import VqganConfig

#: The parts of an IPU's memory, in the order of table and chart.
MEMORY = ("weights", "gradients", "optimizer", "stored", "working")
NOTE = """\
Estimates, in MB of 10^6 bytes for one micro-batch; FLOPs for one sample: multiplications and additions of matmuls and
convolutions, forward, backward, and forward again where activations are recomputed. stored: activations stored for the
backward pass; working: those alive while the largest part is computed. Not counted: program code, exchange buffers,
scratch memory of operators (--matmul-proportion); leave a third of the {:.0f} MB free for them."""

CODES_AHEAD = "images are encoded in advance, on the host: no VQGAN on the IPUs; with --cache-codes off it is on IPU 0"
IMAGES_ON_IPU = "images are encoded in each step, by the VQGAN on IPU 0"


class Division(NamedTuple):
    """One way to divide the layers, and its cost."""

    name: str
    config: Config
    placements: list[Placement]
    ipus: list[IpuCost]


def divisions(config: Config, model: DalleConfig, vqgan: VqganConfig) -> list[Division]:
    """Return the configured division if it is valid, and with --plan auto the best one."""
    ipus, depth = config.ipu.ipus_per_replica, model.depth
    given = config
    possible = len(config.ipu.layers_per_ipu) == ipus and sum(config.ipu.layers_per_ipu) == depth
    if not possible:  # any division will do to measure the parts
        given = config.replace(layers_per_ipu=[depth] + [0] * (ipus - 1))
    parts = measured(given, model, vqgan)
    found = []
    if possible:
        ipus = plan_costs.ipu_costs(given, parts)
        found.append(Division("layers_per_ipu as configured", given, [part.placement for part in parts], ipus))
    if config.ipu.plan == "auto":
        best = given.replace(layers_per_ipu=list(plan_costs.divide(given, parts)))
        if found and best.ipu.layers_per_ipu == given.ipu.layers_per_ipu:
            return [found[0]._replace(name=found[0].name + ", the best division")]
        parts = plan_costs.moved(parts, best)
        ipus = plan_costs.ipu_costs(best, parts)
        found.append(Division("layers_per_ipu, best division", best, [part.placement for part in parts], ipus))
    return found


def measured(config: Config, model: DalleConfig, vqgan: VqganConfig) -> list[PartCost]:
    """Build the model on the meta device as the IPU engine would run it, and return the cost of its parts."""
    encodes_images = not config.data.keeps_codes
    with shapes_only():
        encoder = VQGAN(vqgan)
        built = TextToImage(DalleModel(model), encoder if encodes_images else None)
    del encoder.decoder, encoder.post_quant_conv  # training only encodes
    if plan.uses_half(config):
        for parameter in built.parameters():
            parameter.data = parameter.data.half()
    return plan_costs.measure(built, plan.pipeline_plan(config, encodes_images), config.model.image_size)


def describe(config: Config, model: DalleConfig, found: list[Division]) -> str:
    """Return the text of --plan: for each division a table, a summary, and problems that prevent training."""
    run, ipu = config.execution, config.ipu
    lines = [
        "{}: {} layers on {} IPU{} of {:.0f} MB, {} replica{}, micro-batch {}, {}".format(
            config.name,
            model.depth,
            ipu.ipus_per_replica,
            "s" * (ipu.ipus_per_replica > 1),
            IPU_MEMORY / 1e6,
            run.replication_factor,
            "s" * (run.replication_factor > 1),
            run.batch_size,
            "fp16" if plan.uses_half(config) else "fp32",
        ),
        CODES_AHEAD if config.data.keeps_codes else IMAGES_ON_IPU,
    ]
    for division in found:
        lines += ["", f"{division.name}: {list(division.config.ipu.layers_per_ipu)}", ""]
        lines += [*table(division), "", summary(division)]
        lines += ["problem: " + problem for problem in plan.problems(division.config, model)]
    if not found:
        lines += ["problem: " + problem for problem in plan.problems(config, model)]
    return "\n".join([*lines, "", NOTE.format(IPU_MEMORY / 1000000.0)])


def table(division: Division) -> list[str]:
    """Return the lines of a division's table: a header, then one line for each IPU."""
    total = sum(ipu.flops for ipu in division.ipus)
    rows: list[tuple[str, ...]] = [
        ("IPU", "stage", "modules", "M params", *MEMORY, "total", "of IPU", "GFLOPs", "share")
    ]
    for ipu in division.ipus:
        rows.append(
            (
                str(ipu.ipu),
                ",".join(map(str, ipu.stages)) or "-",
                modules(ipu.parts),
                f"{ipu.parameters / 1e6:.1f}",
                *[f"{value / 1e6:.1f}" for value in memory(ipu)],
                f"{ipu.memory / 1e6:.1f}",
                f"{100 * ipu.memory / IPU_MEMORY:.0f}%",
                f"{ipu.flops / 1e9:.1f}",
                f"{100 * ipu.flops / total:.0f}%",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # Words are left-aligned, numbers right-aligned.
    return [
        "  ".join(
            cell.ljust(width) if column == 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def memory(ipu: IpuCost) -> tuple[float, ...]:
    """Return the bytes of an IPU's parts of memory, in the order of MEMORY."""
    return tuple(getattr(ipu, name) for name in MEMORY)


def modules(paths: tuple[str, ...]) -> str:
    """Shorten the paths on an IPU: runs of layers are merged, positions omitted."""
    words: list[str] = []
    layers = [int(path[len(LAYER) :]) for path in paths if path.startswith(LAYER)]
    for path in paths:
        if not path.startswith(LAYER):
            words += [] if path in plan.POSITIONS else [path.replace("dalle.", "")]
        elif int(path[len(LAYER) :]) == layers[0]:
            words.append(
                f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
            )
    return " ".join(words) or "(empty)"


def summary(division: Division) -> str:
    """Return one line on the pipeline: stages, balance of the IPUs, time lost to filling and draining."""
    stages, accumulation = plan.num_stages(division.placements), division.config.execution.gradient_accumulation
    busy, idle = plan_costs.balance(division.ipus), plan.bubble(stages, accumulation)
    fullest = max(division.ipus, key=lambda ipu: ipu.memory)
    return (
        "pipeline: {} stage{}, {} micro-batch{} for each optimizer step; bubble {:.2%}, balance {:.0%} (mean / "
        "busiest), so the IPUs compute {:.0%} of the time; fullest IPU: {} with {:.0%}{}".format(
            stages,
            "s" * (stages > 1),
            accumulation,
            "es" * (accumulation > 1),
            idle,
            busy,
            busy * (1 - idle),
            fullest.ipu,
            fullest.memory / IPU_MEMORY,
            "" if fullest.memory <= IPU_MEMORY else ": IT DOES NOT FIT",
        )
    )


def draw(found: list[Division], path: Path) -> None:
    """Write a chart of the divisions: a row each, memory on the left, arithmetic on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from utils.files import atomic_write

    bars = max(len(division.ipus) for division in found)
    figure = Figure(figsize=(max(9.0, 3.0 + 1.1 * bars), 3.6 * len(found)), constrained_layout=True)
    axes = figure.subplots(len(found), 2, squeeze=False)
    colours: dict[str, str] = dict(zip(MEMORY, ("#3b6ea8", "#7aa6d6", "#c9dcf0", "#e08e45", "#f4cda5")))
    top = max([IPU_MEMORY] + [ipu.memory for division in found for ipu in division.ipus]) / 1e6
    most = max(ipu.flops for division in found for ipu in division.ipus) / 1e9
    for (left, right), division in zip(axes, found):
        labels = [
            "IPU {}\n{}".format(ipu.ipu, f"{ipu.layers} layers" if ipu.layers else "") for ipu in division.ipus
        ]
        places = range(len(labels))
        base = [0.0] * len(labels)
        for name in MEMORY:
            heights = [getattr(ipu, name) / 1e6 for ipu in division.ipus]
            left.bar(places, heights, bottom=base, color=colours[name], label=name, width=0.7)
            base = [below + height for below, height in zip(base, heights)]
        left.axhline(IPU_MEMORY / 1e6, color="#a03030", linestyle="--", linewidth=1)
        left.set_ylim(0, top * 1.08)
        left.set_ylabel("MB (dashed: one IPU)")
        left.set_title(f"{division.config.name}: {list(division.config.ipu.layers_per_ipu)}", loc="left")
        values = [ipu.flops / 1e9 for ipu in division.ipus]
        right.bar(places, values, color="#5b8c5a", width=0.7)
        right.axhline(sum(values) / len(values), color="#555555", linestyle="--", linewidth=1)
        right.set_ylim(0, most * 1.08)
        right.set_ylabel("GFLOPs of a sample (dashed: mean)")
        right.set_title(division.name + f", balance {plan_costs.balance(division.ipus):.0%}", loc="left")
        for axis in (left, right):
            axis.set_xticks(places)
            axis.set_xticklabels(labels)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize="small", ncol=3, loc="upper center", bbox_to_anchor=(0.5, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
