"""Run the variants of the selected benchmarks one after another and collect their results."""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import IO, Mapping, Sequence

from examples_utils import metrics
from examples_utils.machine import POPLAR, Machine, hardware, missing
from examples_utils.options import BenchmarkOptions
from examples_utils.process import Outcome, ipu_monitor, progress, run
from examples_utils.report import FAILED, PASSED, SKIPPED, VariantResult, write_json
from examples_utils.spec import Benchmark, Variant, build_command, option_value, python_index, variants
from utils.errors import UserError

logger = logging.getLogger(__name__)

ERROR_LINE = re.compile(r"\s*(?:\[[^\]]*\]:?)*\s*(?:error|[\w.]*(?:Error|Exception|Interrupt)):? ", re.ASCII)
TAIL_LINES = 20


def run_benchmarks(benchmarks: Sequence[Benchmark], flags: BenchmarkOptions, logs: Path, env: Mapping[str, str],
                   results: list[VariantResult]) -> None:
    """Run everything. `results` receives one entry per variant, and has all of them after Ctrl-C too.

    logs: a folder that exists. Raises UserError before anything runs when an entry is wrong.
    """
    machine = Machine(env)
    results += [_prepare(variant, flags, env, machine) for benchmark in benchmarks for variant in variants(benchmark)]
    stopped = ""
    with open(logs / "output.log", "wb", buffering=0) as combined:
        for number, result in enumerate(results, start=1):
            name, result.reason = result.variant.name, stopped or result.reason
            if result.reason:
                logger.info("%s: skipped: %s", name, result.reason)
                continue
            logger.info("%s: running (%d of %d)", name, number, len(results))
            try:
                _run(result, flags, logs / folder_name(name), combined)
            except KeyboardInterrupt:
                result.reason, result.exitcode = "interrupted", 130
                for rest in results[number:]:
                    rest.reason = "interrupted before it began"
                raise
            if result.status == FAILED and flags.stop_on_error:
                stopped = f"skipped because {name} failed and --stop-on-error was given"


def _prepare(variant: Variant, flags: BenchmarkOptions, env: Mapping[str, str], machine: Machine) -> VariantResult:
    """The result of a variant before it runs; with a reason if it cannot."""
    benchmark = variant.benchmark
    own = {key: str(value) for key, value in benchmark.env.items()}
    command = build_command(variant, {**env, **own}, flags.allow_wandb, flags.compile_only)
    added: dict[str, str] = {}
    if hardware(benchmark, command)[0]:
        added.update(POPLAR_LOG_LEVEL=flags.logging, POPART_LOG_LEVEL=flags.logging)
        if flags.profile:
            added["POPLAR_ENGINE_OPTIONS"] = _profile_options(variant, env)
    elif flags.profile:
        logger.warning("--profile: %s uses no IPU, there is nothing to profile", variant.name)
    added.update(own)
    env = {**env, **added}
    reason = next(missing(benchmark, command, env, machine, flags.compile_only), "")
    return VariantResult(variant, SKIPPED, command, reason, env=env, added=added)


def _profile_options(variant: Variant, env: Mapping[str, str]) -> str:
    """POPLAR_ENGINE_OPTIONS that make Poplar write a PopVision profile beside the application."""
    try:
        engine = json.loads(env.get("POPLAR_ENGINE_OPTIONS") or "{}")
    except ValueError:
        raise UserError("--profile: the environment variable POPLAR_ENGINE_OPTIONS is not JSON") from None
    folder = variant.benchmark.folder / (folder_name(variant.name) + "_profile")
    return json.dumps({**engine, "autoReport.all": "true", "autoReport.directory": str(folder),
                       "autoReport.outputSerializedGraph": "false"})


def _run(result: VariantResult, flags: BenchmarkOptions, logs: Path, combined: IO[bytes]) -> None:
    """Run one variant, and fill in its result."""
    result.status, result.log_folder, result.start = FAILED, logs, datetime.now()
    result.sdk = Path(result.env[POPLAR]).resolve().parent if result.env.get(POPLAR) else None
    logs.mkdir(parents=True, exist_ok=True)
    logger.info("    command: %s", result.command.text)
    logger.info("    in: %s", result.folder)
    for key, value in result.added.items():
        logger.info("    with %s=%s", key, value)
    outcome = _install_requirements(result, logs, combined) or _execute(result, logs, flags, combined)
    result.seconds, result.exitcode, result.reason = outcome.seconds, outcome.exitcode, outcome.problem or ""
    if outcome.exitcode and not outcome.problem:
        result.reason = f"exit status {outcome.exitcode}{_last_words(logs / 'stderr')}"
    _collect(result, logs, flags.compile_only)
    result.exitcode = result.exitcode or int(bool(result.reason))
    result.status = FAILED if result.reason else PASSED
    if flags.additional_metrics:
        result.results.update({name: {name: value} for name, value in (
            ("test_duration", result.seconds), ("cmd", " ".join(result.command.words)),
            ("result", str(result.status == PASSED)), ("git_commit_hash", _commit(result.folder)),
            ("env", "".join(f"{key}={value} " for key, value in result.added.items())))})
    result.checkpoint = _newest_checkpoint(result)
    write_json(logs / "variant_result.json", result.to_dict())
    _log_result(result, logs)


