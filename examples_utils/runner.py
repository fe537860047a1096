"""`python3 -m examples_utils benchmark`: select benchmarks, run their variants one after another, show the results."""
from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Mapping, Sequence

import log
from dalle.prompt_folders import with_digest
from examples_utils import metrics, report, spec
from examples_utils.machine import missing, needs
from examples_utils.process import run
from examples_utils.spec import FAILED, PASSED, Benchmark, Variant, load_entries, option_value, python_index, select
from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.options import Command, Options, choose, option

logger = logging.getLogger(__name__)

ERROR_LINE = re.compile(r"\s*(?:\[[^\]]*\]:?)*\s*(?:error|[\w.]*(?:Error|Exception|Interrupt)):? ", re.ASCII)
GC_MONITOR = "gc-monitor"  # a program of the Poplar SDK
TIME = "%Y-%m-%d-%H.%M.%S.%f"


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The flags, those of the reference."""

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


PROGRAM = "python3 -m examples_utils"
COMMAND = Command(f"{PROGRAM} benchmark", "Run the benchmarks of spec files, collect their metrics and write logs, "
                  "tables and a chart. Exit status: 0, or 1 when one failed, 2 for wrong flags.", BenchmarkOptions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status; raises UserError for what the user got wrong."""
    flags = COMMAND.parse(choose(PROGRAM, {"benchmark": COMMAND}, argv)[1])
    log.setup(level=flags.logging)
    if flags.gc_monitor and shutil.which(GC_MONITOR) is None:
        raise UserError("--gc-monitor: the program gc-monitor is not on the PATH: activate the Poplar SDK, or run "
                        "without the flag")
    for flag in {"--no-code-sync", "--remove-dirs-after"}.intersection(flags.given()):
        logger.warning("%s has no effect: nothing is copied to other hosts here; runs over several hosts need a "
                       "shared file system", flag)
    entries = load_entries(flags.spec)
    if flags.list:
        listed = select(entries, None, include_convergence=True)
        width = max(len(item.name) for item in listed)
        sys.stdout.writelines(f"{item.name:<{width}}  {' '.join(item.settings.cmd.split())}\n" for item in listed)
        return 0
    benchmarks = select(entries, flags.benchmark, flags.include_convergence)
    metrics.load_custom_metrics(flags.custom_metrics_files)
    folder = make_folder("--log-dir", Path(flags.log_dir or f"log_{datetime.now():{TIME}}").resolve())
    log.setup(folder, level=flags.logging, file_name="console.log")
    logger.info("logs and results: %s", folder)
    if flags.requirements_file:
        install = [sys.executable, "-m", "pip", "install", "-q", "-r", flags.requirements_file]
        if subprocess.run(install, check=False).returncode:
            raise UserError(f"--requirements-file: pip could not install {flags.requirements_file}")
    # Benchmarks have sessions of their own and would not end with us: end like after Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup lets SIGHUP be ignored
            signal.signal(number, signal.default_int_handler)
    found = [variant for item in benchmarks for variant in _prepare(item, flags, os.environ)]
    begin = time.monotonic()
    try:
        _run_all(found, flags, folder)
    finally:
        more = report.ADDITIONAL_METRICS if flags.additional_metrics else ()
        report.save_results(folder, found, (*report.CSV_METRICS, *more, *flags.csv_metrics))
        report.show(found, folder, time.monotonic() - begin)
    return int(any(variant.status == FAILED for variant in found))


def _prepare(benchmark: Benchmark, flags: BenchmarkOptions, env: Mapping[str, str]) -> list[Variant]:
    """The variants of a benchmark with their environments, and the reasons why they cannot run here, if any."""
    env = {**env, **benchmark.env}
    found = spec.variants(benchmark, env, flags.allow_wandb, flags.compile_only)
    for variant in found:
        if "ipu" in dict(needs(variant)):
            variant.added = {"POPLAR_LOG_LEVEL": flags.logging, "POPART_LOG_LEVEL": flags.logging}
            if flags.profile:
                variant.added["POPLAR_ENGINE_OPTIONS"] = _profile_options(variant, env)
        elif flags.profile:
            logger.warning("--profile: %s uses no IPU, there is nothing to profile", variant.name)
        variant.added = {**variant.added, **benchmark.env}
        # `python3` is the Python of this runner: the first one of the PATH may have none of our packages. Unbuffered,
        # a command that is ended at its time limit loses no output.
        path = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
        variant.env = {"PYTHONUNBUFFERED": "1", **env, **variant.added, "PATH": path}
        variant.reason = next(missing(variant, flags.compile_only), "")
    return found


def _profile_options(variant: Variant, env: Mapping[str, str]) -> str:
    """POPLAR_ENGINE_OPTIONS that make Poplar write a PopVision profile beside the application."""
    try:
        engine = json.loads(env.get("POPLAR_ENGINE_OPTIONS") or "{}")
    except ValueError:
        raise UserError("--profile: the environment variable POPLAR_ENGINE_OPTIONS is not JSON") from None
    folder = variant.benchmark.folder / (folder_name(variant.name) + "_profile")
    return json.dumps({**engine, "autoReport.all": "true", "autoReport.directory": str(folder),
                       "autoReport.outputSerializedGraph": "false"})


