"""Benchmark specs: a YAML mapping of entries, read into checked `Benchmark`s, and the variants each of them stands for.

Names containing `options` hold shared parts for YAML anchors. Keys that are not known are ignored, as the reference
does; three of ours rely on that: `requires` (what the entry needs to run), `compile_only: false` (it has no such mode)
and `output` (pairs of unit and metric, used as units in the table and the chart).
"""

import itertools
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Pattern, Sequence, Tuple

from utils.errors import UserError, nearest

logger = logging.getLogger(__name__)

REDUCTIONS = ("mean", "final", "min", "value")
REQUIREMENT = re.compile(r"(ipu|cuda)(:[1-9]\d*)?|(package|program|file):.+")
KNOWN_KEYS = ("cmd", "data", "derived", "parameters", "env", "location", "timeout", "allow_wandb", "generated",
              "synthetic", "requirements_file", "requires", "compile_only", "output")


@dataclass(frozen=True)
class Metric:
    """A number read from the log: what `regexp` captures, reduced to one value."""

    name: str
    regexp: Pattern[str]
    reduction: str = "mean"  # mean | final | min | value (the first)
    skip: int = 0  # mean leaves out so many of the worst values; the others need more than so many matches


@dataclass(frozen=True)
class Derived:
    """A number computed from other metrics and the variant's parameters, which `expression` names as {name}."""

    name: str
    expression: str
    reduction: str = "mean"


@dataclass(frozen=True)
class Benchmark:
    """One checked entry of a spec file."""

    name: str
    spec_path: Path
    cmd: str
    metrics: Tuple[Metric, ...] = ()
    derived: Tuple[Derived, ...] = ()
    parameters: Tuple[Mapping[str, str], ...] = ({},)  # one mapping a variant
    env: Mapping[str, str] = field(default_factory=dict)
    location: str = ""
    timeout: Optional[float] = None  # seconds
    allow_wandb: bool = False
    needs_dataset: bool = True
    requirements_file: Optional[str] = None
    requires: Tuple[str, ...] = ()
    compile_only: bool = True
    units: Mapping[str, str] = field(default_factory=dict)  # metric -> unit

    @property
    def folder(self) -> Path:
        """Where its command runs."""
        return (self.spec_path.parent / self.location).resolve()


@dataclass(frozen=True)
class Variant:
    """A benchmark with one value for each of its parameters."""

    benchmark: Benchmark
    name: str
    params: Mapping[str, str]


def load_entries(paths: Sequence[str]) -> Dict[str, Tuple[Path, Any]]:
    """Read spec files: {entry name: (spec file, its YAML value)} in file order; of equal names the last file's counts.

    Raises UserError for a file that is missing, is not YAML or is not a mapping.
    """
    entries: Dict[str, Tuple[Path, Any]] = {}
    for text in paths:
        path = Path(text).resolve()
        for name, value in _load_yaml(path).items():
            name = str(name)
            if name in entries and "options" not in name:
                logger.warning("'%s' of %s replaces the one of %s", name, path, entries[name][0])
            entries[name] = (path, value)
    return entries


def _load_yaml(path: Path) -> Dict[Any, Any]:
    try:
        from utils.yaml_files import parse_yaml
    except ImportError:
        raise UserError("the Python package PyYAML is not installed: pip install -r requirements.txt") from None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError("--spec: cannot read {}: {}".format(path, error.strerror or error)) from None
    content = parse_yaml(text, "--spec: {} is not a YAML file".format(path))
    if not isinstance(content, dict):
        raise UserError("--spec: {} must be a YAML mapping of benchmark names to entries".format(path))
    return content


def select(entries: Mapping[str, Tuple[Path, Any]], names: Optional[Sequence[str]],
           include_convergence: bool = False) -> List[Benchmark]:
    """The benchmarks to run: the named ones in the order given, else all; `_conv` ones only when named or included."""
    if names is None:
        names = [name for name in entries
                 if "options" not in name and (include_convergence or not name.endswith("_conv"))]
    chosen = []
    for name in dict.fromkeys(names):
        if name not in entries:
            known = [entry for entry in entries if "options" not in entry]
            raise UserError("--benchmark: no '{}' in the spec.{} It has: {}".format(
                name, nearest(name, known), ", ".join(known) or "no benchmark"))
        if "options" in name:
            raise UserError("--benchmark: '{}' holds options that others share, it is no benchmark".format(name))
        chosen.append(make_benchmark(name, *entries[name]))
    if not chosen:
        raise UserError("--spec: no benchmark to run (names ending in _conv need --include-convergence or --benchmark)")
    return chosen


