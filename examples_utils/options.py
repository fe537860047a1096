"""The flags of `python3 -m examples_utils benchmark`, those of the reference."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from utils.options import Command, Options, choose, option

PROGRAM = "python3 -m examples_utils"


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The flags of `benchmark`, those of the reference."""

    spec: tuple[str, ...] = option(("./benchmarks.yml",), "YAML files of benchmarks", path=True)
    list: bool = option(False, "list the benchmarks of the spec files and stop")
    benchmark: tuple[str, ...] | None = option(None, "run only these, in this order", none="all")
    include_convergence: bool = option(False, "also run those whose names end in _conv")
    timeout: int | None = option(None, "seconds after which a benchmark is ended and fails", ge=1)
    stop_on_error: bool = option(False, "stop after the first one that fails")
    compile_only: bool = option(False, "append --compile-only to the commands; no metrics are read")
    allow_wandb: bool = option(False, "keep the --wandb flags of the commands")
    log_dir: str | None = option(None, "folder for logs and results", none="./log_<date-time>", path=True)
    logging: str = option("INFO", "level of this log and of Poplar's",
                          choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    progress_trace_period: int | None = option(None, "seconds between progress lines", ge=1,
                                               none="1 on a terminal, else 60")
    additional_metrics: bool = option(False, "more columns in the CSV: duration, loss, command, commit")
    csv_metrics: tuple[str, ...] = option((), "further metrics as columns of the CSV")
    custom_metrics_files: tuple[str, ...] = option((), "Python files that call examples_utils.register_custom_metric",
                                                   path=True)
    requirements_file: str | None = option(None, "pip install this before the benchmarks", path=True)
    profile: bool = option(False, "PopVision profiles of the benchmarks on IPUs")
    gc_monitor: bool = option(False, "record the output of gc-monitor (Poplar SDK) every 5 seconds")
    upload_checkpoints: tuple[str, ...] = option((), "not possible here", choices=("wandb", "s3"), check=lambda _: (
        "left out: copy what latest_checkpoint_path in the results names, or run train.py --wandb with --allow-wandb"))
    no_code_sync: bool = option(False, "no effect: code is never copied to other hosts here")
    remove_dirs_after: bool = option(False, "no effect: nothing is copied to other hosts here")


COMMAND = Command(f"{PROGRAM} benchmark", "Run the benchmarks of spec files, collect their metrics and write logs, "
                  "tables and a chart. Exit status: 0, or 1 when one failed, 2 for wrong flags.", BenchmarkOptions)


def parse(argv: Sequence[str] | None = None) -> BenchmarkOptions:
    """Read the flags. Raises UsageError, one line, for those that are unknown, wrong or cannot work here."""
    _, words = choose(PROGRAM, {"benchmark": COMMAND}, argv)
    return COMMAND.parse(words)
