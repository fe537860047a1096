"""Benchmark specs: a YAML mapping of entries, read into checked `Benchmark`s, and their variants with their commands.

Names containing `options` hold shared parts for YAML anchors. Unknown keys are ignored, by the reference too; three of
ours rely on that: `requires` (what the entry needs to run), `compile_only: false` (it has no such mode) and `output`
(pairs of unit and metric, used as units in the table and the chart).
"""
from __future__ import annotations

import itertools
import logging
import re
import shlex
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from utils.errors import UsageError, UserError, nearest
from utils.options import Options, as_arguments, option, options_of
from utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

STATUSES = PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
REQUIREMENT = re.compile(r"(ipu|cuda)(:[1-9]\d*)?|(package|program|file):.+")
VARIABLE = re.compile(r"\$(\{)?([A-Za-z_]\w*)(?(1)\})")
VALUE = r"""(?:(?:=|\s+(?!-))(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)?"""
WANDB_FLAG = re.compile(r"\s-[\w-]*wandb[\w-]*" + VALUE)
VIPU_FLAG = re.compile(r"\s--vipu-(?:partition|server-host|server-port)" + VALUE)


def _regexp_problem(text: str) -> str:
    try:
        groups = re.compile(text).groups
    except re.error as error:
        return f"a regular expression ({error})"
    return f"a regular expression of one group, not {groups} ((?:...) does not count)" if groups > 1 else ""


@dataclass(frozen=True)
class Metric(Options):
    """A number: what `regexp` captures in the log, reduced to one value, or else the value of `expr`."""

    name: str = option("", "its key")
    regexp: str = option("", "of a line, with one group", check=_regexp_problem)
    expr: str = option("", "arithmetic with other metrics and the variant's parameters as {name}")
    reduction_type: str = option("mean", "value: the first", choices=("mean", "final", "min", "value"))
    skip: int = option(0, "mean ignores so many of the worst values; the others need more than so many", ge=0)


@dataclass(frozen=True)
class Settings(Options):
    """The keys of an entry that are not mappings."""

    cmd: str = option("", "the command")
    location: str = option("", "folder where it runs, from that of the spec file")
    requires: tuple[str, ...] = option((), "what it needs to run", check=lambda text: (
        "" if REQUIREMENT.fullmatch(text) else "one of ipu[:N], cuda[:N], package:NAME, program:NAME, file:PATH"))
    timeout: float | None = option(None, "seconds", gt=0)
    requirements_file: str = option("", "pip install this first")
    generated: bool = option(False, "it reads no data set")
    synthetic: bool = option(False, "it reads no data set")
    allow_wandb: bool = option(False, "its wandb flags are kept")
    compile_only: bool = option(True, "it takes --compile-only")


class Benchmark(NamedTuple):
    """One checked entry of a spec file."""

    name: str
    spec_path: Path
    settings: Settings
    metrics: Sequence[Metric]  # of `data`, then those of `derived`
    env: Mapping[str, str]
    parameters: Sequence[Mapping[str, str]]  # one mapping a variant
    units: Mapping[str, str]  # metric -> unit

    @property
    def folder(self) -> Path:
        """Where its command runs."""
        return (self.spec_path.parent / self.settings.location).resolve()

    @property
    def needs_dataset(self) -> bool:
        """Whether it reads real data: the reference decides by these parts of the name."""
        return not (self.settings.generated or self.settings.synthetic or "gen" in self.name or "synth" in self.name)


