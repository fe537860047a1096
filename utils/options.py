"""Options of all commands: dataclasses that define flags, checks, --help, errors and docs/flags.md.

    @dataclass(frozen=True)
    class Training(Options, title="training"):
        steps: int = option(1000, "optimizer steps", ge=1)
        layers: tuple[int, ...] = option((16,), "layers on each device")

    COMMAND = Command("train.py", "Train a model.", Training)
    options = COMMAND.parse(["--steps", "5"])         # a Training; --layers is (16,)

An annotation is one of bool, int, float and str, or a tuple of them (`tuple[int, ...]`), and may end in `| None`; it is
parsed as text, because Python 3.8 cannot evaluate it. Flags are shown with hyphens; underscores are accepted too.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Generic, Iterator, Mapping, NamedTuple, NoReturn, Sequence, TypeVar

from utils.errors import UsageError, UserError, nearest
from utils.untrusted import shown

VERSION = "1.0.0"
"""The project's version, as in pyproject.toml."""

REQUIRED: Any = object()
"""Default of a required option."""

_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}
_ANNOTATION = re.compile(r"(?P<many>tuple\[)?(?P<type>bool|int|float|str)(?(many), \.\.\.\])(?P<optional> \| None)?")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_METAVARS = {bool: "BOOL", int: "N", float: "F", str: "NAME"}
_FLAG = re.compile(r"(?<![\w-])--([a-z0-9]+(?:-[a-z0-9]+)*)")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Range(NamedTuple):
    """Numbers >= `ge`, > `gt`, <= `le` and < `lt`, each None for no limit; also 0 with `or_zero`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range; non-finite ones never are."""
        if self.or_zero and value == 0:
            return True
        low = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        high = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        try:
            return low and high and math.isfinite(value)
        except OverflowError:  # an integer too large for a float
            return False

    def __str__(self) -> str:
        limits = ((self.ge, "at least"), (self.gt, "above"), (self.le, "at most"), (self.lt, "below"))
        text = " and ".join(f"{word} {display(limit)}" for limit, word in limits if limit is not None)
        return text + (", or 0" if self.or_zero else "")


