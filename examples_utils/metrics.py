"""Numbers out of logs: regular expressions with a reduction, derived expressions, compile time, users' functions."""

import ast
import importlib.util
import logging
import math
import operator
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

from examples_utils.spec import Derived, Metric
from utils.errors import UserError

logger = logging.getLogger(__name__)

Results = Dict[str, Any]  # metric -> {reduction: value or None}
MetricFunction = Callable[[str, str, int], Any]

_registered: Dict[str, MetricFunction] = {}

# Stages of a compilation as Poplar and PopART log them at level INFO, each line with its time in front.
_STAMP = r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}:\d{2}\.\d{6}).*? "
_STAGE_BEGINS = re.compile(_STAMP + r"(?:Pop(?:lar|art) version:|Begin Poplar graph construction|Starting compilation"
                                    r"|Poplar graph initialised|Begin compiling Poplar engine)")
_STAGE_ENDS = re.compile(_STAMP + r"(?:End Poplar graph construction|Starting compilation|End compiling Poplar engine"
                                  r"|Graph compiled)")
_COMPILED = re.compile(r"Compiled model in *(\d+(?:\.\d+)?) secs")


# Metrics of the spec -------------------------------------------------------------------------------------------------


def extract(metrics: Sequence[Metric], stdout: Path, stderr: Path, num_processes: int = 1) -> Tuple[Results, List[str]]:
    """Match each metric line by line, stdout first, then stderr, and reduce what it captured.

    num_processes: factor on `throughput`, for commands (mpirun) whose processes log their own share only.
    Returns the results and, one sentence each, why a metric has no value.
    """
    found: Dict[str, List[str]] = {metric.name: [] for metric in metrics}
    for path in (stdout, stderr):
        for line in lines(path):
            for metric in metrics:
                found[metric.name] += metric.regexp.findall(line)
    results: Results = {}
    problems = []
    for metric in metrics:
        value, problem = _reduce(metric, found[metric.name])
        if value is not None and metric.name == "throughput":
            value *= num_processes
        results[metric.name] = {metric.reduction: value}
        if problem:
            problems.append(problem)
    return results, problems


def lines(path: Path) -> Iterable[str]:
    """Lines of a log without their ends; a carriage return ends one too, as progress bars use it."""
    with open(str(path), encoding="utf-8", errors="backslashreplace") as file:
        for line in file:
            yield line.rstrip("\n")


def _reduce(metric: Metric, texts: Sequence[str]) -> Tuple[Optional[float], Optional[str]]:
    """One value, or why there is none."""
    values = []
    for text in texts:
        try:
            values.append(float(text))
        except ValueError:
            return None, "{}: '{}' is no number".format(metric.name, text[:40])
    if not all(math.isfinite(value) for value in values):
        return None, "{} is not finite in the log".format(metric.name)
    if not values:
        return None, "{}: no line matches '{}'".format(metric.name, metric.regexp.pattern)
    if len(values) <= metric.skip:
        return None, "{}: {} matches, which skip: {} leaves out".format(metric.name, len(values), metric.skip)
    if metric.reduction == "final":
        return values[-1], None
    if metric.reduction == "min":
        return min(values), None
    if metric.reduction == "value":
        return values[0], None
    # The reference leaves out the worst values, which in a log of steps are those of the warm-up.
    kept = sorted(values, reverse=metric.name == "latency")[metric.skip:]
    return sum(kept) / len(kept), None


# Derived metrics -----------------------------------------------------------------------------------------------------


def derive(derived: Sequence[Derived], results: Results, params: Mapping[str, str]) -> List[str]:
    """Compute derived metrics into `results`, in their order, so that later ones may use earlier ones.

    Returns why those without a value have none.
    """
    problems = []
    for item in derived:
        known: Dict[str, Any] = {name: value for name, values in results.items() for value in values.values()}
        known.update(params)
        value: Optional[float] = None
        try:
            value = evaluate(item.expression, known)
        except UserError as error:
            problems.append("{}: {}".format(item.name, error))
        results[item.name] = {item.reduction: value}
    return problems


