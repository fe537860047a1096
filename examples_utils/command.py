"""From the `cmd` of an entry to the words of a process. No shell is involved; the rules are those of the reference."""
from __future__ import annotations

import logging
import re
import shlex
from typing import Mapping, NamedTuple, Sequence

from examples_utils.spec import Variant
from utils.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
VIPU_FLAG = re.compile(r"--vipu-(?:partition|server-host|server-port)(?:=|\s+)\S+\s*")


class Command(NamedTuple):
    """What to run: `text` is what the results call the command, `words` the process's arguments."""

    text: str
    words: Sequence[str]
    unset: Sequence[str] = ()  # environment variables that the command names and nobody set

    @property
    def num_processes(self) -> int:
        """N of `mpirun --np N`, else 1: each process then logs its own throughput only."""
        names = [word.rpartition("/")[2] for word in self.words]
        launcher = self.words[names.index("mpirun"):python_index(self.words)] if "mpirun" in names else ()
        number = option_value(launcher, "--np") or ""
        return max(int(number), 1) if number.isdigit() else 1


def option_value(words: Sequence[str], *flags: str) -> str | None:
    """The value of the last `--flag value` or `--flag=value` among the words."""
    value = None
    for word, after in zip(words, [*words[1:], None]):
        flag, equals, rest = word.partition("=")
        if flag in flags:
            value = rest if equals else after
    return value


def build_command(variant: Variant, env: Mapping[str, str], allow_wandb: bool = False,
                  compile_only: bool = False) -> Command:
    """Fill in parameters, make the script's path absolute, strip wandb flags, expand `env`, split into words.

    Raises UserError when the entry's cmd cannot be filled in, split, or calls no Python.
    """
    benchmark, unset = variant.benchmark, []
    where = f"{benchmark.spec_path.name}: '{benchmark.name}': cmd"

    def expanded(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in env:
            unset.append(name)
        return env.get(name, match[0])

    try:
        text = benchmark.cmd.format(**variant.params)
    except (ValueError, LookupError, AttributeError) as error:
        unknown = f" names {{{error.args[0]}}}, which is no key of parameters" if isinstance(error, KeyError) else ""
        raise UserError(f"{where}{unknown or f': {error}'} (for a literal brace write {{{{ or }}}})") from None
    parts = text.split()
    index = python_index(parts) + 1
    if not 0 < index < len(parts):
        raise UserError(f"{where} must call `python3 SCRIPT` or `python3 -m MODULE`: {' '.join(parts)}")
    if not parts[index].startswith(("-", "$")):  # a flag such as -m, or a path that a variable makes
        # Absolute, so that a command copied from the results runs in any folder.
        parts[index] = shlex.quote(str((benchmark.folder / parts[index].strip("'\"")).resolve()))
    text = " ".join(parts)
    try:
        if "--wandb" in text and (compile_only or not (allow_wandb or benchmark.allow_wandb)):
            logger.info("the wandb flags of %s are left out%s", variant.name,
                        "" if compile_only else "; --allow-wandb keeps them")
            text = _without_wandb(text)
        if compile_only:
            text = VIPU_FLAG.sub("", text).strip() + " --compile-only"
        return Command(text, tuple(shlex.split(VARIABLE.sub(expanded, text))), tuple(unset))
    except ValueError as error:
        raise UserError(f"{where}: {str(error).lower()}: {text}") from None


def python_index(words: Sequence[str]) -> int:
    """Position of the Python that the command calls: the first `python3`, else the first `python`; -1: none."""
    return next((words.index(name) for name in ("python3", "python") if name in words), -1)


def _without_wandb(text: str) -> str:
    """Drop every flag with wandb in its name, and the word after it unless that is a flag."""
    kept, dropped = [], False
    for word in shlex.split(text):
        is_value = dropped and not word.startswith("-")
        dropped = word.startswith("-") and "wandb" in word and "=" not in word
        if not is_value and not (word.startswith("-") and "wandb" in word):
            kept.append(word)
    return shlex.join(kept)
