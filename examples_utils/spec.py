"""Benchmark specs: a YAML mapping of entries, read into checked `Benchmark`s, their variants, and their commands.

Names containing `options` hold shared parts for YAML anchors. Unknown keys are ignored, by the reference too; three of
ours rely on that: `requires` (what the entry needs to run), `compile_only: false` (it has no such mode) and `output`
(pairs of unit and metric, used as units in the table and the chart).
"""
from __future__ import annotations

import itertools
import logging
import math
import re
import shlex
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Pattern, Sequence

from utils.errors import UserError, nearest
from utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

REDUCTIONS = ("mean", "final", "min", "value")
REQUIREMENT = re.compile(r"(ipu|cuda)(:[1-9]\d*)?|(package|program|file):.+")
OTHER_KEYS = {"data", "derived", "parameters", "requires", "output", "requirements_path"}
VARIABLE = re.compile(r"\$(\{)?([A-Za-z_]\w*)(?(1)\})")
VALUE = r"""(?:(?:=|\s+(?!-))(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)?"""
WANDB_FLAG = re.compile(r"\s-[\w-]*wandb[\w-]*" + VALUE)
VIPU_FLAG = re.compile(r"\s--vipu-(?:partition|server-host|server-port)" + VALUE)


class Metric(NamedTuple):
    """A number: what `regexp` captures in the log, reduced to one value, or else the value of `expression`, which
    computes with other metrics and the variant's parameters as {name}."""

    name: str
    regexp: Pattern[str] = re.compile("")
    expression: str = ""
    reduction: str = "mean"  # one of REDUCTIONS; value: the first
    skip: int = 0  # mean ignores so many of the worst values; the others need more than so many matches


class Benchmark(NamedTuple):
    """One checked entry of a spec file. The fields with defaults are keys of the entry, of the default's type."""

    name: str
    spec_path: Path
    metrics: Sequence[Metric]
    derived: Sequence[Metric]
    parameters: Sequence[Mapping[str, str]]  # one mapping a variant
    requires: Sequence[str]
    units: Mapping[str, str]  # metric -> unit
    cmd: str = ""
    location: str = ""
    env: Mapping[str, Any] = {}
    timeout: float = math.inf  # seconds
    requirements_file: str = ""
    generated: bool = False
    synthetic: bool = False
    allow_wandb: bool = False
    compile_only: bool = True

    @property
    def folder(self) -> Path:
        """Where its command runs."""
        return (self.spec_path.parent / self.location).resolve()

    @property
    def needs_dataset(self) -> bool:
        """Whether it reads real data: the reference decides by these parts of the name."""
        return not (self.generated or self.synthetic or "gen" in self.name or "synth" in self.name)


class Variant(NamedTuple):
    """A benchmark with one value for each of its parameters."""

    benchmark: Benchmark
    name: str
    params: Mapping[str, str]


class Command(NamedTuple):
    """What to run: `text` is what the results call the command, `words` the process's arguments."""

    text: str
    words: tuple[str, ...]
    unset: tuple[str, ...] = ()  # environment variables in the command that are not set

    @property
    def num_processes(self) -> int:
        """N of `mpirun --np N`, else 1: each process then logs its own throughput only."""
        launcher = " ".join(self.words[:python_index(self.words)])
        found = re.search(r"\bmpirun .*?--np[ =](\d+)", launcher)
        return max(int(found[1]), 1) if found else 1


def load_entries(paths: Sequence[str]) -> dict[str, tuple[Path, Any]]:
    """Read spec files: {entry name: (spec file, its YAML value)} in file order; of equal names the last file's counts.

    Raises UserError for a file that is missing, is not YAML or is not a mapping.
    """
    entries: dict[str, tuple[Path, Any]] = {}
    for path in (Path(text).resolve() for text in paths):
        for name, value in read_yaml(path, "--spec").items():
            if str(name) in entries and "options" not in str(name):
                logger.warning("'%s' of %s replaces the one of %s", name, path, entries[str(name)][0])
            entries[str(name)] = (path, value)
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
            listed = ", ".join(known) or "no benchmark"
            raise UserError(f"--benchmark: no '{name}' in the spec.{nearest(name, known)} It has: {listed}")
        if name not in known:
            raise UserError(f"--benchmark: '{name}' holds shared options and is not a benchmark")
    return [make_benchmark(name, *entries[name]) for name in dict.fromkeys(names)]