def _install_requirements(result: VariantResult, logs: Path, combined: IO[bytes]) -> Outcome | None:
    """pip install what the entry's requirements_file lists; an Outcome only when that failed."""
    name = result.variant.benchmark.requirements_file
    if not name:
        return None
    logger.info("    installing %s", name)
    files = logs / "requirements_stdout", logs / "requirements_stderr"
    outcome = run((sys.executable, "-m", "pip", "install", "-r", name), result.folder, result.env, *files, combined)
    if outcome.exitcode == 0:
        return None
    for file in files:
        file.replace(logs / file.name.replace("requirements_", ""))
    return outcome._replace(problem=f"requirements_file: pip could not install {name}")


def _execute(result: VariantResult, logs: Path, flags: BenchmarkOptions, combined: IO[bytes]) -> Outcome:
    words, env = _with_this_python(result.command.words, result.env)
    limit = result.variant.benchmark.timeout
    with contextlib.ExitStack() as stack:
        if flags.gc_monitor:
            stack.enter_context(ipu_monitor(logs / "ipu-monitor.jsonl"))
        shown = stack.enter_context(progress(result.variant.name, flags.progress_trace_period))
        return run(words, result.folder, env, logs / "stdout", logs / "stderr", combined,
                   min(flags.timeout or limit, limit), **shown)


def _with_this_python(words: Sequence[str], env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Let `python3` mean the Python of this runner, for the command and what it starts: the first one of the PATH may
    have none of our packages."""
    # Unbuffered, so that a command that is ended at its time limit loses no output.
    index, path = python_index(words), os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    return [*words[:index], sys.executable, *words[index + 1:]], {"PYTHONUNBUFFERED": "1", **env, "PATH": path}


def _collect(result: VariantResult, logs: Path, compile_only: bool) -> None:
    """Read the metrics into the result. A command that failed has none, whatever it printed before."""
    benchmark, files = result.variant.benchmark, (logs / "stdout", logs / "stderr")
    wanted, derived = ((), ()) if compile_only else (benchmark.metrics, benchmark.derived)
    if result.exitcode:
        result.results = {item.name: {item.reduction: None} for item in (*wanted, *derived)}
    else:
        result.results, problems = metrics.extract(wanted, *files, result.command.num_processes)
        problems += metrics.derive(derived, result.results, result.variant.params)
        result.reason = "; ".join(problems)
    result.results["total_compiling_time"] = {"mean": None if result.exitcode else metrics.compile_seconds(*files)}
    metrics.apply_custom_metrics(result.results, *files, result.exitcode or 0)


def _commit(folder: Path) -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    return "Not a git repo"


def _newest_checkpoint(result: VariantResult) -> Path | None:
    """The newest checkpoint file of this run in --checkpoint-output-dir, or its folder when there is one for each."""
    name = option_value(result.command.words, "--checkpoint-output-dir", "--checkpoint_output_dir")
    folder, begin = result.folder / (name or ""), result.start.timestamp() - 1
    found = [path for depth in ("*", "*/*") if name for path in folder.glob(depth)
             if path.suffix in (".pt", ".pth", ".h5") and path.is_file() and path.stat().st_mtime >= begin]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest and (newest if newest.parent == folder else newest.parent).resolve()


def _last_words(stderr: Path) -> str:
    """`: ` and the last line that names an error, else the last line with a word in it; nothing if there is none."""
    lines = [line for line in metrics.lines(stderr) if re.search(r"[^\W\d_]", line)]
    words = " ".join(next(filter(ERROR_LINE.match, reversed(lines)), lines[-1] if lines else "").split())
    return ": " + (words if len(words) <= 200 else words[:197] + "...") if words else ""


def _log_result(result: VariantResult, logs: Path) -> None:
    for name, value in ((name, result.value(name)) for name in result.results):
        if not isinstance(value, str):
            logger.info("    %s = %s", name, value)
    if result.status == PASSED:
        logger.info("%s: passed in %.1f s", result.variant.name, result.seconds)
        return
    logger.error("%s: failed: %s", result.variant.name, result.reason)
    tail = [line for line in metrics.lines(logs / "stderr") if line.strip()][-TAIL_LINES:]
    if tail:
        logger.error("last lines of %s:\n    %s", logs / "stderr", "\n    ".join(tail))


def folder_name(variant_name: str) -> str:
    """A variant's name as a folder: parameters may hold slashes, and file systems take 255 bytes."""
    name = re.sub(r"^\.|[^\w.,=+@-]", "_", variant_name)
    if name == variant_name and len(name.encode()) <= 150:
        return name
    # Variants that differ only in what was replaced must not share a folder.
    digest = hashlib.sha256(variant_name.encode()).hexdigest()[:8]
    return f"{name.encode()[:150].decode(errors='ignore')}-{digest}"
