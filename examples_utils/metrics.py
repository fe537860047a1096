"""Metrics from logs: regular expressions with a reduction, derived expressions, compile time, users' functions."""
from __future__ import annotations

import ast
import logging
import math
import operator
import re
import runpy
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Iterator, Mapping, Sequence

from examples_utils.spec import Metric, Variant
from utils.errors import UserError

logger = logging.getLogger(__name__)

STREAMS = ("stdout", "stderr")  # files of a command's output
CustomMetric = Callable[[str, str, int], Any]

# Stages of a compilation as Poplar and PopART log them at level INFO, each line with its time in front.
_STAMP = r"(\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}\.\d{6}).*? "
_STAGE_BEGINS = re.compile(_STAMP + r"(?:Pop(?:lar|art) version:|Begin Poplar graph construction|Starting compilation"
                                    r"|Poplar graph initialised|Begin compiling Poplar engine)")
_STAGE_ENDS = re.compile(_STAMP + r"(?:End Poplar graph construction|Starting compilation|End compiling Poplar engine"
                                  r"|Graph compiled)")
_COMPILED = re.compile(r"Compiled model in *(\d+(?:\.\d+)?) secs")


def lines(logs: Path, *streams: str) -> Iterator[str]:
    """Lines of a command's output without their ends; a carriage return ends one too, as progress bars use it."""
    for stream in streams:
        with open(logs / stream, encoding="utf-8", errors="backslashreplace") as file:
            yield from (line.rstrip("\n") for line in file)


def collect(variant: Variant, logs: Path, compile_only: bool = False) -> None:
    """Read a variant's metrics from the files in `logs`; it fails if one has no value.

    A command that failed has none, whatever it printed before. Expressions know earlier metrics and the parameters.
    """
    problems = []
    for metric in () if compile_only else variant.benchmark.metrics:
        value = None
        try:
            if metric.expr and not variant.exitcode:
                names = {name: variant.value(name) for name in variant.results}
                value = evaluate(metric.expr, {**names, **variant.params})
            elif not variant.exitcode:
                value = _reduce(metric, logs) * (variant.num_processes if metric.name == "throughput" else 1)
        except UserError as error:
            problems.append(f"{metric.name}: {error}")
        variant.results[metric.name] = {metric.reduction_type: value}
    seconds = None if variant.exitcode else compile_seconds(logs)
    variant.results["total_compiling_time"] = {"mean": seconds}
    for name, function in _registered.items():
        out, err = ((logs / stream).read_text("utf-8", "backslashreplace") for stream in STREAMS)
        try:
            variant.results[name] = function(out, err, variant.exitcode or 0)
        except Exception as error:  # the function is the user's, and says nothing about the benchmark
            logger.error("custom metric '%s' failed: %s: %s", name, type(error).__name__, error)
    variant.reason = variant.reason or "; ".join(problems)
    variant.exitcode = variant.exitcode or int(bool(problems))


def _reduce(metric: Metric, logs: Path) -> float:
    """One value. Raises UserError that says why there is none."""
    try:
        values = [float(text) for line in lines(logs, *STREAMS) for text in re.findall(metric.regexp, line)]
    except ValueError as error:
        raise UserError(str(error)) from None
    if not values:
        raise UserError(f"no line matches '{metric.regexp}'")
    if not all(map(math.isfinite, values)):
        raise UserError("not finite in the log")
    if len(values) <= metric.skip:
        raise UserError(f"{len(values)} matches, all skipped by skip: {metric.skip}")
    # The mean ignores the worst values, which in a log of steps are those of the warm-up, as the reference does.
    kept = sorted(values, reverse=metric.name == "latency")[metric.skip:]
    return {"mean": fmean(kept), "final": values[-1], "min": min(values), "value": values[0]}[metric.reduction_type]


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate(expression: str, names: Mapping[str, Any]) -> float:
    """The value of arithmetic on floats and names, written {name} or name. Raises UserError for anything else."""
    def value(node: Any) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return float(names[node.id])
        if type(getattr(node, "op", None)) not in _OPERATORS:
            raise ValueError("only numbers, metrics, parameters, + - * / // % ** and parentheses are allowed")
        operands = [value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return float(_OPERATORS[type(node.op)](*operands))

    try:
        result = value(ast.parse(re.sub(r"\{(\w+)\}", r" \1 ", expression).strip(), mode="eval").body)
        if math.isfinite(result):
            return result
        problem = "not finite"
    except KeyError as error:
        problem = f"no metric or parameter is called {error}"
    except (ArithmeticError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        problem = str(error)  # TypeError: metrics without a value, and roots of negative numbers, which are complex
    raise UserError(f"'{expression}': {problem}")


def compile_seconds(logs: Path) -> float | None:
    """From the first stage that Poplar or PopART began to the last it ended; else what `Compiled model in` says."""
    begins, ends = ([datetime.fromisoformat(match[1]) for match in map(stage.search, lines(logs, "stderr")) if match]
                    for stage in (_STAGE_BEGINS, _STAGE_ENDS))
    if begins and ends and max(ends) > min(begins):
        return (max(ends) - min(begins)).total_seconds()
    told = map(_COMPILED.search, lines(logs, *STREAMS))
    return max((float(match[1]) for match in told if match), default=None)


_registered: dict[str, CustomMetric] = {}


def register_custom_metric(name: str, function: CustomMetric) -> None:
    """For --custom-metrics-files: add a metric, `function(stdout, stderr, exitcode)` such as {"mean": 1.5}."""
    if name in _registered:
        logger.warning("the custom metric '%s' is registered again; the last function counts", name)
    _registered[name] = function


def load_custom_metrics(files: Sequence[str]) -> None:
    """Run users' Python files, which register functions. Raises UserError naming the file."""
    _registered.clear()
    for path in map(Path, files):
        try:
            runpy.run_path(str(path))
        except Exception as error:  # the file is the user's: it may raise anything
            raise UserError(f"--custom-metrics-files: {path}: {type(error).__name__}: {error}") from error
