"""The command line of `python3 -m examples_utils benchmark`, with the flags of the reference."""
from __future__ import annotations

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
from examples_utils import report
from examples_utils.metrics import load_custom_metrics
from examples_utils.options import parse
from examples_utils.runner import GC_MONITOR, run_benchmarks
from examples_utils.spec import load_entries, make_benchmark, select
from utils.errors import UserError
from utils.files import make_folder

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status; raises UserError for what the user got wrong."""
    flags = parse(argv)
    log.setup(level=flags.logging)
    if flags.gc_monitor and shutil.which(GC_MONITOR) is None:
        raise UserError("--gc-monitor: the program gc-monitor is not on the PATH: activate the Poplar SDK, or run "
                        "without the flag")
    for flag in {"--no-code-sync", "--remove-dirs-after"}.intersection(flags.given()):
        logger.warning("%s has no effect: nothing is copied to other hosts here; runs over several hosts need a "
                       "shared file system", flag)
    entries = load_entries(flags.spec)
    if flags.list:
        listed = [make_benchmark(name, *entry) for name, entry in entries.items() if "options" not in name]
        width = max((len(item.name) for item in listed), default=0)
        sys.stdout.writelines(f"{item.name:<{width}}  {' '.join(item.settings.cmd.split())}\n" for item in listed)
        return 0
    benchmarks = select(entries, flags.benchmark, flags.include_convergence)
    load_custom_metrics(flags.custom_metrics_files)
    folder = make_folder("--log-dir", Path(flags.log_dir or f"log_{datetime.now():%Y-%m-%d-%H.%M.%S.%f}").resolve())
    log.setup(folder, level=flags.logging, file_name="console.log")
    logger.info("logs and results: %s", folder)
    if flags.requirements_file:
        install = [sys.executable, "-m", "pip", "install", "-q", "-r", flags.requirements_file]
        if subprocess.run(install, check=False).returncode:
            raise UserError(f"--requirements-file: pip could not install {flags.requirements_file}")
    results: list[report.VariantResult] = []
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Benchmarks have sessions of their own and would not end with us: end like after Ctrl-C.
        for number in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        try:
            run_benchmarks(benchmarks, flags, folder, os.environ, results)
        finally:
            if results:
                more = report.ADDITIONAL_METRICS if flags.additional_metrics else ()
                report.save_results(folder, results, (*report.CSV_METRICS, *more, *flags.csv_metrics))
                _show(results, folder, time.monotonic() - begin)
    return int(any(result.status == report.FAILED for result in results))


def _show(results: Sequence[report.VariantResult], folder: Path, seconds: float) -> None:
    """The chart, and the table on stdout and in console.log."""
    picture = folder / "benchmark_results.png"
    picture.unlink(missing_ok=True)  # of an earlier run into this folder
    kinds = "json,csv,xml,png" if report.draw_chart(picture, results) else "json,csv,xml"
    text = (f"\n{report.table(results, shutil.get_terminal_size((120, 24)).columns)}\n\n{report.summary(results)} in "
            f"{log.duration(seconds)}; results: {folder}/benchmark_results.{{{kinds}}}\n")
    if all(result.status == report.SKIPPED for result in results):
        text += "nothing was run\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    # log.setup has warned if there is no console.log.
    with contextlib.suppress(OSError), open(folder / "console.log", "a", encoding="utf-8") as file:
        file.write(text)