def make_benchmark(name: str, spec_path: Path, entry: Any) -> Benchmark:
    """Check one entry. Raises UserError naming the file, the entry and the key."""
    where = "{}: '{}'".format(spec_path.name, name)
    if not isinstance(entry, dict):
        raise UserError("{} must be a mapping with the key cmd".format(where))
    for key in entry:
        close = nearest(str(key), KNOWN_KEYS)
        if key not in KNOWN_KEYS and key != "requirements_path" and close:
            logger.warning("%s: unknown key '%s' is ignored.%s", where, key, close)
    cmd = _get(entry, "cmd", str, where, "")
    if not cmd.strip():
        hint = "; notebooks are not run here" if "notebook" in entry else ""
        raise UserError("{} has no cmd{}".format(where, hint))
    timeout = _get(entry, "timeout", (int, float), where, None)
    if timeout is not None and timeout <= 0:
        raise UserError("{}: timeout must be more than 0 seconds, not {}".format(where, timeout))
    requires = entry.get("requires") or []
    for need in requires if isinstance(requires, list) else [requires]:
        if not isinstance(need, str) or not REQUIREMENT.fullmatch(need):
            raise UserError("{}: requires: '{}' is none of ipu[:N], cuda[:N], package:NAME, program:NAME, file:PATH"
                            .format(where, need))
    # The reference decides by these parts of the name whether real data is needed.
    made_up = "gen" in name or "synth" in name
    return Benchmark(
        name=name, spec_path=spec_path, cmd=cmd,
        metrics=_metrics(_get(entry, "data", dict, where, {}), where),
        derived=_derived(_get(entry, "derived", dict, where, {}), where),
        parameters=tuple(_parameters(entry.get("parameters"), where)),
        env=_env(_get(entry, "env", dict, where, {}), where),
        location=_get(entry, "location", str, where, ""),
        timeout=timeout,
        allow_wandb=_get(entry, "allow_wandb", bool, where, False),
        needs_dataset=not (made_up or _get(entry, "generated", bool, where, False)
                           or _get(entry, "synthetic", bool, where, False)),
        requirements_file=_get(entry, "requirements_file", str, where, None),
        requires=tuple(requires) if isinstance(requires, list) else (requires,),
        compile_only=_get(entry, "compile_only", bool, where, True),
        units=_units(entry.get("output")))


def variants(benchmark: Benchmark) -> List[Variant]:
    """One variant for each set of parameters, called `name_key_value_...` with sorted keys."""
    result: List[Variant] = []
    for params in benchmark.parameters:
        name = benchmark.name + "".join("_{}_{}".format(key, params[key]) for key in sorted(params))
        if any(other.name == name for other in result):
            raise UserError("{}: '{}': parameters give the variant {} twice".format(
                benchmark.spec_path.name, benchmark.name, name))
        result.append(Variant(benchmark, name, params))
    return result


# Keys ----------------------------------------------------------------------------------------------------------------


def _get(entry: Mapping[str, Any], key: str, kind: Any, where: str, default: Any) -> Any:
    value = entry.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {str: "text", dict: "a mapping", bool: "true or false"}
        raise UserError("{}: {} must be {}, not {!r}".format(where, key, names.get(kind, "a number"), value))
    return value


def _metrics(data: Mapping[str, Any], where: str) -> Tuple[Metric, ...]:
    metrics = []
    for name, settings in data.items():
        here = "{}: data.{}".format(where, name)
        if not isinstance(settings, dict) or not isinstance(settings.get("regexp"), str):
            raise UserError("{} must be a mapping with the key regexp".format(here))
        try:
            regexp = re.compile(settings["regexp"])
        except re.error as error:
            raise UserError("{}.regexp: {}: {}".format(here, error, settings["regexp"])) from None
        if regexp.groups > 1:
            raise UserError("{}.regexp has {} groups; it must have one, (?:...) does not count".format(
                here, regexp.groups))
        skip = _get(settings, "skip", int, here, 0)
        if skip < 0:
            raise UserError("{}.skip must be 0 or more, not {}".format(here, skip))
        metrics.append(Metric(str(name), regexp, _reduction(settings, here), skip))
    return tuple(metrics)


def _derived(data: Mapping[str, Any], where: str) -> Tuple[Derived, ...]:
    result = []
    for name, settings in data.items():
        here = "{}: derived.{}".format(where, name)
        if not isinstance(settings, dict) or not isinstance(settings.get("expr"), (str, int, float)):
            raise UserError("{} must be a mapping with the key expr".format(here))
        result.append(Derived(str(name), str(settings["expr"]), _reduction(settings, here)))
    return tuple(result)


def _reduction(settings: Mapping[str, Any], where: str) -> str:
    reduction = settings.get("reduction_type", "mean")
    if reduction not in REDUCTIONS:
        raise UserError("{}.reduction_type: '{}' is none of {}.{}".format(
            where, reduction, ", ".join(REDUCTIONS), nearest(str(reduction), REDUCTIONS)))
    return str(reduction)


def _parameters(value: Any, where: str) -> List[Dict[str, str]]:
    """A header row and rows: a variant a row. A mapping of comma-separated values: their product, first key fastest."""
    if value is None:
        return [{}]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(row, list) for row in value):
        header = [str(key) for key in value[0]]
        for row in value[1:]:
            if len(row) != len(header):
                raise UserError("{}: parameters: the row {} does not fit the header {}".format(where, row, header))
        return [{key: str(item) for key, item in zip(header, row)} for row in value[1:]]
    if isinstance(value, dict) and value:
        keys = [str(key) for key in value]
        columns = [[part.strip() for part in (map(str, column) if isinstance(column, list) else str(column).split(","))]
                   for column in value.values()]
        return [dict(zip(keys, reversed(row))) for row in itertools.product(*reversed(columns))]
    raise UserError("{}: parameters must be a list of a header row and rows, or a mapping of comma-separated values"
                    .format(where))


def _env(value: Mapping[str, Any], where: str) -> Dict[str, str]:
    for key, item in value.items():
        if not isinstance(item, (str, int, float)) or isinstance(item, bool):
            raise UserError("{}: env.{} must be text or a number, not {!r} (put it in quotes)".format(where, key, item))
    return {str(key): str(item) for key, item in value.items()}


def _units(output: Any) -> Dict[str, str]:
    """`output: [[unit, metric], ...]`; anything else is ignored, as the reference ignores the whole key."""
    pairs = output if isinstance(output, list) else []
    return {str(pair[1]): str(pair[0]) for pair in pairs if isinstance(pair, list) and len(pair) == 2}