_BINARY: Dict[Type[ast.operator], Callable[[float, float], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}
_UNARY: Dict[Type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str, names: Mapping[str, Any]) -> float:
    """The value of an arithmetic expression: numbers, names written {name} or name, + - * / // % ** and parentheses.

    Nothing else is evaluated. All arithmetic is in floating point. Raises UserError.
    """
    try:
        tree = ast.parse(re.sub(r"\{(\w+)\}", r" \1 ", expression).strip(), mode="eval")
        value = _value(tree.body, names)
    except (SyntaxError, RecursionError, MemoryError):
        raise UserError("'{}' is no arithmetic expression".format(expression)) from None
    except (ArithmeticError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("'{}': {}".format(expression, error)) from None
    if not math.isfinite(value):
        raise UserError("'{}' is not finite".format(expression))
    return value


def _value(node: ast.AST, names: Mapping[str, Any]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise UserError("no metric or parameter is called '{}'".format(node.id))
        try:
            return float(names[node.id])
        except (TypeError, ValueError):
            raise UserError("'{}' is no number but {}".format(node.id, names[node.id])) from None
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left, names), _value(node.right, names))
        if isinstance(value, complex):  # a root of a negative number
            raise UserError("the result is no real number")
        return float(value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return float(_UNARY[type(node.op)](_value(node.operand, names)))
    raise UserError("only numbers, metrics, parameters, + - * / // % ** and parentheses are allowed")


# Compile time and users' own metrics ---------------------------------------------------------------------------------


def compile_seconds(stdout: Path, stderr: Path) -> Optional[float]:
    """From the first stage that Poplar or PopART began to the last it ended; else what `Compiled model in` says.

    None when the log tells neither. Poplar logs to stderr.
    """
    begins: List[datetime] = []
    ends: List[datetime] = []
    said: List[float] = []
    for path in (stdout, stderr):
        for line in lines(path):
            match = _COMPILED.search(line)
            if match:
                said.append(float(match.group(1)))
            for pattern, times in ((_STAGE_BEGINS, begins), (_STAGE_ENDS, ends)):
                match = pattern.search(line) if path == stderr else None
                if match:
                    times.append(datetime.strptime(" ".join(match.groups()), "%Y-%m-%d %H:%M:%S.%f"))
    if begins and ends and max(ends) > min(begins):
        return (max(ends) - min(begins)).total_seconds()
    return max(said) if said else None


def register_custom_metric(name: str, function: MetricFunction) -> None:
    """Add a metric: `function(stdout, stderr, exitcode)` gives its value, for instance {"mean": 1.5}.

    For the files that --custom-metrics-files names; they import it from `examples_utils`.
    """
    if name in _registered:
        logger.warning("the custom metric '%s' is registered again; the last function counts", name)
    _registered[name] = function


def load_custom_metrics(files: Sequence[str]) -> Dict[str, MetricFunction]:
    """Import users' Python files and return the functions they registered. Raises UserError naming the file."""
    _registered.clear()
    for text in files:
        path = Path(text).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, str(path))
        if not path.is_file() or spec is None or spec.loader is None:
            raise UserError("--custom-metrics-files: {} is no Python file".format(path))
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:  # the file is the user's: whatever it raises is for him to see
            raise UserError("--custom-metrics-files: {}: {}: {}".format(path, type(error).__name__, error)) from error
    return dict(_registered)


def apply_custom_metrics(functions: Mapping[str, MetricFunction], results: Results, stdout: Path, stderr: Path,
                         exitcode: int) -> None:
    """Call users' functions on the whole output. One that fails is logged, as it says nothing about the benchmark."""
    if not functions:
        return
    texts = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in (stdout, stderr)]
    for name, function in functions.items():
        try:
            results[name] = function(texts[0], texts[1], exitcode)
        except Exception as error:  # the function is the user's
            logger.error("custom metric '%s' failed: %s: %s", name, type(error).__name__, error)
