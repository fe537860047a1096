"""The command line of `python3 -m examples_utils benchmark`, with the flags of the reference."""

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
from typing import Any, Iterator, List, NoReturn, Optional, Sequence

from examples_utils.chart import draw_chart
from examples_utils.metrics import load_custom_metrics
from examples_utils.monitor import GC_MONITOR
from examples_utils.report import FAILED, PASSED, VariantResult, duration, save_results, summary, table
from examples_utils.runner import RunOptions, run_benchmarks
from examples_utils.spec import load_entries, select
from utils.errors import UsageError, UserError, nearest

logger = logging.getLogger(__name__)

PROGRAM = "python3 -m examples_utils"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("{}; {} --help lists all flags".format(message, self.prog))


def make_parser() -> Parser:
    """The parser, with `benchmark` as its one command."""
    parser = Parser(prog=PROGRAM, description="Run the benchmarks of spec files.")
    commands = parser.add_subparsers(dest="command", metavar="benchmark")
    bench = commands.add_parser(
        "benchmark", help="run the benchmarks of spec files", description="Run the benchmarks of spec files, collect "
        "their metrics and write logs, tables and a chart. Exit status: 0, or 1 when one failed, 2 for wrong flags.")
    add = bench.add_argument
    add("--spec", nargs="+", default=["./benchmarks.yml"], metavar="FILE", help="YAML files of benchmarks")
    add("--benchmark", nargs="+", metavar="NAME", help="run only these, in this order")
    add("--include-convergence", action="store_true", help="run those too whose names end in _conv")
    add("--timeout", type=_positive(int), metavar="S", help="seconds after which a benchmark is ended and has failed")
    add("--stop-on-error", action="store_true", help="do not run the rest after one has failed")
    add("--compile-only", action="store_true", help="append --compile-only to the commands; no metrics are read")
    add("--allow-wandb", action="store_true", help="keep the --wandb flags of the commands")
    add("--log-dir", metavar="DIR", help="folder for logs and results (default: ./log_<date-time>)")
    add("--logging", choices=LEVELS, default="INFO", help="level of this log and of Poplar's")
    add("--progress-trace-period", type=_positive(int), metavar="S",
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


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags. Raises UsageError, one line, for those that are unknown, wrong or cannot work here."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        raise UsageError("name a command: {} benchmark --spec benchmarks.yml".format(PROGRAM))
    if rest:
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        known = list(commands.choices[args.command]._option_string_actions)
        raise UsageError("unknown flag '{}'.{} {} {} --help lists all flags".format(
            rest[0], nearest(rest[0].partition("=")[0], known), PROGRAM, args.command))
    if args.upload_checkpoints:
        advice = {"s3": "the reference sends them to a bucket of Graphcore; copy the file that latest_checkpoint_path "
                        "in the results names to a bucket of your own",
                  "wandb": "the reference adds them to a run on a server of Graphcore; give train.py --wandb and run "
                           "with --allow-wandb to follow a run on a server of your own"}
        target = args.upload_checkpoints[0]
        raise UsageError("--upload-checkpoints {} is not possible here: {}".format(target, advice[target]))
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Returns the exit status; raises UserError for what the user got wrong."""
    args = parse(argv)
    with _logging(args.logging) as root:
        if args.gc_monitor and shutil.which(GC_MONITOR) is None:
            raise UserError("--gc-monitor: the program gc-monitor is not on the PATH: activate the Poplar SDK, or "
                            "leave the flag out")
        for flag in ("no_code_sync", "remove_dirs_after"):
            if getattr(args, flag):
                logger.warning("--%s has no effect: nothing is copied to other hosts here; runs over several hosts "
                               "need a file system that they share", flag.replace("_", "-"))
        benchmarks = select(load_entries(args.spec), args.benchmark, args.include_convergence)
        custom = load_custom_metrics(args.custom_metrics_files)
        folder = _log_folder(args.log_dir)
        with _file_log(root, folder / "console.log"):
            logger.info("logs and results: %s", folder)
            if args.requirements_file:
                _install(Path(args.requirements_file))
            options = RunOptions(
                log_folder=folder, log_level=args.logging, timeout=args.timeout,
                progress_period=args.progress_trace_period, allow_wandb=args.allow_wandb,
                compile_only=args.compile_only, stop_on_error=args.stop_on_error,
                additional_metrics=args.additional_metrics, profile=args.profile, gc_monitor=args.gc_monitor,
                custom_metrics=custom)
            results: List[VariantResult] = []
            begin = time.monotonic()
            try:
                with _terminable():
                    run_benchmarks(benchmarks, options, os.environ, results)
            finally:
                if results:
                    save_results(folder, results, args.additional_metrics, args.csv_metrics)
                    _show(results, folder, time.monotonic() - begin)
    return 1 if any(result.status == FAILED for result in results) else 0


def _show(results: Sequence[VariantResult], folder: Path, seconds: float) -> None:
    """The chart, and the table on stdout and in console.log."""
    picture = folder / "benchmark_results.png"
    if picture.exists():  # of an earlier run into this folder
        picture.unlink()
    chart = draw_chart(picture, results)
    text = "\n{}\n\n{} in {}; results: {}\n".format(
        table(results, shutil.get_terminal_size((120, 24)).columns), summary(results), duration(seconds),
        folder / "benchmark_results.{json,csv,xml,png}" if chart else folder / "benchmark_results.{json,csv,xml}")
    if all(result.status not in (PASSED, FAILED) for result in results):
        text += "nothing was run\n"
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
    with open(str(folder / "console.log"), "a", encoding="utf-8") as file:
        file.write(text)


def _log_folder(name: Optional[str]) -> Path:
    folder = Path(name or "log_{:%Y-%m-%d-%H.%M.%S.%f}".format(datetime.now())).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--log-dir: cannot make {}: {}".format(folder, error.strerror or error)) from None
    return folder


def _install(path: Path) -> None:
    if not path.is_file():
        raise UserError("--requirements-file: {} does not exist".format(path))
    logger.info("installing %s", path)
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", str(path)], check=False).returncode:
        raise UserError("--requirements-file: pip could not install {}".format(path))


def _positive(kind: Any) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError("{} is not more than 0".format(text))
        return value

    convert.__name__ = "number"  # argparse names it in "invalid number value"
    return convert


@contextlib.contextmanager
def _logging(level: str) -> Iterator[logging.Logger]:
    """Log this package to stderr while the context lasts."""
    root = logging.getLogger("examples_utils")
    with _handler(root, logging.StreamHandler(sys.stderr)):
        before = root.level, root.propagate
        root.setLevel(level)
        root.propagate = False
        try:
            yield root
        finally:
            root.setLevel(before[0])
            root.propagate = before[1]


@contextlib.contextmanager
def _file_log(root: logging.Logger, path: Path) -> Iterator[None]:
    try:
        handler = logging.FileHandler(str(path), encoding="utf-8")
    except OSError as error:
        raise UserError("--log-dir: cannot write {}: {}".format(path, error.strerror or error)) from None
    with _handler(root, handler):
        yield


@contextlib.contextmanager
def _handler(root: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(asctime)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C: benchmarks have sessions of their own and would go on without us."""
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
