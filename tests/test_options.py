"""Options of commands: places, short flags, what needs what, shared declarations, Python's names in errors."""
from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from helpers import refused

from utils.errors import UsageError, UserError
from utils.options import REQUIRED, Command, Options, again, as_arguments, choose, groups, option


@dataclass(frozen=True)
class Shared(Options, title="shared"):
    seed: int = option(42, "of everything", ge=0)
    names: tuple[str, ...] = option((), "files", path=True)


@dataclass(frozen=True)
class Example(Shared, title="own"):
    source: str = option(REQUIRED, "what to read", positional=True, metavar="SOURCE")
    seed: int = again(Shared, "seed", default=7)
    size: float | None = option(None, "how large", gt=0, short="-s", none="all of it")
    half: bool = option(False, "half of it")
    part: str = option("all", "which part", choices=("all", "odd"), needs="half")


COMMAND = Command("example.py", "An example.", Example)


@pytest.mark.parametrize("words, expected", [
    ("a", {}), ("--half a", {"half": True}), ("a --half=false", {}), ("-s 2 a", {"size": 2.0}),
    ("a --size=none --seed 0", {"seed": 0}), ("a --names b,c ~d", {"names": ("b,c", "~d")}),
    ("--half a --part odd", {"half": True, "part": "odd"}),
])
def test_words(words, expected, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", str)
    assert COMMAND.parse(words.split()) == Example(source="a", **expected)


@pytest.mark.parametrize("words, message", [
    ("", "missing SOURCE: what to read"),
    ("a b", "unexpected argument 'b'"),
    ("a --size 0", "--size: must be above 0, got 0"),
    ("a --part odd", "--part needs --half: half of it"),
    ("a --part ode", "--part: expected one of all, odd, got 'ode'. Did you mean 'odd'?"),
    ("a --sead 1", "unknown flag '--sead'. Did you mean '--seed'?"),
])
def test_errors(words, message):
    error = refused("", COMMAND.parse, words.split(), kind=UsageError)
    assert error.startswith(message)


def test_values_given_in_code_are_checked_too():
    example = Example(source="a")
    assert example.seed == 7 and example.given() == ["SOURCE"]
    for values in ({"seed": -1}, {"seed": True}, {"part": "odd"}, {"names": "\0"}):
        with pytest.raises(UsageError):
            replace(example, **values)


def test_an_option_stands_in_the_group_that_declares_it_first():
    found = {title: [spec.name for spec in specs] for title, specs in groups(Example)}
    assert found == {"shared": ["seed", "names"], "own": ["source", "size", "half", "part"]}


def test_commands_of_a_program(capsys):
    commands = {"export": COMMAND, "verify": COMMAND}
    assert choose("x", commands, ["verify", "a", "--half"]) == ("verify", ["a", "--half"])
    for words in (["verif"], [], ["--half", "verify"]):
        refused("export or verify", choose, "x", commands, words, kind=UsageError)
    with pytest.raises(SystemExit):
        choose("x", commands, ["--help"])
    assert "export" in capsys.readouterr().out


def test_errors_of_python_functions_name_arguments():
    with pytest.raises(UserError, match="^path a--b: give bpe_path$"), as_arguments(dalle_path="path"):
        raise UserError("--dalle-path a--b: give --bpe-path")
