"""compare_peers.png: a panel for training, one for each number of images, and how cost grows.

    python benchmarks/chart.py docs/images/compare_peers.json docs/images/compare_peers.png    # from a report
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import OLD_NAMES

OURS_COLOUR, OTHER_COLOUR, LIMIT_COLOUR = "#3a6ea5", "#b8c4d0", "#c0504d"


def panels(report: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, float, bool]], float]]:
    """(title, unit, [(name, value, ours)], limit or 0) of each bar panel."""
    result = []
    machine = report["machine"]
    results = [dict(m, name=OLD_NAMES.get(m["name"], m["name"])) for m in report["results"]]
    trained = [m for m in results if m["task"].startswith("train")]
    if trained:
        bars = [(f"{m['name']}\n{m['task']}", m["images"] / m["median"]) for m in trained]
        limit = machine["fastest_gflop_per_second"] / report["gflop_per_sample"]
        result.append(("Training", "samples/s", bars, limit))
    one = report["weights_gb"] * report["num_codes"] / machine["read_gb_per_second"] + report["decode_seconds"]
    for images in sorted({m["images"] for m in results if m["task"] == "generate"}):
        sampled = [m for m in results if m["task"] == "generate" and m["images"] == images]
        bars = [(m["name"], m["median"] / images) for m in sampled]
        title = f"Sampling {images} image{'s' if images > 1 else ''}"
        result.append((title, "s per image", bars, one if images == 1 else 0.0))
    return [(t, u, [(n, v, n.startswith("Mini")) for n, v in bars], limit) for t, u, bars, limit in result]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the report to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, growth = panels(report), report.get("growth") or {}
    heights = [0.5 + 0.42 * len(bars) for _, _, bars, _ in rows] + ([3.0] if growth else [])
    figure = Figure(figsize=(10, 0.8 + sum(heights) + 0.45 * len(heights)), constrained_layout=True)
    FigureCanvasAgg(figure)
    machine = report["machine"]
    figure.suptitle(
        "{} ({:.0f} M parameters), {}, {} threads, {}, {}".format(
            report["config"], report["parameters"], machine["processor"], machine["threads"], report["precision"],
            report["date"]
        ),
        fontsize=11,
    )
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for index, (title, unit, bars, limit) in enumerate(rows):
        axes = figure.add_subplot(grid[index, :])
        values = [value for _, value, _ in bars]
        colours = [OURS_COLOUR if ours else OTHER_COLOUR for _, _, ours in bars]
        drawn = axes.barh(range(len(bars)), values, color=colours, height=0.65)
        axes.bar_label(drawn, labels=[f"{value:.3g}" for value in values], padding=4, fontsize=9)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(unit, fontsize=8)
        axes.set_xlim(0, max([*values, limit]) * 1.12)
        if limit:
            axes.axvline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2)
            inside = limit > 0.8 * axes.get_xlim()[1]
            axes.annotate(
                f"limit {limit:.3g} " if inside else f" limit {limit:.3g}",
                (limit, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color=LIMIT_COLOUR,
                ha="right" if inside else "left", va="bottom",
            )
        _tidy(axes)
    for column, (axis, points) in enumerate(growth.items()):
        axes = figure.add_subplot(grid[len(rows), column])
        at = [point[axis] for point in points]
        axes.plot(at, [point["train"] for point in points], "o-", color=OURS_COLOUR, label="training, s per sample")
        seconds = [point.get("sample", point.get("draw")) for point in points]  # in older reports draw
        axes.plot(at, seconds, "s--", color=LIMIT_COLOUR, label="sampling, s per image")
        if axis == "batch":
            axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(value) for value in at], minor=False)
        axes.set_ylim(0)
        axes.set_xlabel("batch" if axis == "batch" else "codes on a side of the image", fontsize=9)
        axes.set_title("Cost and batch" if axis == "batch" else "Cost and grid", fontsize=10, loc="left")
        axes.legend(fontsize=8, frameon=False)
        _tidy(axes)
    figure.savefig(str(path), dpi=110)


def _tidy(axes: Any) -> None:
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw a report again."""
    report, picture = map(Path, sys.argv[1:])
    draw(json.loads(report.read_text(encoding="utf-8")), picture)


if __name__ == "__main__":
    main()
