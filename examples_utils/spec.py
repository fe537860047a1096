"""Benchmark specs: a YAML mapping of entries, read into checked `Benchmark`s, and the variants each of them stands for.

Names containing `options` hold shared parts for YAML anchors. Keys that are not known are ignored, as the reference
does; three of ours rely on that: `requires` (what the entry needs to run), `compile_only: false` (it has no such mode)
and `output` (pairs of unit and metric, used as units in the table and the chart).
"""
from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Pattern, Sequence

from utils.errors import UserError, nearest
from utils.yaml_files import parse_yaml

logger = logging.getLogger(__name__)

REDUCTIONS = ("mean", "final", "min", "value")
REQUIREMENT = re.compile(r"(ipu|cuda)(:[1-9]\d*)?|(package|program|file):.+")
# Keys of an entry: their type, and what they are where they are missing.
KEYS: dict[str, tuple[Any, Any]] = {
    "cmd": (str, ""), "data": (dict, {}), "derived": (dict, {}), "env": (dict, {}), "location": (str, ""),
    "timeout": ((int, float), None), "allow_wandb": (bool, False), "generated": (bool, False),
    "synthetic": (bool, False), "requirements_file": (str, None), "compile_only": (bool, True),
}
OTHER_KEYS = ("parameters", "requires", "output", "requirements_path")


class Metric(NamedTuple):
    """A number: what `regexp` captures in the log, reduced to one value, or else what `expression` is worth.

    An expression computes with other metrics and the variant's parameters, which it names as {name}.
    """

    name: str
    regexp: Pattern[str] = re.compile("")
    expression: str = ""
    reduction: str = "mean"  # one of REDUCTIONS; value: the first
    skip: int = 0  # mean leaves out so many of the worst values; the others need more than so many matches


class Benchmark(NamedTuple):
    """One checked entry of a spec file."""

    name: str
    spec_path: Path
    cmd: str
    metrics: tuple[Metric, ...]
    derived: tuple[Metric, ...]
    parameters: Sequence[Mapping[str, str]]  # one mapping a variant
    env: Mapping[str, str]
    location: str
    timeout: float | None  # seconds
    allow_wandb: bool
    needs_dataset: bool
    requirements_file: str | None
    requires: Sequence[str]
    compile_only: bool
    units: Mapping[str, str]  # metric -> unit

    @property
    def folder(self) -> Path:
        """Where its command runs."""
        return (self.spec_path.parent / self.location).resolve()


class Variant(NamedTuple):
    """A benchmark with one value for each of its parameters."""

    benchmark: Benchmark
    name: str
    params: Mapping[str, str]


def load_entries(paths: Sequence[str]) -> dict[str, tuple[Path, Any]]:
    """Read spec files: {entry name: (spec file, its YAML value)} in file order; of equal names the last file's counts.

    Raises UserError for a file that is missing, is not YAML or is not a mapping.
    """
    entries: dict[str, tuple[Path, Any]] = {}
    for path in (Path(text).resolve() for text in paths):
        try:
            content = parse_yaml(path.read_bytes(), f"--spec: {path} is not a YAML file")
        except OSError as error:
            raise UserError(f"--spec: cannot read {path}: {error.strerror or error}") from None
        if not isinstance(content, dict):
            raise UserError(f"--spec: {path} must be a YAML mapping of benchmark names to entries")
        for name, value in ((str(key), value) for key, value in content.items()):
            if name in entries and "options" not in name:
                logger.warning("'%s' of %s replaces the one of %s", name, path, entries[name][0])
            entries[name] = (path, value)
    return entries


def select(entries: Mapping[str, tuple[Path, Any]], names: Sequence[str] | None,
           include_convergence: bool = False) -> list[Benchmark]:
    """The benchmarks to run: the named ones in the order given, else all; `_conv` ones only when named or included."""
    known = [name for name in entries if "options" not in name]
    if names is None:
        names = [name for name in known if include_convergence or not name.endswith("_conv")]
    if not names:
        raise UserError("--spec: no benchmark to run (names ending in _conv need --include-convergence or --benchmark)")
    for name in names:
        if name not in entries:
            raise UserError(f"--benchmark: no '{name}' in the spec.{nearest(name, known)} It has: "
                            + (", ".join(known) or "no benchmark"))
        if name not in known:
            raise UserError(f"--benchmark: '{name}' holds options that others share, it is no benchmark")
    return [make_benchmark(name, *entries[name]) for name in dict.fromkeys(names)]


