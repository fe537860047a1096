"""From the `cmd` of an entry to the words of a process. No shell is involved; the rules are those of the reference."""

import logging
import re
import shlex
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Tuple

from examples_utils.spec import Variant
from utils.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
VIPU_FLAG = re.compile(r"--vipu-(?:partition|server-host|server-port)(?:=|\s+)\S+\s*")


@dataclass(frozen=True)
class Command:
    """What to run: `text` is what the results call the command, `words` the process's arguments."""

    text: str
    words: Tuple[str, ...]
    unset: Tuple[str, ...] = ()  # environment variables that the command names and nobody set

    @property
    def num_processes(self) -> int:
        """N of `mpirun --np N`, else 1: each process then logs its own throughput only."""
        names = [word.rpartition("/")[2] for word in self.words]
        if "mpirun" in names:
            launcher = self.words[names.index("mpirun"):max(python_index(self.words), 0)]
            number = option_value(launcher, "--np")
            if number is not None and number.isdigit():
                return max(int(number), 1)
        return 1


def option_value(words: Sequence[str], *flags: str) -> Optional[str]:
    """The value of the last `--flag value` or `--flag=value` among the words."""
    value = None
    for index, word in enumerate(words):
        flag, equals, after = word.partition("=")
        if flag in flags:
            if equals:
                value = after
            elif index + 1 < len(words):
                value = words[index + 1]
    return value


def build_command(variant: Variant, env: Mapping[str, str], allow_wandb: bool = False,
                  compile_only: bool = False) -> Command:
    """Fill in parameters, make the script's path absolute, strip wandb flags, expand `env`, split into words.

    Raises UserError when the entry's cmd cannot be filled in, split, or calls no Python.
    """
    benchmark = variant.benchmark
    where = "{}: '{}': cmd".format(benchmark.spec_path.name, benchmark.name)
    try:
        text = benchmark.cmd.format(**variant.params)
    except KeyError as error:
        raise UserError("{} names {{{}}}, which is no key of parameters (for a literal brace write {{{{ or }}}})"
                        .format(where, error.args[0])) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError("{}: {} (for a literal brace write {{{{ or }}}})".format(where, error)) from None
    parts = _absolute_script(text.split(), variant, where)
    text = " ".join(parts)
    try:
        if "--wandb" in text and (compile_only or not (allow_wandb or benchmark.allow_wandb)):
            logger.info("the wandb flags of %s are left out%s", variant.name,
                        "" if compile_only else "; --allow-wandb keeps them")
            text = _without_wandb(text)
        if compile_only:
            text = VIPU_FLAG.sub("", text).strip() + " --compile-only"
        expanded, unset = expand(text, env)
        return Command(text, tuple(shlex.split(expanded)), tuple(unset))
    except ValueError as error:
        raise UserError("{}: {}: {}".format(where, str(error).lower(), text)) from None


def expand(text: str, env: Mapping[str, str]) -> Tuple[str, List[str]]:
    """Replace $NAME and ${NAME} by their values in `env`; names that are not set stay as they are and are returned."""
    unset = []

    def value(match: "re.Match[str]") -> str:
        name = match.group(1) or match.group(2)
        if name in env:
            return env[name]
        if re.fullmatch(r"[A-Za-z_]\w*", name):
            unset.append(name)
        return match.group(0)

    return VARIABLE.sub(value, text), unset


def python_index(words: Sequence[str]) -> int:
    """Position of the Python that the command calls: the first `python3`, else the first `python`; -1: none."""
    for name in ("python3", "python"):
        if name in words:
            return words.index(name)
    return -1


def _absolute_script(parts: List[str], variant: Variant, where: str) -> List[str]:
    """Make the word after Python absolute, so that a command copied from the results runs in any folder."""
    index = python_index(parts)
    if index < 0 or index + 1 >= len(parts):
        raise UserError("{} must call `python3 SCRIPT` or `python3 -m MODULE`: {}".format(where, " ".join(parts)))
    script = parts[index + 1]
    if not script.startswith(("-", "$")):  # a flag such as -m, or a path that a variable makes
        parts[index + 1] = shlex.quote(str((variant.benchmark.folder / script.strip("'\"")).resolve()))
    return parts


def _without_wandb(text: str) -> str:
    """Drop every flag with wandb in its name, and the word after it unless that is a flag."""
    kept: List[str] = []
    words = shlex.split(text)
    index = 0
    while index < len(words):
        if words[index].startswith("-") and "wandb" in words[index]:
            has_value = index + 1 < len(words) and not words[index + 1].startswith("-")
            index += 2 if has_value and "=" not in words[index] else 1
            continue
        kept.append(words[index])
        index += 1
    return " ".join(shlex.quote(word) for word in kept)
