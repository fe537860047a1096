"""Result files in the reference's formats (JSON, CSV, JUnit XML), the table on the terminal, and the chart."""
from __future__ import annotations

import contextlib
import csv
import itertools
import re
import shutil
import sys
import textwrap
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, Sequence
from xml.etree import ElementTree

from examples_utils.machine import POPLAR
from examples_utils.metrics import STREAMS
from examples_utils.spec import FAILED, PASSED, SKIPPED, STATUSES, Variant
from log import duration
from utils.files import atomic_write, write_json

JSON: dict[str, Any] = {"sort_keys": True, "indent": 2, "default": str}  # users' metric functions may return anything
CSV_METRICS = ("throughput", "latency", "total_compiling_time")
ADDITIONAL_METRICS = ("test_duration", "loss", "result", "cmd", "env", "git_commit_hash")
# Metrics that the table does not show: its own columns tell the same, or they are not numbers.
NOT_IN_TABLE = {"throughput", "total_compiling_time", *ADDITIONAL_METRICS} - {"loss"}


def record(variant: Variant) -> dict[str, Any]:
    """The record of the JSON files: the reference's keys, and `status` and `reason`."""
    sdk = Path(variant.env[POPLAR]).resolve().parent if variant.log_folder and variant.env.get(POPLAR) else None
    logs = {name[3:]: str(variant.log_folder / name) for name in STREAMS if variant.log_folder}
    return {
        "benchmark_path": str(variant.benchmark.spec_path), "benchmark_name": variant.benchmark.name,
        "variant_name": variant.name, "params": dict(variant.params), "command": variant.text,
        "results": variant.results, "exitcode": variant.exitcode, "status": variant.status, "reason": variant.reason,
        "start_time": str(variant.start), "end_time": str(variant.start + timedelta(seconds=variant.seconds)),
        "compilation_end_time": str(variant.value("total_compiling_time")), "test_duration": str(variant.seconds),
        "log_paths": logs, "latest_checkpoint_path": str(variant.checkpoint),
        "sdk_path": str(sdk), "sdk_version": str(sdk and sdk.name),
    }


def save_results(folder: Path, variants: Sequence[Variant], columns: Sequence[str]) -> None:
    """Write benchmark_results.json, .csv (with these metrics) and .xml."""
    records: dict[str, list[dict[str, Any]]] = {}
    counts, columns = Counter(variant.status for variant in variants), list(dict.fromkeys(columns))
    suites, rows = ElementTree.Element("testsuites"), [["benchmark name", "Variant name", *columns]]
    suite = ElementTree.SubElement(suites, "testsuite", name="benchmarks", tests=str(len(variants)),
                                   failures=str(counts[FAILED]), skipped=str(counts[SKIPPED]))
    for variant in variants:
        name = variant.benchmark.name
        records.setdefault(name, []).append(record(variant))
        rows.append([name, variant.name, *map(variant.value, columns)])
        about = {"name": name, "classname": variant.name, "time": f"{variant.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", about)
        if variant.status != PASSED:  # XML cannot hold control characters
            tag = "failure" if variant.status == FAILED else "skipped"
            ElementTree.SubElement(case, tag, message=re.sub(r"[\x00-\x1f\x7f]", " ", variant.reason))
    write_json(folder / "benchmark_results.json", records, **JSON)
    with atomic_write(folder / "benchmark_results.csv") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    with atomic_write(folder / "benchmark_results.xml", "wb") as file:
        ElementTree.ElementTree(suites).write(file, encoding="utf-8", xml_declaration=True)


def table(variants: Sequence[Variant], width: int = 120) -> str:
    """One line a variant: name, status, time, throughput, other metrics; below it the reason why there are none.

    Columns of metrics that do not fit into `width` characters are skipped: the files have them all.
    """
    metrics = list(dict.fromkeys(name for variant in variants for name in variant.results if name not in NOT_IN_TABLE))
    rows = [["benchmark", "result", "time", "throughput", *metrics]]
    for variant in variants:
        rows.append([variant.name, variant.status, duration(variant.seconds) if variant.log_folder else "-"])
        if variant.status == PASSED:
            value, unit = variant.throughput
            rows[-1] += [f"{number(value)} {unit}".strip(), *(number(variant.value(metric)) for metric in metrics)]
    sizes = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    while len(sizes) > 4 and sum(sizes) + 2 * (len(sizes) - 1) > width:
        sizes.pop()
    rows.insert(1, ["-" * size for size in sizes])
    lines = []
    for row, reason in zip(rows, ["", "", *(variant.reason for variant in variants)]):
        # Names to the left, figures to the right.
        lines.append("  ".join(f"{cell:{'<' if index < 2 else '>'}{size}}"
                               for index, (cell, size) in enumerate(zip(row, sizes))))
        lines += textwrap.wrap(reason, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def number(value: Any) -> str:
    """Four digits, or - where there is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)[:20]
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def draw_chart(path: Path, variants: Sequence[Variant]) -> bool:
    """Draw the throughput of every variant that has one to `path`, a panel for each unit. False: none has one."""
    panels: dict[str, dict[str, float]] = {}
    for variant in variants:
        value, unit = variant.throughput
        if isinstance(value, (int, float)) and value > 0:
            panels.setdefault(unit or "throughput", {})[textwrap.fill(variant.name, 56)] = value
    if not panels:
        return False
    from matplotlib.figure import Figure  # pyplot would look for a display and keep the figure

    sizes = [len(bars) + 1 for bars in panels.values()]
    figure = Figure(figsize=(10, 1.0 + 0.42 * sum(sizes) + 0.48 * len(sizes)), constrained_layout=True)
    figure.suptitle(f"Throughput, {variants[0].start:%Y-%m-%d %H:%M}")
    grid = figure.subplots(len(sizes), squeeze=False, gridspec_kw={"height_ratios": sizes})
    for axes, (unit, bars) in zip(grid[:, 0], panels.items()):
        drawn = axes.barh(list(bars), list(bars.values()))
        axes.bar_label(drawn, labels=map(number, bars.values()), padding=4)  # bars may be too small to see
        axes.invert_yaxis()  # the first benchmark on top
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
    figure.savefig(str(path), dpi=120)
    return True


def show(variants: Sequence[Variant], folder: Path, seconds: float) -> None:
    """The chart, and the table on stdout and in console.log."""
    picture = folder / "benchmark_results.png"
    picture.unlink(missing_ok=True)  # of an earlier run into this folder
    counts = Counter(variant.status for variant in variants)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status] or status == PASSED)
    kinds = "json,csv,xml,png" if draw_chart(picture, variants) else "json,csv,xml"
    text = (f"\n{table(variants, shutil.get_terminal_size((120, 24)).columns)}\n\n{told} in "
            f"{duration(seconds)}; results: {folder}/benchmark_results.{{{kinds}}}\n")
    text += "nothing was run\n" if counts[SKIPPED] == len(variants) else ""
    sys.stdout.write(text)
    sys.stdout.flush()
    # log.setup has warned if there is no console.log.
    with contextlib.suppress(OSError), open(folder / "console.log", "a", encoding="utf-8") as file:
        file.write(text)
