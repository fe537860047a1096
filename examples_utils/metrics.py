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
from typing import Any, Callable, Dict, Iterator, Mapping, Sequence

from examples_utils.spec import Metric
from utils.errors import UserError

logger = logging.getLogger(__name__)

Results = Dict[str, Any]  # metric -> {reduction: value or None}
CustomMetric = Callable[[str, str, int], Any]

# Stages of a compilation as Poplar and PopART log them at level INFO, each line with its time in front.
_STAMP = r"(\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}\.\d{6}).*? "
_STAGE_BEGINS = re.compile(_STAMP + r"(?:Pop(?:lar|art) version:|Begin Poplar graph construction|Starting compilation"
                                    r"|Poplar graph initialised|Begin compiling Poplar engine)")
_STAGE_ENDS = re.compile(_STAMP + r"(?:End Poplar graph construction|Starting compilation|End compiling Poplar engine"
                                  r"|Graph compiled)")
_COMPILED = re.compile(r"Compiled model in *(\d+(?:\.\d+)?) secs")


def lines(*paths: Path) -> Iterator[str]:
    """Lines of logs without their ends; a carriage return ends one too, as progress bars use it."""
    for path in paths:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            yield from (line.rstrip("\n") for line in file)


def extract(metrics: Sequence[Metric], logs: Path, params: Mapping[str, str],
            num_processes: int = 1) -> tuple[Results, list[str]]:
    """Match each metric in the lines of `logs`, a folder, and reduce what it captured, or compute its expression, in
    which earlier metrics and `params` have values.

    num_processes: factor on `throughput`, for commands (mpirun) whose processes log their own share only.
    Returns the results and, one sentence each, why a metric has no value.
    """
    found: dict[str, list[str]] = {metric.name: [] for metric in metrics}
    for line in lines(logs / "stdout", logs / "stderr"):
        for metric in metrics:
            found[metric.name] += [] if metric.expr else re.findall(metric.regexp, line)
    results: Results = {}
    problems = []
    for metric in metrics:
        names = {name: value for name, values in results.items() for value in values.values()}
        results[metric.name] = {metric.reduction_type: None}
        try:
            value = evaluate(metric.expr, {**names, **params}) if metric.expr else _reduce(metric, found[metric.name])
            factor = num_processes if metric.name == "throughput" and not metric.expr else 1
            results[metric.name] = {metric.reduction_type: value * factor}
        except UserError as error:
            problems.append(f"{metric.name}: {error}")
    return results, problems


def _reduce(metric: Metric, texts: Sequence[str]) -> float:
    """One value. Raises UserError that says why there is none."""
    try:
        values = [float(text) for text in texts]
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
    """The value of an arithmetic expression: numbers, names written {name} or name, + - * / // % ** and parentheses.

    Nothing else is evaluated. All arithmetic is in floating point. Raises UserError.
    """
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
    """From the first stage that Poplar or PopART began to the last it ended; else what `Compiled model in` says.

    None when the log tells neither. Poplar logs to stderr.
    """
    begins, ends = ([datetime.fromisoformat(match[1]) for match in map(stage.search, lines(logs / "stderr")) if match]
                    for stage in (_STAGE_BEGINS, _STAGE_ENDS))
    if begins and ends and max(ends) > min(begins):
        return (max(ends) - min(begins)).total_seconds()
    told = map(_COMPILED.search, lines(logs / "stdout", logs / "stderr"))
    return max((float(match[1]) for match in told if match), default=None)


_registered: dict[str, CustomMetric] = {}


def register_custom_metric(name: str, function: CustomMetric) -> None:
    """Add a metric: `function(stdout, stderr, exitcode)` gives its value, for instance {"mean": 1.5}.

    For the files that --custom-metrics-files names; they import it from `examples_utils`.
    """
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


def apply_custom_metrics(results: Results, logs: Path, exitcode: int) -> None:
    """Call users' functions on the whole output. One that fails is logged, as it says nothing about the benchmark."""
    for name, function in _registered.items():
        out, err = ((logs / stream).read_text("utf-8", "backslashreplace") for stream in ("stdout", "stderr"))
        try:
            results[name] = function(out, err, exitcode)
        except Exception as error:  # the function is the user's
            logger.error("custom metric '%s' failed: %s: %s", name, type(error).__name__, error)