@dataclass
class Variant:
    """A benchmark with one value for each of its parameters, and the outcome of its run."""

    benchmark: Benchmark
    name: str
    params: Mapping[str, str]
    text: str  # what the results call its command
    words: Sequence[str]  # arguments of the process
    env: Mapping[str, str]  # the whole environment of the command
    added: Mapping[str, str] = field(default_factory=dict)  # what of it the runner and the entry set
    status: str = SKIPPED
    reason: str = ""  # why it failed or was skipped
    results: dict[str, Any] = field(default_factory=dict)  # metric -> {reduction: value or None}
    exitcode: int | None = None  # None: skipped
    start: datetime = field(default_factory=datetime.now)
    seconds: float = 0.0
    log_folder: Path | None = None
    checkpoint: Path | None = None

    def value(self, metric: str) -> Any:
        """The value of a metric whatever its reduction; None: there is none."""
        found = self.results.get(metric)
        return next(iter(found.values()), None) if isinstance(found, dict) else found

    @property
    def throughput(self) -> tuple[Any, str]:
        """The value and its unit, or an empty text."""
        return self.value("throughput"), self.benchmark.units.get("throughput", "")

    @property
    def num_processes(self) -> int:
        """N of `mpirun --np N`, else 1: each process then logs its own throughput only."""
        found = re.search(r"\bmpirun .*?--np[ =](\d+)", " ".join(self.words[:python_index(self.words)]))
        return max(int(found[1]), 1) if found else 1


def load_entries(paths: Sequence[str]) -> dict[str, tuple[Path, Any]]:
    """Read spec files: {entry name: (spec file, its YAML value)}; of equal names the last file's counts."""
    entries: dict[str, tuple[Path, Any]] = {}
    for file in (Path(path).resolve() for path in paths):
        for name, value in read_yaml(file, "--spec").items():
            if str(name) in entries and "options" not in str(name):
                logger.warning("'%s' of %s replaces the one of %s", name, file, entries[str(name)][0])
            entries[str(name)] = file, value
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
        if name not in known:
            listed = ", ".join(known) or "no benchmark"
            raise UserError(f"--benchmark: no benchmark '{name}' in the spec.{nearest(name, known)} It has: {listed}")
    return [make_benchmark(name, *entries[name]) for name in dict.fromkeys(names)]


def make_benchmark(name: str, spec_path: Path, entry: Any) -> Benchmark:
    """Check one entry. Raises UserError naming the file, the entry and the key."""
    where = f"{spec_path.name}: '{name}'"
    if not isinstance(entry, dict) or not entry.get("cmd"):
        raise UserError(f"{where} must be a mapping with the key cmd; notebooks are not run here")
    known = {*Settings.__dataclass_fields__, "data", "derived", "env", "parameters", "output", "requirements_path"}
    for key in map(str, entry):
        if key not in known and nearest(key, known):
            logger.warning("%s: unknown key '%s' is ignored.%s", where, key, nearest(key, known))
    env = _mapping(entry, "env", where)
    for key, value in env.items():
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise UserError(f"{where}: env.{key} must be text or a number, not {value!r} (put it in quotes)")
    metrics = [metric for key, source in (("data", "regexp"), ("derived", "expr"))
               for metric in _metrics(_mapping(entry, key, where), f"{where}: {key}", source)]
    # `output: [[unit, metric], ...]`; anything else is ignored, as the reference ignores the whole key.
    output = entry["output"] if isinstance(entry.get("output"), list) else []
    units = {str(pair[1]): str(pair[0]) for pair in output if isinstance(pair, list) and len(pair) == 2}
    return Benchmark(name, spec_path, _read(Settings, entry, where), metrics, {str(key): str(env[key]) for key in env},
                     _parameters(entry.get("parameters"), f"{where}: parameters"), units)


def _read(table: type[Options], given: Mapping[str, Any], where: str) -> Any:
    try:
        with as_arguments():
            names = [spec.name for spec in options_of(table) if given.get(spec.name) is not None]
            return table(**{name: given[name] for name in names})
    except UsageError as error:
        raise UserError(f"{where}: {error}") from None


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> Mapping[Any, Any]:
    value = entry.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a mapping")
    return value


