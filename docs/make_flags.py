"""Write docs/flags.md, the flags of all commands, from their declarations.

    python -m docs.make_flags
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import args
import bpe.train
import checkpoints.__main__
import dalle.evaluation
import dalle.export
import dalle.generation
import data.process_trainset
import examples_utils.runner
import server.options
import training.vqgan_options
import utils.archives
from benchmarks import busy, compare_peers, serve_load
from ops.explain import COMMAND as OPS
from server.schemas import SPECS
from utils.files import atomic_write
from utils.options import Command, Option, flag_name

FILE = Path(__file__).resolve().parent / "flags.md"
COMMANDS: tuple[Command[Any], ...] = (
    args.COMMAND,
    dalle.generation.COMMAND,
    dalle.evaluation.COMMAND,
    server.options.COMMAND,
    training.vqgan_options.COMMAND,
    data.process_trainset.COMMAND,
    bpe.train.COMMAND,
    checkpoints.__main__.EXPORT,
    checkpoints.__main__.VERIFY,
    dalle.export.COMMAND,
    OPS,
    examples_utils.runner.COMMAND,
    compare_peers.COMMAND,
    busy.COMMAND,
    serve_load.COMMAND,
    utils.archives.COMMAND,
)
INTRODUCTION = """# Flags
Written by `python -m docs.make_flags` from the declarations. Flags may be spelled with `-` or `_`. Booleans stand alone
or take `true` or `false`; `none` empties an option that may be empty. Every command has `--help` and `--version`.
"""


def page() -> str:
    """The content of docs/flags.md."""
    return INTRODUCTION + "".join(_section(command) for command in COMMANDS) + _parameters()


def _section(command: Command[Any]) -> str:
    def named(spec: Option) -> str:
        return f"`{spec.flag}`" + (f", `{spec.settings['short']}`" if "short" in spec.settings else "")

    lines = ["", f"## {command.name}", command.about]
    if command.groups:
        lines += ["", "| flag | default | meaning |", "|---|---|---|"]
    for title, specs in command.groups:
        lines += [f"| **{title}** | | |"] if title else []
        lines += [_row(spec, named(spec), flag_name) for spec in specs]
    return "\n".join(lines) + "\n"


def _parameters() -> str:
    """Those of requests to the server, which are declared as flags are."""
    lines = ["", "## Parameters of the images API", "See [server](server.md).", ""]
    lines += ["| parameter | default | meaning |", "|---|---|---|"]
    lines += [_row(spec, f"`{spec.name}`", str) for spec in SPECS.values()]
    return "\n".join(lines) + "\n"


def _row(spec: Option, names: str, named: Callable[[str], str]) -> str:
    settings = spec.settings
    notes = [", ".join(settings["choices"])] if "choices" in settings else []
    notes += [str(spec.within)] if str(spec.within) else []
    notes += [f"with {named(settings['needs'])}"] if "needs" in settings else []
    meaning = settings["help"] + (f" ({'; '.join(notes)})" if notes else "")
    cells = [names, _relative(spec.default_text), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _relative(default: str) -> str:
    """A default relative to the repository."""
    return default.replace(str(FILE.parents[1]) + "/", "")


if __name__ == "__main__":
    with atomic_write(FILE) as file:
        file.write(page())