def _run_all(found: Sequence[Variant], flags: BenchmarkOptions, folder: Path) -> None:
    """Run what can run, and fill in the outcomes, after Ctrl-C too. folder: of all logs."""
    stopped = ""
    with open(folder / "output.log", "wb", buffering=0) as combined:
        for number, variant in enumerate(found, start=1):
            variant.reason = stopped or variant.reason
            if variant.reason:
                logger.info("%s: skipped: %s", variant.name, variant.reason)
                continue
            logger.info("%s: running (%d of %d)", variant.name, number, len(found))
            try:
                _run(variant, flags, folder / folder_name(variant.name), combined)
            except KeyboardInterrupt:
                variant.reason, variant.exitcode = "interrupted", 130
                for rest in found[number:]:
                    rest.reason = "interrupted before it began"
                raise
            if variant.status == FAILED and flags.stop_on_error:
                stopped = f"skipped because {variant.name} failed and --stop-on-error was given"


def _run(variant: Variant, flags: BenchmarkOptions, logs: Path, combined: IO[bytes]) -> None:
    """Run one variant, and fill in its outcome."""
    variant.status, variant.log_folder, variant.start = FAILED, logs, datetime.now()
    logs.mkdir(parents=True, exist_ok=True)
    logger.info("    command: %s\n    in: %s", variant.text, variant.benchmark.folder)
    for key, value in variant.added.items():
        logger.info("    with %s=%s", key, value)
    variant.exitcode, variant.seconds, variant.reason = _execute(variant, flags, logs, combined)
    if variant.exitcode and not variant.reason:
        variant.reason = f"exit status {variant.exitcode}{_last_words(logs)}"
    metrics.collect(variant, logs, flags.compile_only)
    variant.status = FAILED if variant.reason else PASSED
    if flags.additional_metrics:
        commit = f"git -C {shlex.quote(str(variant.benchmark.folder))} rev-parse --verify HEAD 2>/dev/null"
        more = {"test_duration": variant.seconds, "cmd": " ".join(variant.words), "result": str(not variant.reason),
                "git_commit_hash": subprocess.getoutput(commit) or "Not a git repo",
                "env": "".join(f"{key}={value} " for key, value in variant.added.items())}
        variant.results.update({name: {name: value} for name, value in more.items()})
    variant.checkpoint = _newest_checkpoint(variant)
    write_json(logs / "variant_result.json", report.record(variant), **report.JSON)
    for name in variant.results:
        if not isinstance(variant.value(name), str):
            logger.info("    %s = %s", name, variant.value(name))
    if variant.reason:
        tail = "\n    ".join([line for line in metrics.lines(logs, "stderr") if line.strip()][-20:])
        logger.error("%s: failed: %s; last lines of %s/stderr:\n    %s", variant.name, variant.reason, logs, tail)
    else:
        logger.info("%s: passed in %.1f s", variant.name, variant.seconds)


def _execute(variant: Variant, flags: BenchmarkOptions, logs: Path, combined: IO[bytes]) -> tuple[int, float, str]:
    """pip install what the entry's requirements_file lists, and run the command."""
    settings, folder = variant.benchmark.settings, variant.benchmark.folder
    if settings.requirements_file:
        pip = [sys.executable, "-m", "pip", "install", "-r", settings.requirements_file]
        status, seconds, _ = run(pip, folder, variant.env, logs, combined)
        if status:
            return status, seconds, f"requirements_file: pip could not install {settings.requirements_file}"
        for name in metrics.STREAMS:
            (logs / name).replace(logs / f"requirements_{name}")
    words, monitor = list(variant.words), logs / "ipu-monitor.jsonl"
    words[python_index(words)] = sys.executable
    limit = min(flags.timeout or math.inf, settings.timeout or math.inf)
    monitor.unlink(missing_ok=True)  # of an earlier run into this folder
    recording = flags.gc_monitor
    with log.progress(None, variant.name, unit="second", interval=flags.progress_trace_period or 60) as progress:
        def tick(seconds: float) -> None:
            nonlocal recording
            progress.update(int(seconds) - progress.count)
            if recording and int(seconds) % 5 == 0:
                try:
                    said = subprocess.check_output([GC_MONITOR, "--json"], stderr=subprocess.DEVNULL, timeout=60)
                    with open(monitor, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"timestamp": f"{datetime.now():{TIME}}", **json.loads(said)}) + "\n")
                except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
                    logger.warning("--gc-monitor stops: %s", error)
                    recording = False

        return run(words, folder, variant.env, logs, combined, limit, tick)


def _newest_checkpoint(variant: Variant) -> Path | None:
    """The newest checkpoint file of this run in --checkpoint-output-dir, or its folder when there is one for each."""
    name = option_value(variant.words, "--checkpoint-output-dir", "--checkpoint_output_dir")
    folder = variant.benchmark.folder / name
    found = [path for depth in ("*", "*/*") if name for path in folder.glob(depth)
             if path.suffix in (".pt", ".pth", ".h5") and path.is_file()]
    newest = max(found, key=os.path.getmtime, default=None)
    if newest is None or os.path.getmtime(newest) < variant.start.timestamp() - 1:
        return None
    return (newest if newest.parent == folder else newest.parent).resolve()


def _last_words(logs: Path) -> str:
    """`: ` and the last line that names an error, else the last one with a word in it; nothing if there is none."""
    lines = [line for line in metrics.lines(logs, "stderr") if re.search(r"[^\W\d_]", line)]
    words = " ".join(next(filter(ERROR_LINE.match, reversed(lines)), lines[-1] if lines else "").split())
    return f": {textwrap.shorten(words, 200)}" if words else ""


def folder_name(variant_name: str) -> str:
    """A variant's name as a folder: parameters may hold slashes, and file systems take 255 bytes."""
    name = re.sub(r"^\.|[^\w.,=+@-]", "_", variant_name)
    # Variants that differ only in what was replaced or cut off must not share a folder.
    return name if name == variant_name and len(name.encode()) <= 150 else with_digest(name, variant_name)
