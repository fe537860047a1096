"""benchmark_results.png: the throughput of every variant that has one, a panel for each unit."""

import logging
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from examples_utils.report import VariantResult, number

logger = logging.getLogger(__name__)

COLOUR = "#3a6ea5"
LOG_SCALE_FROM = 50  # ratio of the largest to the smallest bar above which a linear scale hides the small ones


def draw_chart(path: Path, results: Sequence[VariantResult]) -> Optional[Path]:
    """Draw to `path` and return it; None, with a line in the log, without matplotlib or without any throughput."""
    panels: Dict[str, List[VariantResult]] = {}
    for result in results:
        value = result.value("throughput")
        if isinstance(value, (int, float)) and value > 0:
            unit = result.variant.benchmark.units.get("throughput", "")
            panels.setdefault(unit or "throughput", []).append(result)
    if not panels:
        logger.info("no chart: no benchmark gave a throughput")
        return None
    try:
        # The object interface: pyplot would look for a display and keep the figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        logger.warning("no chart: matplotlib is not installed (%s): pip install -r requirements.txt", error)
        return None
    sizes = [len(members) for members in panels.values()]
    figure = Figure(figsize=(10, 1.0 + 0.42 * sum(sizes) + 0.9 * len(sizes)), constrained_layout=True)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sizes), 1, squeeze=False, gridspec_kw={"height_ratios": [size + 1 for size in sizes]})
    figure.suptitle("Throughput, {:%Y-%m-%d %H:%M}".format(results[0].start), fontsize=12)
    for axes, (unit, members) in zip(grid[:, 0], panels.items()):
        values = [float(member.value("throughput")) for member in members]
        names = [_short(member.variant.name) for member in members]
        logarithmic = max(values) > LOG_SCALE_FROM * min(values)
        bars = axes.barh(range(len(values)), values, color=COLOUR, height=0.6)
        axes.bar_label(bars, labels=[number(value) for value in values], padding=4, fontsize=9)
        axes.set_yticks(range(len(values)))
        axes.set_yticklabels(names, fontsize=9)
        axes.set_ylim(len(values) - 0.4, -0.6)  # the first benchmark on top
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 2, max(values) * 2.5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "{:g}".format(value)))
        else:
            axes.set_xlim(0, max(values) * 1.15)
        axes.set_xlabel(unit + (" (logarithmic)" if logarithmic else ""), fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(str(path), dpi=120, bbox_inches="tight", pad_inches=0.15)
    return path


def _short(name: str, length: int = 56) -> str:
    """Long names keep their end, where the parameters are."""
    return name if len(name) <= length else name[:16] + "..." + name[-(length - 19):]