class Option(NamedTuple):
    """One option: a field of a table."""

    name: str
    default: Any
    kind: Any
    """bool, int, float or str."""
    many: bool
    optional: bool
    settings: Mapping[str, Any]
    """The arguments of `option`."""

    @property
    def flag(self) -> str:
        """The flag as typed; for a positional option its metavar."""
        return self.metavar if self.settings.get("positional") else flag_name(self.name)

    @property
    def metavar(self) -> str:
        """Placeholder for its value in --help."""
        if "metavar" in self.settings:
            return str(self.settings["metavar"])
        if "choices" in self.settings and not self.many:
            return "{" + ",".join(self.settings["choices"]) + "}"
        return "PATH" if self.settings.get("path") else _METAVARS[self.kind]

    @property
    def within(self) -> Range:
        """The allowed range."""
        bounds = {key: self.settings[key] for key in ("ge", "gt", "le", "lt") if key in self.settings}
        return self.settings.get("within") or Range(**bounds)

    @property
    def default_text(self) -> str:
        """The default, as shown to users."""
        if self.default in (None, (), ""):
            return str(self.settings.get("none", "none"))
        return "required" if self.default is REQUIRED else display(self.default)

    @property
    def help(self) -> str:
        """The help text with default and limits."""
        notes = [self.default_text if self.default is REQUIRED else f"default: {self.default_text}"]
        notes += [str(self.within)] if str(self.within) else []
        if self.many and "choices" in self.settings:
            notes.append("of: " + ", ".join(self.settings["choices"]))
        if self.settings.get("needs"):
            notes.append(f"with {flag_name(self.settings['needs'])}")
        if self.settings.get("resume") in ("fixed", "content"):
            notes.append("fixed with --resume")
        return f"{self.settings['help']} ({'; '.join(notes)})"

    def checked(self, value: Any, where: str = "", is_text: bool = False) -> Any:
        """Convert a value to the option's type and check it. Raises UsageError that starts with `where` (the flag).

        is_text: the value comes from the command line, where everything is text; in YAML a number must be a number
        (only floats may be text, because YAML 1.1 reads 3e-4 as text).
        """
        where = where or self.flag
        empty = ("none",) if self.settings.get("path") else ("none", "")  # an empty path may be an unset variable
        if self.optional and (value is None or (is_text and isinstance(value, str) and value.lower() in empty)):
            return None
        if not self.many:
            return self._checked_item(value, where, is_text)
        if isinstance(value, str):
            value = [value]
        listed = self.kind is not str or "choices" in self.settings  # other texts may contain commas
        items: list[Any] = []
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) and listed:
                items += [(part.strip(), True) for part in item.split(",")]
            else:
                items.append((item, is_text))
        if not items:
            raise UsageError(f"{where}: needs at least one value")
        return tuple(self._checked_item(item, where, text) for item, text in items)

    def _checked_item(self, given: Any, where: str, is_text: bool) -> Any:
        settings = self.settings
        try:
            value = _convert(given, self.kind, is_text)
        except ValueError:
            quotes = " (put it in quotes)" if self.kind is str else ""
            raise UsageError(f"{where}: expected {_EXPECTED[self.kind]}, got {_quoted(given)}{quotes}") from None
        if "choices" in settings and value not in settings["choices"]:
            listed, near = ", ".join(settings["choices"]), nearest(value, settings["choices"])
            raise UsageError(f"{where}: expected one of {listed}, got {_quoted(value)}.{near}")
        problem = str(self.within) if self.kind in (int, float) and not self.within.holds(value) else ""
        problem = problem or (settings["check"](value) if "check" in settings else "")
        if problem:
            raise UsageError(f"{where}: must be {problem}, got {given[:80] if is_text else _quoted(value)}")
        if settings.get("path") and not (value == "" and settings.get("empty")):
            if not value or "\0" in value:
                raise UsageError(f"{where}: {_quoted(value)} is not a path")
            return os.path.expanduser(value)
        return value


def option(default: Any, help: str, **settings: Any) -> Any:
    """Declare an option as a field of a table. default: REQUIRED if there is none.

    settings, all of them optional:
    ge, gt, le, lt: bounds of numbers; within: a `Range` instead; check: a function that returns what a value must be,
        or "" if it is valid
    choices: allowed words; bare: the value of the flag without a value
    path: True for a path, in which ~ is expanded; empty: it may be empty; metavar: placeholder in --help
    none: meaning of the default if it is None or empty
    needs: name of another option that this one requires
    positional: given without a flag; short: an additional one-letter flag, such as "-n"
    resume: what --resume does with a new value (utils/resume.py)
    """
    return field(default=default, metadata=dict(settings, help=help))


def again(table: type[Options], name: str, **changes: Any) -> Any:
    """Declare an option of another table here too; changes: overrides (default, help, settings of `option`)."""
    first = table.__dataclass_fields__[name]  # type: ignore[attr-defined]
    settings = dict(first.metadata, **changes)
    return field(default=settings.pop("default", first.default), metadata=settings)


@dataclass(frozen=True)
class Options:
    """Base of all tables: frozen dataclasses. Checks every value, also those set in code or by `replace`."""

    def __init_subclass__(cls, title: str = "") -> None:
        cls.title = title  # type: ignore[attr-defined]

    def __post_init__(self) -> None:
        specs = options_of(type(self))
        missing = [spec for spec in specs if getattr(self, spec.name) is REQUIRED]
        if missing:
            listed = ", ".join(spec.flag + ("" if _positional(spec) else f" {spec.metavar}") for spec in missing)
            what = f": {missing[0].settings['help']}" if len(missing) == 1 else "; see --help"
            raise UsageError(f"missing {listed}{what}")
        for spec in specs:
            value = getattr(self, spec.name)
            if value != spec.default or type(value) is not type(spec.default):
                object.__setattr__(self, spec.name, spec.checked(value))
        by_name = {spec.name: spec for spec in specs}
        for spec in specs:
            needed = by_name.get(spec.settings.get("needs", ""))
            if needed and getattr(self, spec.name) != spec.default and getattr(self, needed.name) == needed.default:
                raise UsageError(f"{spec.flag} needs {needed.flag}: {needed.settings['help']}")
        self.check()

    def check(self) -> None:
        """Raise UsageError for options that contradict each other. Tables may override this."""

    def given(self) -> list[str]:
        """Flags of the options that differ from their defaults."""
        return [spec.flag for spec in options_of(type(self)) if getattr(self, spec.name) != spec.default]