def make_benchmark(name: str, spec_path: Path, entry: Any) -> Benchmark:
    """Check one entry. Raises UserError naming the file, the entry and the key."""
    where = f"{spec_path.name}: '{name}'"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping with the key cmd")
    for key in map(str, entry.keys() - {*KEYS, *OTHER_KEYS}):
        close = nearest(key, (*KEYS, *OTHER_KEYS))
        if close:
            logger.warning("%s: unknown key '%s' is ignored.%s", where, key, close)
    values = {key: _get(entry, key, kind, where, default) for key, (kind, default) in KEYS.items()}
    timeout, requires, output = values["timeout"], entry.get("requires") or [], entry.get("output")
    if not values["cmd"].strip():
        raise UserError(f"{where} has no cmd{'; notebooks are not run here' if 'notebook' in entry else ''}")
    if timeout is not None and timeout <= 0:
        raise UserError(f"{where}: timeout must be more than 0 seconds, not {timeout}")
    for need in (requires := requires if isinstance(requires, list) else [requires]):
        if not isinstance(need, str) or not REQUIREMENT.fullmatch(need):
            raise UserError(f"{where}: requires: '{need}' is none of ipu[:N], cuda[:N], package:NAME, program:NAME, "
                            "file:PATH")
    for key, item in values["env"].items():
        if not isinstance(item, (str, int, float)) or isinstance(item, bool):
            raise UserError(f"{where}: env.{key} must be text or a number, not {item!r} (put it in quotes)")
    values.update(
        requires=requires, parameters=_parameters(entry.get("parameters"), where),
        # The reference decides by these parts of the name whether real data is needed.
        needs_dataset=not (values.pop("generated") | values.pop("synthetic") or "gen" in name or "synth" in name),
        metrics=tuple(_metrics(values.pop("data"), f"{where}: data", "regexp")),
        derived=tuple(_metrics(values["derived"], f"{where}: derived", "expr")),
        env={str(key): str(item) for key, item in values["env"].items()},
        # `output: [[unit, metric], ...]`; anything else is ignored, as the reference ignores the whole key.
        units={str(pair[1]): str(pair[0]) for pair in (output if isinstance(output, list) else [])
               if isinstance(pair, list) and len(pair) == 2})
    return Benchmark(name, spec_path, **values)


def variants(benchmark: Benchmark) -> list[Variant]:
    """One variant for each set of parameters, called `name_key_value_...` with sorted keys."""
    result: dict[str, Variant] = {}
    for params in benchmark.parameters:
        name = benchmark.name + "".join(f"_{key}_{params[key]}" for key in sorted(params))
        if name in result:
            raise UserError(f"{benchmark.spec_path.name}: '{benchmark.name}': parameters give the variant {name} twice")
        result[name] = Variant(benchmark, name, params)
    return list(result.values())


def _get(entry: Mapping[str, Any], key: str, kind: Any, where: str, default: Any) -> Any:
    value = entry.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = {str: "text", dict: "a mapping", bool: "true or false"}.get(kind, "a number")
        raise UserError(f"{where}: {key} must be {expected}, not {value!r}")
    return value


def _metrics(part: Mapping[Any, Any], where: str, source: str) -> Iterator[Metric]:
    """source: the key that says where a number comes from, regexp or expr."""
    for name, settings in part.items():
        here, kinds = f"{where}.{name}", str if source == "regexp" else (str, int, float)
        if not isinstance(settings, dict) or not isinstance(settings.get(source), kinds):
            raise UserError(f"{here} must be a mapping with the key {source}")
        reduction, skip = str(settings.get("reduction_type", "mean")), _get(settings, "skip", int, here, 0)
        if reduction not in REDUCTIONS:
            raise UserError(f"{here}.reduction_type: '{reduction}' is none of {', '.join(REDUCTIONS)}."
                            + nearest(reduction, REDUCTIONS))
        if skip < 0:
            raise UserError(f"{here}.skip must be 0 or more, not {skip}")
        try:
            regexp = re.compile(settings["regexp"] if source == "regexp" else "")
        except re.error as error:
            raise UserError(f"{here}.regexp: {error}: {settings['regexp']}") from None
        if regexp.groups > 1:
            raise UserError(f"{here}.regexp has {regexp.groups} groups; it must have one, (?:...) does not count")
        yield Metric(str(name), regexp, str(settings.get("expr", "")), reduction, skip)


def _parameters(value: Any, where: str) -> list[dict[str, str]]:
    """A header row and rows: a variant a row. A mapping of comma-separated values: their product, first key fastest."""
    if value is None:
        return [{}]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(row, list) for row in value):
        header, *rows = ([str(item) for item in row] for row in value)
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{where}: parameters: the row {row} does not fit the header {header}")
        return [dict(zip(header, row)) for row in rows]
    if isinstance(value, dict) and value:
        columns = [[part.strip() for part in (map(str, column) if isinstance(column, list) else str(column).split(","))]
                   for column in value.values()]
        return [dict(zip(map(str, value), reversed(row))) for row in itertools.product(*reversed(columns))]
    raise UserError(f"{where}: parameters must be a list of a header row and rows, or a mapping of comma-separated "
                    "values")
