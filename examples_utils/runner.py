"""Run the variants of the selected benchmarks one after another and collect their results."""
from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import IO, Mapping, Sequence

import log
from dalle.prompt_folders import with_digest
from examples_utils import metrics
from examples_utils.machine import POPLAR, Machine, hardware, missing
from examples_utils.options import BenchmarkOptions
from examples_utils.process import STREAMS, Outcome, run
from examples_utils.report import FAILED, PASSED, SKIPPED, VariantResult, write_json
from examples_utils.spec import Benchmark, Variant, option_value, python_index, variants
from utils.errors import UserError

logger = logging.getLogger(__name__)

ERROR_LINE = re.compile(r"\s*(?:\[[^\]]*\]:?)*\s*(?:error|[\w.]*(?:Error|Exception|Interrupt)):? ", re.ASCII)
TAIL_LINES = 20
GC_MONITOR = "gc-monitor"  # a program of the Poplar SDK


def run_benchmarks(benchmarks: Sequence[Benchmark], flags: BenchmarkOptions, folder: Path, env: Mapping[str, str],
                   results: list[VariantResult]) -> None:
    """Run everything. `results` receives one entry per variant, and has all of them after Ctrl-C too.

    folder: of all logs; it exists. Raises UserError before anything runs when an entry is wrong.
    """
    machine = Machine(env)
    for benchmark in benchmarks:
        own = {**env, **benchmark.env}
        results += [_prepare(variant, flags, own, machine)
                    for variant in variants(benchmark, own, flags.allow_wandb, flags.compile_only)]
    stopped = ""
    with open(folder / "output.log", "wb", buffering=0) as combined:
        for number, result in enumerate(results, start=1):
            name, result.reason = result.variant.name, stopped or result.reason
            if result.reason:
                logger.info("%s: skipped: %s", name, result.reason)
                continue
            logger.info("%s: running (%d of %d)", name, number, len(results))
            try:
                _run(result, flags, folder / folder_name(name), combined)
            except KeyboardInterrupt:
                result.reason, result.exitcode = "interrupted", 130
                for rest in results[number:]:
                    rest.reason = "interrupted before it began"
                raise
            if result.status == FAILED and flags.stop_on_error:
                stopped = f"skipped because {name} failed and --stop-on-error was given"


def _prepare(variant: Variant, flags: BenchmarkOptions, env: Mapping[str, str], machine: Machine) -> VariantResult:
    """The result of a variant before it runs; with a reason if it cannot."""
    added: dict[str, str] = {}
    if hardware(variant)[0]:
        added.update(POPLAR_LOG_LEVEL=flags.logging, POPART_LOG_LEVEL=flags.logging)
        if flags.profile:
            added["POPLAR_ENGINE_OPTIONS"] = _profile_options(variant, env)
    elif flags.profile:
        logger.warning("--profile: %s uses no IPU, there is nothing to profile", variant.name)
    added.update(variant.benchmark.env)
    env = {**env, **added}
    reason = next(missing(variant, env, machine, flags.compile_only), "")
    return VariantResult(variant, SKIPPED, reason, env=env, added=added)


def _profile_options(variant: Variant, env: Mapping[str, str]) -> str:
    """POPLAR_ENGINE_OPTIONS that make Poplar write a PopVision profile beside the application."""
    try:
        engine = json.loads(env.get("POPLAR_ENGINE_OPTIONS") or "{}")
    except ValueError:
        raise UserError("--profile: the environment variable POPLAR_ENGINE_OPTIONS is not JSON") from None
    folder = variant.benchmark.folder / (folder_name(variant.name) + "_profile")
    return json.dumps({**engine, "autoReport.all": "true", "autoReport.directory": str(folder),
                       "autoReport.outputSerializedGraph": "false"})


def _run(result: VariantResult, flags: BenchmarkOptions, folder: Path, combined: IO[bytes]) -> None:
    """Run one variant, and fill in its result."""
    variant = result.variant
    result.status, result.log_folder, result.start = FAILED, folder, datetime.now()
    result.sdk = Path(result.env[POPLAR]).resolve().parent if result.env.get(POPLAR) else None
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("    command: %s\n    in: %s", variant.text, variant.benchmark.folder)
    for key, value in result.added.items():
        logger.info("    with %s=%s", key, value)
    outcome = _execute(result, folder, combined, flags)
    result.seconds, result.exitcode, result.reason = outcome.seconds, outcome.exitcode, outcome.problem
    if outcome.exitcode and not outcome.problem:
        result.reason = f"exit status {outcome.exitcode}{_last_words(folder / 'stderr')}"
    _collect(result, folder, flags.compile_only)
    result.exitcode = result.exitcode or int(bool(result.reason))
    result.status = FAILED if result.reason else PASSED
    if flags.additional_metrics:
        result.results.update({name: {name: value} for name, value in (
            ("test_duration", result.seconds), ("cmd", " ".join(variant.words)),
            ("result", str(result.status == PASSED)), ("git_commit_hash", _commit(variant.benchmark.folder)),
            ("env", "".join(f"{key}={value} " for key, value in result.added.items())))})
    result.checkpoint = _newest_checkpoint(result)
    write_json(folder / "variant_result.json", result.to_dict())
    for name in result.results:
        if not isinstance(result.value(name), str):
            logger.info("    %s = %s", name, result.value(name))
    if result.status == PASSED:
        logger.info("%s: passed in %.1f s", variant.name, result.seconds)
        return
    tail = [line for line in metrics.lines(folder / "stderr") if line.strip()][-TAIL_LINES:]
    logger.error("%s: failed: %s; last lines of %s:\n    %s", variant.name, result.reason, folder / "stderr",
                 "\n    ".join(tail))