T = TypeVar("T", bound=Options)


_TABLES: dict[Any, tuple[Option, ...]] = {}


def options_of(table: type[Options]) -> tuple[Option, ...]:
    """The options of a table, inherited ones first."""
    if table not in _TABLES:
        found = []
        for spec in dataclasses.fields(table):
            kind = _ANNOTATION.fullmatch(str(spec.type))
            assert kind is not None, f"{table.__name__}.{spec.name}: {spec.type}"
            many, optional = kind["many"] is not None, kind["optional"] is not None
            found.append(Option(spec.name, spec.default, _TYPES[kind["type"]], many, optional, spec.metadata))
        _TABLES[table] = tuple(found)
    return _TABLES[table]


def groups(table: type[Options]) -> list[tuple[str, list[Option]]]:
    """The options of a table by title: each under the first table that declares it, with the last declaration."""
    specs = {spec.name: spec for spec in options_of(table)}
    owners = [owner for owner in table.__mro__ if dataclasses.is_dataclass(owner)]
    found = []
    for owner in [*owners[1:], table]:
        inherited = {name for base in owner.__bases__ for name in getattr(base, "__dataclass_fields__", ())}
        own = [specs[spec.name] for spec in dataclasses.fields(owner) if spec.name not in inherited]
        found += [(getattr(owner, "title", ""), own)] if own else []
    return found


