"""Result files in the reference's formats (JSON, CSV, JUnit XML), the table on the terminal, and the chart."""
from __future__ import annotations

import csv
import json
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Mapping, Sequence
from xml.etree import ElementTree

from examples_utils.metrics import Results
from examples_utils.spec import Variant
from log import duration
from utils.files import atomic_write

STATUSES = PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
CSV_METRICS = ("throughput", "latency", "total_compiling_time")
ADDITIONAL_METRICS = ("test_duration", "loss", "result", "cmd", "env", "git_commit_hash")
# Metrics that the table does not show: its own columns tell the same, or they are not numbers.
NOT_IN_TABLE = {"throughput", "total_compiling_time", *ADDITIONAL_METRICS} - {"loss"}


@dataclass
class VariantResult:
    """A variant and its outcome. `reason` says why it failed or was skipped; a skipped one has no exit status.

    env: the whole environment of the command; added: variables that the runner and the entry set.
    """

    variant: Variant
    status: str
    reason: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=dict)
    exitcode: int | None = None
    start: datetime = field(default_factory=datetime.now)
    seconds: float = 0.0
    log_folder: Path | None = None
    checkpoint: Path | None = None
    sdk: Path | None = None

    def value(self, metric: str) -> Any:
        """The value of a metric whatever its reduction; None: there is none."""
        found = self.results.get(metric)
        return next(iter(found.values()), None) if isinstance(found, dict) else found

    @property
    def throughput(self) -> tuple[Any, str]:
        """The value and its unit, or an empty text."""
        return self.value("throughput"), self.variant.benchmark.units.get("throughput", "")

    def to_dict(self) -> dict[str, Any]:
        """The record of the JSON files: the reference's keys, and `status` and `reason`."""
        logs = {name[3:]: str(self.log_folder / name) for name in ("stdout", "stderr") if self.log_folder}
        return {
            "benchmark_path": str(self.variant.benchmark.spec_path), "benchmark_name": self.variant.benchmark.name,
            "variant_name": self.variant.name, "params": dict(self.variant.params), "command": self.variant.text,
            "results": self.results, "exitcode": self.exitcode, "status": self.status, "reason": self.reason,
            "start_time": str(self.start), "end_time": str(self.start + timedelta(seconds=self.seconds)),
            "compilation_end_time": str(self.value("total_compiling_time")), "test_duration": str(self.seconds),
            "log_paths": logs, "latest_checkpoint_path": str(self.checkpoint),
            "sdk_path": str(self.sdk), "sdk_version": str(self.sdk and self.sdk.name),
        }


def write_json(path: Path, content: Any) -> None:
    """Write JSON; what users' metric functions return and JSON cannot hold becomes text."""
    with atomic_write(path) as file:
        json.dump(content, file, sort_keys=True, indent=2, default=str)
        file.write("\n")


def save_results(folder: Path, results: Sequence[VariantResult], columns: Sequence[str]) -> None:
    """Write benchmark_results.json, .csv (with these metrics) and .xml."""
    records: dict[str, list[dict[str, Any]]] = {}
    counts, columns = Counter(result.status for result in results), list(dict.fromkeys(columns))
    suites, rows = ElementTree.Element("testsuites"), [["benchmark name", "Variant name", *columns]]
    suite = ElementTree.SubElement(suites, "testsuite", name="benchmarks", tests=str(len(results)),
                                   failures=str(counts[FAILED]), skipped=str(counts[SKIPPED]))
    for result in results:
        benchmark, name = result.variant.benchmark.name, result.variant.name
        records.setdefault(benchmark, []).append(result.to_dict())
        rows.append([benchmark, name, *map(result.value, columns)])
        case = ElementTree.SubElement(suite, "testcase", name=benchmark, classname=name, time=f"{result.seconds:.3f}")
        if result.status != PASSED:  # XML cannot hold control characters
            tag = "failure" if result.status == FAILED else "skipped"
            ElementTree.SubElement(case, tag, message=re.sub(r"[\x00-\x1f\x7f]", " ", result.reason))
    write_json(folder / "benchmark_results.json", records)
    with atomic_write(folder / "benchmark_results.csv") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    with atomic_write(folder / "benchmark_results.xml", "wb") as file:
        ElementTree.ElementTree(suites).write(file, encoding="utf-8", xml_declaration=True)


def table(results: Sequence[VariantResult], width: int = 120) -> str:
    """One line a variant: name, status, time, throughput, other metrics; below it the reason why there are none.

    Columns of metrics that do not fit into `width` characters are skipped: the files have them all.
    """
    metrics = list(dict.fromkeys(name for result in results for name in result.results if name not in NOT_IN_TABLE))
    rows = [["benchmark", "result", "time", "throughput", *metrics]]
    for result in results:
        rows.append([result.variant.name, result.status, duration(result.seconds) if result.log_folder else "-"])
        if result.status == PASSED:
            value, unit = result.throughput
            rows[-1] += [f"{number(value)} {unit}".strip(), *(number(result.value(metric)) for metric in metrics)]
    sizes = [max(len(row[index]) for row in rows if index < len(row)) for index in range(len(rows[0]))]
    while len(sizes) > 4 and sum(sizes) + 2 * (len(sizes) - 1) > width:
        sizes.pop()
    rows.insert(1, ["-" * size for size in sizes])
    lines = []
    for row, reason in zip(rows, ["", "", *(result.reason for result in results)]):
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


def summary(results: Sequence[VariantResult]) -> str:
    """For instance `2 passed, 1 failed, 7 skipped`."""
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status] or status == PASSED)


def draw_chart(path: Path, results: Sequence[VariantResult]) -> bool:
    """Draw the throughput of every variant that has one to `path`, a panel for each unit. False: none has one."""
    panels: dict[str, dict[str, float]] = {}
    for result in results:
        value, unit = result.throughput
        if isinstance(value, (int, float)) and value > 0:
            panels.setdefault(unit or "throughput", {})[textwrap.fill(result.variant.name, 56)] = value
    if not panels:
        return False
    from matplotlib.figure import Figure  # pyplot would look for a display and keep the figure

    sizes = [len(bars) + 1 for bars in panels.values()]
    figure = Figure(figsize=(10, 1.0 + 0.42 * sum(sizes) + 0.48 * len(sizes)), constrained_layout=True)
    figure.suptitle(f"Throughput, {results[0].start:%Y-%m-%d %H:%M}")
    grid = figure.subplots(len(sizes), squeeze=False, gridspec_kw={"height_ratios": sizes})
    for axes, (unit, bars) in zip(grid[:, 0], panels.items()):
        drawn = axes.barh(list(bars), list(bars.values()))
        axes.bar_label(drawn, labels=map(number, bars.values()), padding=4)  # bars may be too small to see
        axes.invert_yaxis()  # the first benchmark on top
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
    figure.savefig(str(path), dpi=120)
    return True
