"""The command line of `python3 -m examples_utils benchmark`, with the flags of the reference."""
from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Sequence

import log
from examples_utils.metrics import load_custom_metrics
from examples_utils.process import GC_MONITOR
from examples_utils.report import FAILED, SKIPPED, VariantResult, draw_chart, duration, save_results, summary, table
from examples_utils.runner import run_benchmarks
from examples_utils.spec import load_entries, select
from utils.errors import UsageError, UserError
from utils.flags import Parser, parse_flags, whole

logger = logging.getLogger(__name__)
PROGRAM = "python3 -m examples_utils"


def make_parser() -> Parser:
    """The parser, with `benchmark` as its one command."""
    parser = Parser(prog=PROGRAM, description="Run the benchmarks of spec files, collect their metrics and write logs, "
                    "tables and a chart. Exit status: 0, or 1 when one failed, 2 for wrong flags.")
    add = parser.add_argument
    add("command", nargs="?", choices=("benchmark",), help="run the benchmarks of spec files")
    add("--spec", nargs="+", default=["./benchmarks.yml"], metavar="FILE", help="YAML files of benchmarks")
    add("--benchmark", nargs="+", metavar="NAME", help="run only these, in this order")
    add("--include-convergence", action="store_true", help="run those too whose names end in _conv")
    add("--timeout", type=whole(1), metavar="S", help="seconds after which a benchmark is ended and has failed")
    add("--stop-on-error", action="store_true", help="do not run the rest after one has failed")
    add("--compile-only", action="store_true", help="append --compile-only to the commands; no metrics are read")
    add("--allow-wandb", action="store_true", help="keep the --wandb flags of the commands")
    add("--log-dir", metavar="DIR", help="folder for logs and results (default: ./log_<date-time>)")
    add("--logging", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), default="INFO",
        help="level of this log and of Poplar's")
    add("--progress-trace-period", type=whole(1), metavar="S",
        help="seconds between progress lines (default: 1 on a terminal, else 60)")
    add("--additional-metrics", action="store_true", help="more columns in the CSV: duration, loss, command, commit")
    add("--csv-metrics", nargs="+", default=[], metavar="METRIC", help="further metrics as columns of the CSV")
    add("--custom-metrics-files", nargs="+", default=[], metavar="FILE",
        help="Python files that call examples_utils.register_custom_metric")
    add("--requirements-file", metavar="FILE", help="pip install this before the benchmarks")
    add("--profile", action="store_true", help="PopVision profiles of the benchmarks on IPUs")
    add("--gc-monitor", action="store_true", help="record what gc-monitor of the Poplar SDK says every 5 seconds")
    add("--upload-checkpoints", nargs="+", choices=("wandb", "s3"), default=[], help="not possible here")
    add("--no-code-sync", action="store_true", help="no effect: code is never copied to other hosts here")
    add("--remove-dirs-after", action="store_true", help="no effect: nothing is copied to other hosts here")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags. Raises UsageError, one line, for those that are unknown, wrong or cannot work here."""
    flags = parse_flags(make_parser(), argv)
    if flags.command is None:
        raise UsageError(f"name a command: {PROGRAM} benchmark --spec benchmarks.yml")
    if flags.upload_checkpoints:
        advice = {"s3": "the reference sends them to a bucket of Graphcore; copy the file that latest_checkpoint_path "
                        "in the results names to a bucket of your own",
                  "wandb": "the reference adds them to a run on a server of Graphcore; give train.py --wandb and run "
                           "with --allow-wandb to follow a run on a server of your own"}
        target = flags.upload_checkpoints[0]
        raise UsageError(f"--upload-checkpoints {target} is not possible here: {advice[target]}")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status; raises UserError for what the user got wrong."""
    flags = parse(argv)
    log.setup(level=flags.logging)
    if flags.gc_monitor and shutil.which(GC_MONITOR) is None:
        raise UserError("--gc-monitor: the program gc-monitor is not on the PATH: activate the Poplar SDK, or leave "
                        "the flag out")
    for flag in ("no_code_sync", "remove_dirs_after"):
        if getattr(flags, flag):
            logger.warning("--%s has no effect: nothing is copied to other hosts here; runs over several hosts need a "
                           "file system that they share", flag.replace("_", "-"))
    benchmarks = select(load_entries(flags.spec), flags.benchmark, flags.include_convergence)
    load_custom_metrics(flags.custom_metrics_files)
    folder = Path(flags.log_dir or f"log_{datetime.now():%Y-%m-%d-%H.%M.%S.%f}").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log-dir: cannot make {folder}: {error.strerror or error}") from None
    log.setup(folder, level=flags.logging, file_name="console.log")
    logger.info("logs and results: %s", folder)
    if flags.requirements_file:
        _install(Path(flags.requirements_file))
    results: list[VariantResult] = []
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Benchmarks have sessions of their own and would go on without us: end like after Ctrl-C.
        for number in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        try:
            run_benchmarks(benchmarks, flags, folder, os.environ, results)
        finally:
            if results:
                save_results(folder, results, flags.additional_metrics, flags.csv_metrics)
                _show(results, folder, time.monotonic() - begin)
    return int(any(result.status == FAILED for result in results))


def _show(results: Sequence[VariantResult], folder: Path, seconds: float) -> None:
    """The chart, and the table on stdout and in console.log."""
    picture = folder / "benchmark_results.png"
    with contextlib.suppress(FileNotFoundError):  # of an earlier run into this folder
        picture.unlink()
    kinds = "json,csv,xml,png" if draw_chart(picture, results) else "json,csv,xml"
    text = (f"\n{table(results, shutil.get_terminal_size((120, 24)).columns)}\n\n{summary(results)} in "
            f"{duration(seconds)}; results: {folder}/benchmark_results.{{{kinds}}}\n")
    if all(result.status == SKIPPED for result in results):
        text += "nothing was run\n"
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
    # Where there can be no console.log, it has been said.
    with contextlib.suppress(OSError), open(folder / "console.log", "a", encoding="utf-8") as file:
        file.write(text)


def _install(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--requirements-file: {path} does not exist")
    logger.info("installing %s", path)
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", str(path)], check=False).returncode:
        raise UserError(f"--requirements-file: pip could not install {path}")