def flag_name(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def as_arguments(**names: str) -> Iterator[None]:
    """Within the context, errors name Python arguments instead of flags: bpe_path for --bpe-path, or as in `names`."""
    try:
        yield
    except UserError as error:
        def argument(found: re.Match[str]) -> str:
            name = found[1].replace("-", "_")
            return names.get(name, name)

        raise type(error)(_FLAG.sub(argument, str(error))) from error


def display(value: Any) -> str:
    """A value as typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(display(item) for item in value)
    return str(value)


def _positional(spec: Option) -> bool:
    return bool(spec.settings.get("positional"))


def _quoted(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else shown(value)  # YAML aliases can expand to a very long text
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(value: Any, kind: Any, is_text: bool) -> Any:
    """`value` as bool, int, float or str; ValueError if the conversion is ambiguous."""
    if kind is bool:
        if is_text and isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if is_text and isinstance(value, str):
            return int(value)
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise ValueError from None
            if math.isfinite(number):
                return number
    elif isinstance(value, str):
        return value
    raise ValueError


# Command lines -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[len("argument ") :] if message.startswith("argument ") else message)


class Command(Generic[T]):
    """A program with options: its name (as called), its purpose, and its table or tables."""

    def __init__(self, name: str, about: str, table: type[T], *more: type[Options]) -> None:
        self.name, self.about, self.table = name, about, table
        tables: tuple[type[Options], ...] = (table, *more)
        self.groups = [group for part in tables for group in groups(part)]
        self.specs = {spec.name: spec for _, specs in self.groups for spec in specs}

    def parser(self) -> Parser:
        """An argparse parser that assigns arguments to flags; `read` converts and checks them."""
        needed = [spec for spec in self.specs.values() if spec.default is REQUIRED]
        words = [spec.flag if _positional(spec) else f"{spec.flag} {spec.metavar}" for spec in needed]
        parser = Parser(
            prog=self.name,
            usage=" ".join(["%(prog)s", *words, "[flags]"]),
            description=self.about,
            epilog="Flags may be spelled with - or _. Booleans stand alone or take true or false. "
                   "'none' empties an option that may be empty.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
            allow_abbrev=False,
        )
        parser.add_argument("--version", action="version", version=f"mini-dalle {VERSION}")
        for title, specs in self.groups:
            group: Any = parser.add_argument_group(title) if title else parser
            for spec in specs:
                # Absent flags must not override a configuration, so argparse gets no defaults and no types.
                settings: dict[str, Any] = {"metavar": spec.metavar, "default": argparse.SUPPRESS}
                settings["help"] = spec.help.replace("%", "%%")
                if _positional(spec):
                    group.add_argument(spec.name, nargs="?", **settings)
                    continue
                if spec.many:
                    settings["nargs"] = "+"
                elif spec.kind is bool or "bare" in spec.settings:
                    settings.update(nargs="?", const=spec.settings.get("bare", "true"))
                short = [spec.settings["short"]] if "short" in spec.settings else []
                group.add_argument(*short, spec.flag, dest=spec.name, **settings)
        return parser

    def read(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The options in `argv` (default: sys.argv[1:]), checked one by one: {name: value}.

        Raises UsageError, one line that names the flag.
        """
        words = self._words(list(sys.argv[1:] if argv is None else argv))
        found, rest = self.parser().parse_known_args(words)
        if rest:
            raise self._unknown(rest[0].partition("=")[0])
        return {name: self.specs[name].checked(value, is_text=True) for name, value in vars(found).items()}

    def parse(self, argv: Sequence[str] | None = None) -> T:
        """The command's table with the options in `argv`. Raises UsageError."""
        return self.table(**self.read(argv))

    def _words(self, argv: list[str]) -> list[str]:
        """Spell flags with hyphens, and join values that look like short flags to their flag (`--text=-rf`)."""
        known = {spec.flag: spec for spec in self.specs.values() if not _positional(spec)}
        has_positional = any(map(_positional, self.specs.values()))
        words: list[str] = []
        join = False  # the previous word is a flag that expects one value
        for word in argv:
            flag, equals, value = word.partition("=")
            spec = known.get(flag.replace("_", "-")) if flag.startswith("--") else None
            if join and word.startswith("-") and not word.startswith("--"):
                words[-1] += "=" + word
            elif spec is not None and spec.kind is bool and has_positional and not equals:
                words.append(spec.flag + "=true")  # the next word is not its value
            else:
                words.append(word if spec is None else spec.flag + equals + value)
            join = spec is not None and not equals and not spec.many and spec.kind is not bool
        return words

    def _unknown(self, word: str) -> UsageError:
        if word.endswith(".tar"):
            return UsageError(f"unexpected argument '{word}': put patterns of shards in quotes, as in --input-folder "
                              "'DIR/{00000..00099}.tar'")
        if not word.startswith("-"):
            return UsageError(f"unexpected argument '{word}': options are given as flags, and a value of several words "
                              "in quotes; --help lists the flags")
        near = nearest(word.replace("_", "-"), ["--help", "--version", *(spec.flag for spec in self.specs.values())])
        return UsageError(f"unknown flag '{word}'.{near} --help lists the flags")


def choose(name: str, commands: Mapping[str, Command[Any]], argv: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """Return the command that is called, and the arguments after it. Raises UsageError that lists the commands."""
    words = list(sys.argv[1:] if argv is None else argv)
    first, listed = words[0] if words else "", " or ".join(commands)
    if first in ("-h", "--help"):
        about = "\n".join(f"  {key:<12}{command.about}" for key, command in commands.items())
        sys.stdout.write(f"usage: {name} COMMAND [flags]\n\n{about}\n\nCOMMAND --help lists the flags of a command.\n")
        sys.exit(0)
    if first == "--version":
        sys.stdout.write(f"mini-dalle {VERSION}\n")
        sys.exit(0)
    if not first or first.startswith("-"):
        raise UsageError(f"name a command, {listed}: {name} {next(iter(commands))} ...")
    if first not in commands:
        raise UsageError(f"command '{first}': expected {listed}.{nearest(first, commands)}")
    return first, words[1:]