def _execute(result: VariantResult, logs: Path, combined: IO[bytes], flags: BenchmarkOptions) -> Outcome:
    """pip install what the entry's requirements_file lists, and run the command."""
    variant, settings = result.variant, result.variant.benchmark.settings
    if settings.requirements_file:
        words: Sequence[str] = (sys.executable, "-m", "pip", "install", "-r", settings.requirements_file)
        outcome = run(words, variant.benchmark.folder, result.env, logs, combined)
        if outcome.exitcode:
            return outcome._replace(problem=f"requirements_file: pip could not install {settings.requirements_file}")
        for name in STREAMS:
            (logs / name).replace(logs / f"requirements_{name}")
    words, env = _with_this_python(variant.words, result.env)
    limit = min(flags.timeout or math.inf, settings.timeout or math.inf)
    (logs / "ipu-monitor.jsonl").unlink(missing_ok=True)  # of an earlier run into this folder
    with log.progress(None, variant.name, unit="second", interval=flags.progress_trace_period or 60) as progress:
        recording = flags.gc_monitor

        def tick(seconds: float) -> None:
            nonlocal recording
            progress.update(int(seconds) - progress.count)
            if recording and int(seconds) % 5 == 0:
                recording = _record_ipus(logs / "ipu-monitor.jsonl")

        return run(words, variant.benchmark.folder, env, logs, combined, limit, tick)


def _record_ipus(path: Path) -> bool:
    """Append what gc-monitor says now, as a line of JSON. Returns whether that worked."""
    try:
        said = json.loads(subprocess.check_output([GC_MONITOR, "--json"], stderr=subprocess.DEVNULL, timeout=60))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"timestamp": f"{datetime.now():%Y-%m-%d-%H.%M.%S.%f}", **said}) + "\n")
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        logger.warning("--gc-monitor stops: %s", error)
        return False
    return True


def _with_this_python(words: Sequence[str], env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Let `python3` mean the Python of this runner, for the command and what it starts: the first one of the PATH may
    have none of our packages."""
    # Unbuffered, so that a command that is ended at its time limit loses no output.
    index, path = python_index(words), os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    return [*words[:index], sys.executable, *words[index + 1:]], {"PYTHONUNBUFFERED": "1", **env, "PATH": path}


def _collect(result: VariantResult, logs: Path, compile_only: bool) -> None:
    """Read the metrics into the result. A command that failed has none, whatever it printed before."""
    wanted = () if compile_only else result.variant.benchmark.metrics
    if result.exitcode:
        result.results = {item.name: {item.reduction_type: None} for item in wanted}
    else:
        variant = result.variant
        result.results, problems = metrics.extract(wanted, logs, variant.params, variant.num_processes)
        result.reason = "; ".join(problems)
    result.results["total_compiling_time"] = {"mean": None if result.exitcode else metrics.compile_seconds(logs)}
    metrics.apply_custom_metrics(result.results, logs, result.exitcode or 0)


def _commit(folder: Path) -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    return "Not a git repo"


def _newest_checkpoint(result: VariantResult) -> Path | None:
    """The newest checkpoint file of this run in --checkpoint-output-dir, or its folder when there is one for each."""
    name = option_value(result.variant.words, "--checkpoint-output-dir", "--checkpoint_output_dir")
    folder, begin = result.variant.benchmark.folder / name, result.start.timestamp() - 1
    found = [path for depth in ("*", "*/*") if name for path in folder.glob(depth)
             if path.suffix in (".pt", ".pth", ".h5") and path.is_file() and path.stat().st_mtime >= begin]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest and (newest if newest.parent == folder else newest.parent).resolve()


def _last_words(stderr: Path) -> str:
    """`: ` and the last line that names an error, else the last line with a word in it; nothing if there is none."""
    lines = [line for line in metrics.lines(stderr) if re.search(r"[^\W\d_]", line)]
    words = " ".join(next(filter(ERROR_LINE.match, reversed(lines)), lines[-1] if lines else "").split())
    return f": {textwrap.shorten(words, 200)}" if words else ""


def folder_name(variant_name: str) -> str:
    """A variant's name as a folder: parameters may hold slashes, and file systems take 255 bytes."""
    name = re.sub(r"^\.|[^\w.,=+@-]", "_", variant_name)
    # Variants that differ only in what was replaced or cut off must not share a folder.
    return name if name == variant_name and len(name.encode()) <= 150 else with_digest(name, variant_name)
