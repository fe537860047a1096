"""Result files in the reference's formats (JSON, CSV, JUnit XML) and the table on the terminal."""

import csv
import json
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from examples_utils.metrics import Results
from examples_utils.spec import Variant
from utils.files import atomic_write

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
CSV_METRICS = ("throughput", "latency", "total_compiling_time")
ADDITIONAL_METRICS = ("test_duration", "loss", "result", "cmd", "env", "git_commit_hash")
# Metrics that the table does not show: its own columns tell the same, or they are no numbers.
NOT_IN_TABLE = ("throughput", "total_compiling_time") + ADDITIONAL_METRICS[:1] + ADDITIONAL_METRICS[2:]


@dataclass
class VariantResult:
    """What became of one variant. `reason` says why it failed or was skipped; a skipped one has no exit status."""

    variant: Variant
    status: str
    command: str = ""
    reason: str = ""
    results: Results = field(default_factory=dict)
    exitcode: Optional[int] = None
    start: datetime = field(default_factory=datetime.now)
    seconds: float = 0.0
    log_folder: Optional[Path] = None
    checkpoint: Optional[Path] = None
    sdk: Optional[Path] = None

    def value(self, metric: str) -> Any:
        """The value of a metric whatever its reduction; None: there is none."""
        found = self.results.get(metric)
        if isinstance(found, dict):
            return next(iter(found.values()), None)
        return found

    def to_dict(self) -> Dict[str, Any]:
        """The record of the JSON files: the reference's keys, and `status` and `reason`."""
        compiled = self.results.get("total_compiling_time", {}).get("mean")
        logs = {"out": self.log_folder / "stdout", "err": self.log_folder / "stderr"} if self.log_folder else {}
        return {
            "benchmark_path": str(self.variant.benchmark.spec_path),
            "benchmark_name": self.variant.benchmark.name,
            "variant_name": self.variant.name,
            "params": dict(self.variant.params),
            "command": self.command,
            "results": self.results,
            "start_time": str(self.start),
            "end_time": str(self.start + timedelta(seconds=self.seconds)),
            "compilation_end_time": str(compiled),
            "test_duration": str(self.seconds),
            "exitcode": self.exitcode,
            "log_paths": {key: str(path) for key, path in logs.items()},
            "latest_checkpoint_path": str(self.checkpoint),
            "sdk_path": str(self.sdk),
            "sdk_version": str(self.sdk.name if self.sdk else None),
            "status": self.status,
            "reason": self.reason,
        }


# Files ---------------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Write JSON; what users' metric functions return and JSON cannot hold becomes text."""
    with atomic_write(path) as file:
        json.dump(content, file, sort_keys=True, indent=2, default=str)
        file.write("\n")


def save_results(folder: Path, results: Sequence[VariantResult], additional: bool = False,
                 extra_metrics: Sequence[str] = ()) -> None:
    """Write benchmark_results.json, .csv and .xml.

    additional: more CSV columns; extra_metrics: CSV columns of the user's choice.
    """
    by_benchmark: Dict[str, List[Dict[str, Any]]] = {}
    for result in results:
        by_benchmark.setdefault(result.variant.benchmark.name, []).append(result.to_dict())
    write_json(folder / "benchmark_results.json", by_benchmark)

    columns = CSV_METRICS + (ADDITIONAL_METRICS if additional else ()) + tuple(extra_metrics)
    columns = tuple(dict.fromkeys(columns))
    with atomic_write(folder / "benchmark_results.csv") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(("benchmark name", "Variant name") + columns)
        for result in results:
            writer.writerow([result.variant.benchmark.name, result.variant.name] + list(map(result.value, columns)))

    with atomic_write(folder / "benchmark_results.xml", "wb") as file:
        ElementTree.ElementTree(_junit(results)).write(file, encoding="utf-8", xml_declaration=True)