def _metrics(part: Mapping[Any, Any], where: str, source: str) -> Iterator[Metric]:
    """source: the key that says where a number comes from, regexp or expr."""
    for name, settings in part.items():
        if not isinstance(settings, dict) or source not in settings:
            raise UserError(f"{where}.{name} must be a mapping with the key {source}")
        own = {key: settings.get(key) for key in (source, "reduction_type", "skip")}
        yield _read(Metric, {**own, "name": str(name)}, f"{where}.{name}")


def _parameters(value: Any, where: str) -> list[dict[str, str]]:
    """A header row and rows: a variant a row. A mapping of comma-separated values: all combinations, the first key
    changing fastest."""
    if value is None:
        return [{}]
    if isinstance(value, dict) and value:
        columns = [column if isinstance(column, list) else str(column).split(",") for column in value.values()]
        value = [list(value), *([*reversed(row)] for row in itertools.product(*reversed(columns)))]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(row, list) for row in value):
        raise UserError(f"{where} must be a list of a header row and rows, or a mapping of comma-separated values")
    header, *rows = ([str(item).strip() for item in row] for row in value)
    for row in rows:
        if len(row) != len(header):
            raise UserError(f"{where}: the row {row} does not fit the header {header}")
    return [dict(zip(header, row)) for row in rows]


def option_value(words: Sequence[str], *flags: str) -> str:
    """The value of the last `--flag value` or `--flag=value` among the words, else an empty text."""
    found = re.findall(rf"\0(?:{'|'.join(flags)})[=\0]([^\0]*)", "\0".join(["", *words]))
    return found[-1] if found else ""


def python_index(words: Sequence[str]) -> int:
    """Position of the Python that the command calls: the first `python3`, else the first `python`; -1: none."""
    return next((words.index(name) for name in ("python3", "python") if name in words), -1)


def variants(benchmark: Benchmark, env: Mapping[str, str], allow_wandb: bool = False,
             compile_only: bool = False) -> list[Variant]:
    """One variant for each set of parameters, called `name_key_value_...` with sorted keys.

    Raises UserError when the entry's cmd cannot be filled in, split, or calls no Python.
    """
    result: dict[str, Variant] = {}
    where = f"{benchmark.spec_path.name}: '{benchmark.name}'"
    for params in benchmark.parameters:
        name = benchmark.name + "".join(f"_{key}_{params[key]}" for key in sorted(params))
        if name in result:
            raise UserError(f"{where}: parameters give the variant {name} twice")
        text = _command(benchmark, params, f"{where}: cmd")
        if WANDB_FLAG.search(text) and (compile_only or not (allow_wandb or benchmark.settings.allow_wandb)):
            logger.info("the wandb flags of %s are removed; --allow-wandb keeps them, unless it only compiles", name)
            text = WANDB_FLAG.sub("", text)
        if compile_only:
            text = VIPU_FLAG.sub("", text) + " --compile-only"
        try:
            words = shlex.split(VARIABLE.sub(lambda match: env.get(match[2], match[0]), text))
        except ValueError as error:
            raise UserError(f"{where}: cmd: {str(error).lower()}: {text}") from None
        result[name] = Variant(benchmark, name, params, text, words, env)
    return list(result.values())


def _command(benchmark: Benchmark, params: Mapping[str, str], where: str) -> str:
    """The command with parameters filled in and the script's path made absolute: copied from the results, it runs in
    any folder."""
    try:
        parts = benchmark.settings.cmd.format(**params).split()
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{where}: no parameter for {{{error}}} (for a literal brace write {{{{ or }}}})") from None
    index = python_index(parts) + 1
    if not 0 < index < len(parts):
        raise UserError(f"{where} must call `python3 SCRIPT` or `python3 -m MODULE`: {' '.join(parts)}")
    if not parts[index].startswith(("-", "$")):  # a flag such as -m, or a path that a variable makes
        parts[index] = shlex.quote(str((benchmark.folder / parts[index].strip("'\"")).resolve()))
    return " ".join(parts)
