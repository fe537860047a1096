"""benchmark_results.png: the throughput of every variant that has one, a panel for each unit."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Sequence

from examples_utils.report import VariantResult, number

logger = logging.getLogger(__name__)

LOG_SCALE_FROM = 50  # ratio of the largest to the smallest bar above which a linear scale hides the small ones


def draw_chart(path: Path, results: Sequence[VariantResult]) -> Path | None:
    """Draw to `path` and return it; None, with a line in the log, without matplotlib or without any throughput."""
    panels: dict[str, list[tuple[str, float]]] = {}
    for result in results:
        value, name = result.value("throughput"), result.variant.name
        if isinstance(value, (int, float)) and value > 0:
            unit = result.variant.benchmark.units.get("throughput") or "throughput"
            # Long names keep their end, where the parameters are.
            short = name if len(name) <= 56 else name[:16] + "..." + name[-37:]
            panels.setdefault(unit, []).append((short, value))
    if not panels:
        logger.info("no chart: no benchmark gave a throughput")
        return None
    try:
        # The object interface: pyplot would look for a display and keep the figure.
        from matplotlib.figure import Figure
    except ImportError as error:
        logger.warning("no chart: matplotlib is not installed (%s): pip install -r requirements.txt", error)
        return None
    sizes = [len(bars) for bars in panels.values()]
    figure = Figure(figsize=(10, 1.0 + 0.42 * sum(sizes) + 0.9 * len(sizes)), constrained_layout=True)
    grid = figure.subplots(len(sizes), 1, squeeze=False, gridspec_kw={"height_ratios": [size + 1 for size in sizes]})
    figure.suptitle(f"Throughput, {results[0].start:%Y-%m-%d %H:%M}", fontsize=12)
    for axes, (unit, bars) in zip(grid[:, 0], panels.items()):
        _draw_panel(axes, unit, bars)
    figure.savefig(str(path), dpi=120, bbox_inches="tight", pad_inches=0.15)
    return path


def _draw_panel(axes: Any, unit: str, bars: Sequence[tuple[str, float]]) -> None:
    names, values = zip(*bars)
    drawn = axes.barh(range(len(values)), values, color="#3a6ea5", height=0.6)
    axes.bar_label(drawn, labels=list(map(number, values)), padding=4, fontsize=9)
    axes.set_yticks(range(len(values)), labels=names, fontsize=9)
    axes.set_ylim(len(values) - 0.4, -0.6)  # the first benchmark on top
    if max(values) > LOG_SCALE_FROM * min(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 2.5)
        axes.xaxis.set_major_formatter("{x:g}")
        unit += " (logarithmic)"
    else:
        axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