def make_benchmark(name: str, spec_path: Path, entry: Any) -> Benchmark:
    """Check one entry. Raises UserError naming the file, the entry and the key."""
    where = f"{spec_path.name}: '{name}'"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping with the key cmd")
    keys = Benchmark._field_defaults
    for key in map(str, entry.keys() - keys.keys() - OTHER_KEYS):
        if nearest(key, keys.keys() | OTHER_KEYS):
            logger.warning("%s: unknown key '%s' is ignored.%s", where, key, nearest(key, keys.keys() | OTHER_KEYS))
    requires, output = entry.get("requires") or [], entry.get("output")
    benchmark = Benchmark(
        name, spec_path, list(_metrics(_get(entry, "data", {}, where), f"{where}: data", "regexp")),
        list(_metrics(_get(entry, "derived", {}, where), f"{where}: derived", "expr")),
        _parameters(entry.get("parameters"), where), requires if isinstance(requires, list) else [requires],
        # `output: [[unit, metric], ...]`; anything else is ignored, as the reference ignores the whole key.
        {str(pair[1]): str(pair[0]) for pair in (output if isinstance(output, list) else [])
         if isinstance(pair, list) and len(pair) == 2},
        **{key: _get(entry, key, default, where) for key, default in keys.items()})
    if not benchmark.cmd.strip():
        raise UserError(f"{where} has no cmd{'; notebooks are not run here' if 'notebook' in entry else ''}")
    if benchmark.timeout <= 0:
        raise UserError(f"{where}: timeout must be more than 0 seconds, not {benchmark.timeout}")
    for need in benchmark.requires:
        if not REQUIREMENT.fullmatch(str(need)):
            raise UserError(f"{where}: requires: '{need}' is not one of ipu[:N], cuda[:N], package:NAME, program:NAME, "
                            "file:PATH")
    for key, item in benchmark.env.items():
        if not isinstance(item, (str, int, float)) or isinstance(item, bool):
            raise UserError(f"{where}: env.{key} must be text or a number, not {item!r} (put it in quotes)")
    return benchmark


def variants(benchmark: Benchmark) -> list[Variant]:
    """One variant for each set of parameters, called `name_key_value_...` with sorted keys."""
    result: dict[str, Variant] = {}
    for params in benchmark.parameters:
        name = benchmark.name + "".join(f"_{key}_{params[key]}" for key in sorted(params))
        if name in result:
            raise UserError(f"{benchmark.spec_path.name}: '{benchmark.name}': parameters give the variant {name} twice")
        result[name] = Variant(benchmark, name, params)
    return list(result.values())


def option_value(words: Sequence[str], *flags: str) -> str | None:
    """The value of the last `--flag value` or `--flag=value` among the words."""
    value = None
    for word, after in zip(words, [*words[1:], None]):
        flag, equals, rest = word.partition("=")
        if flag in flags:
            value = rest if equals else after
    return value


def python_index(words: Sequence[str]) -> int:
    """Position of the Python that the command calls: the first `python3`, else the first `python`; -1: none."""
    return next((words.index(name) for name in ("python3", "python") if name in words), -1)


def build_command(variant: Variant, env: Mapping[str, str], allow_wandb: bool = False,
                  compile_only: bool = False) -> Command:
    """Fill in parameters, make the script's path absolute, strip wandb flags, expand `env`, split into words.

    Raises UserError when the entry's cmd cannot be filled in, split, or calls no Python.
    """
    benchmark = variant.benchmark
    where = f"{benchmark.spec_path.name}: '{benchmark.name}': cmd"
    try:
        parts = benchmark.cmd.format(**variant.params).split()
    except (ValueError, LookupError, AttributeError) as error:
        unknown = f" names {{{error.args[0]}}}, which is not a key of parameters" if isinstance(error, KeyError) else ""
        raise UserError(f"{where}{unknown or f': {error}'} (for a literal brace write {{{{ or }}}})") from None
    index = python_index(parts) + 1
    if not 0 < index < len(parts):
        raise UserError(f"{where} must call `python3 SCRIPT` or `python3 -m MODULE`: {' '.join(parts)}")
    if not parts[index].startswith(("-", "$")):  # a flag such as -m, or a path that a variable makes
        # Absolute, so that a command copied from the results runs in any folder.
        parts[index] = shlex.quote(str((benchmark.folder / parts[index].strip("'\"")).resolve()))
    text = " ".join(parts)
    if WANDB_FLAG.search(text) and (compile_only or not (allow_wandb or benchmark.allow_wandb)):
        logger.info("the wandb flags of %s are removed%s", variant.name,
                    "" if compile_only else "; --allow-wandb keeps them")
        text = WANDB_FLAG.sub("", text)
    if compile_only:
        text = VIPU_FLAG.sub("", text) + " --compile-only"
    try:
        words = tuple(shlex.split(VARIABLE.sub(lambda match: env.get(match[2], match[0]), text)))
    except ValueError as error:
        raise UserError(f"{where}: {str(error).lower()}: {text}") from None
    return Command(text, words, tuple(match[2] for match in VARIABLE.finditer(text) if match[2] not in env))


def _get(entry: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
    """A key's value, of the default's type."""
    value, kind = entry.get(key), (int, float) if isinstance(default, float) else type(default)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = {str: "text", dict: "a mapping", bool: "true or false"}.get(type(default), "a number")
        raise UserError(f"{where}: {key} must be {expected}, not {value!r}")
    return value


def _metrics(part: Mapping[Any, Any], where: str, source: str) -> Iterator[Metric]:
    """source: the key that says where a number comes from, regexp or expr."""
    for name, settings in part.items():
        here, kinds = f"{where}.{name}", str if source == "regexp" else (str, int, float)
        if not isinstance(settings, dict) or not isinstance(settings.get(source), kinds):
            raise UserError(f"{here} must be a mapping with the key {source}")
        reduction, skip = str(settings.get("reduction_type", "mean")), _get(settings, "skip", 0, here)
        if reduction not in REDUCTIONS:
            raise UserError(f"{here}.reduction_type: '{reduction}' is not one of {', '.join(REDUCTIONS)}."
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
    """A header row and rows: a variant a row. A mapping of comma-separated values: all combinations, the first key
    changing fastest."""
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