def _junit(results: Sequence[VariantResult]) -> ElementTree.Element:
    root = ElementTree.Element("testsuites")
    counts = {status: str(sum(result.status == status for result in results)) for status in (FAILED, SKIPPED)}
    suite = ElementTree.SubElement(root, "testsuite", name="benchmarks", tests=str(len(results)),
                                   failures=counts[FAILED], skipped=counts[SKIPPED])
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", name=result.variant.benchmark.name,
                                      classname=result.variant.name, time="{:.3f}".format(result.seconds))
        if result.status != PASSED:
            tag = "failure" if result.status == FAILED else "skipped"
            ElementTree.SubElement(case, tag, message=_printable(result.reason))
    return root


def _printable(text: str) -> str:
    """XML cannot hold control characters, which the output of a command may."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# Table ---------------------------------------------------------------------------------------------------------------


def table(results: Sequence[VariantResult], width: int = 120) -> str:
    """One line a variant: name, status, throughput, other metrics, time; in place of the figures why there are none.

    Columns of metrics that do not fit into `width` characters are left out: the files have them all.
    """
    metrics = list(dict.fromkeys(name for result in results for name in result.results if name not in NOT_IN_TABLE))
    header = ["benchmark", "result", "time", "throughput"] + metrics
    rows = []
    for result in results:
        row = [result.variant.name, result.status]
        row += [duration(result.seconds) if result.log_folder else "-", _throughput(result)]
        rows.append(row + [number(result.value(metric)) for metric in metrics])
    columns = [max(len(row[index]) for row in [header] + [row for row, result in zip(rows, results)
                                                          if index < 3 or result.status == PASSED])
               for index in range(len(header))]
    while len(columns) > 4 and sum(columns) + 2 * (len(columns) - 1) > width:
        columns.pop()
    lines = [_row(header, columns), "  ".join("-" * size for size in columns)]
    for row, result in zip(rows, results):
        if result.status == PASSED:
            lines.append(_row(row, columns))
        else:
            lines += _with_reason(row, columns, 2 if result.log_folder is None else 3, result.reason, width)
    return "\n".join(lines)


def _row(cells: Sequence[str], columns: Sequence[int]) -> str:
    """Names to the left, figures to the right."""
    parts = [cell.ljust(size) if index < 2 else cell.rjust(size)
             for index, (cell, size) in enumerate(zip(cells, columns))]
    return "  ".join(parts).rstrip()


def _with_reason(row: Sequence[str], columns: Sequence[int], num_cells: int, reason: str, width: int) -> List[str]:
    """Name, status and (of what ran) time, then the reason over the rest of the line, or below where that is narrow."""
    begin = _row(row[:num_cells], columns[:num_cells]).ljust(sum(columns[:num_cells]) + 2 * (num_cells - 1)) + "  "
    indent = len(begin)
    if width - indent < 30:
        return [begin.rstrip()] + textwrap.wrap(reason, max(width, 20), initial_indent="    ", subsequent_indent="    ")
    return textwrap.wrap(reason, width, initial_indent=begin, subsequent_indent=" " * indent,
                         break_long_words=False, break_on_hyphens=False) or [begin.rstrip()]


def _throughput(result: VariantResult) -> str:
    unit = result.variant.benchmark.units.get("throughput")
    value = result.value("throughput")
    return number(value) if value is None or not unit else "{} {}".format(number(value), unit)


def number(value: Any) -> str:
    """Four digits, or - where there is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)[:20]
    return "{:.0f}".format(value) if abs(value) >= 1000 else "{:.4g}".format(value)


def duration(seconds: float) -> str:
    """1:02:03, 2:03 or 4.5 s."""
    if seconds < 60:
        return "{:.1f} s".format(seconds)
    minutes, rest = divmod(int(round(seconds)), 60)
    return "{}:{:02d}".format(minutes, rest) if minutes < 60 else "{}:{:02d}:{:02d}".format(
        minutes // 60, minutes % 60, rest)


def summary(results: Sequence[VariantResult]) -> str:
    """For instance `2 passed, 1 failed, 7 skipped`."""
    counts: Mapping[str, int] = {status: sum(result.status == status for result in results)
                                 for status in (PASSED, FAILED, SKIPPED)}
    return ", ".join("{} {}".format(count, status) for status, count in counts.items() if count or status == PASSED)
