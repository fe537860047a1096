"""Run the variants of the selected benchmarks one after the other and collect what became of each."""

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from examples_utils import metrics
from examples_utils.command import Command, build_command, option_value, python_index
from examples_utils.machine import POPLAR, Machine, hardware, why_skipped
from examples_utils.monitor import Progress, ipu_monitor
from examples_utils.process import Outcome, Output, run
from examples_utils.report import FAILED, PASSED, SKIPPED, VariantResult, write_json
from examples_utils.spec import Benchmark, Variant, variants
from utils.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r".+\.(?:pt|pth|h5)")
ERROR_LINE = re.compile(r"\s*(?:\[[^\]]*\]:?)*\s*(?:error|[\w.]*(?:Error|Exception|Interrupt)):? ", re.ASCII)
TAIL_LINES = 20


@dataclass(frozen=True)
class RunOptions:
    """The flags that matter while benchmarks run."""

    log_folder: Path
    log_level: str = "INFO"
    timeout: Optional[float] = None  # seconds, for each variant
    progress_period: Optional[float] = None  # seconds; None: 1 on a terminal, else 60
    allow_wandb: bool = False
    compile_only: bool = False
    stop_on_error: bool = False
    additional_metrics: bool = False
    profile: bool = False
    gc_monitor: bool = False
    custom_metrics: Mapping[str, metrics.MetricFunction] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """A variant with its command. `env` is the whole environment, `added` what this runner and the entry add to it."""

    variant: Variant
    command: Command
    env: Mapping[str, str]
    added: Mapping[str, str]
    skip: Optional[str]


def run_benchmarks(benchmarks: Sequence[Benchmark], options: RunOptions, env: Mapping[str, str],
                   results: List[VariantResult]) -> None:
    """Run everything and append to `results`, variant by variant, so that they are there after Ctrl-C too.

    Raises UserError before anything runs when an entry cannot be understood.
    """
    machine = Machine(env)
    jobs = [_prepare(variant, options, env, machine) for benchmark in benchmarks for variant in variants(benchmark)]
    stopped = ""
    with open(str(options.log_folder / "output.log"), "wb") as combined:
        for position, job in enumerate(jobs):
            reason = stopped or job.skip
            if reason:
                logger.info("%s: skipped: %s", job.variant.name, reason)
                results.append(VariantResult(job.variant, SKIPPED, job.command.text, reason))
                continue
            logger.info("%s: running (%d of %d)", job.variant.name, position + 1, len(jobs))
            try:
                result = _run(job, options, combined)
            except KeyboardInterrupt:
                results.append(VariantResult(job.variant, FAILED, job.command.text, "interrupted", exitcode=130))
                results += [VariantResult(rest.variant, SKIPPED, rest.command.text, "interrupted before it began")
                            for rest in jobs[position + 1:]]
                raise
            results.append(result)
            if result.status == FAILED and options.stop_on_error:
                stopped = "not run, as {} failed and --stop-on-error was given".format(job.variant.name)


def _prepare(variant: Variant, options: RunOptions, env: Mapping[str, str], machine: Machine) -> _Job:
    benchmark = variant.benchmark
    command = build_command(variant, dict(env, **benchmark.env), options.allow_wandb, options.compile_only)
    ipus, _ = hardware(benchmark, command)
    added: Dict[str, str] = {}
    if ipus:
        added.update(POPLAR_LOG_LEVEL=options.log_level, POPART_LOG_LEVEL=options.log_level)
    if options.profile and ipus:
        added["POPLAR_ENGINE_OPTIONS"] = _profile_options(variant, env)
    elif options.profile:
        logger.warning("--profile: %s uses no IPU, there is nothing to profile", variant.name)
    added.update(benchmark.env)
    whole = dict(env, **added)
    reason = why_skipped(benchmark, command, whole, machine, options.compile_only)
    return _Job(variant, command, whole, added, reason)


def _profile_options(variant: Variant, env: Mapping[str, str]) -> str:
    """POPLAR_ENGINE_OPTIONS that make Poplar write a PopVision profile beside the application."""
    try:
        engine = json.loads(env.get("POPLAR_ENGINE_OPTIONS") or "{}")
    except ValueError:
        raise UserError("--profile: the environment variable POPLAR_ENGINE_OPTIONS is not JSON") from None
    folder = variant.benchmark.folder / (folder_name(variant.name) + "_profile")
    return json.dumps(dict(engine, **{"autoReport.all": "true", "autoReport.directory": str(folder),
                                      "autoReport.outputSerializedGraph": "false"}))


def _run(job: _Job, options: RunOptions, combined: IO[bytes]) -> VariantResult:
    variant = job.variant
    folder = options.log_folder / folder_name(variant.name)
    folder.mkdir(parents=True, exist_ok=True)
    result = VariantResult(variant, FAILED, job.command.text, log_folder=folder, sdk=_sdk(job.env))
    logger.info("    command: %s", job.command.text)
    logger.info("    in: %s", variant.benchmark.folder)
    for key, value in job.added.items():
        logger.info("    with %s=%s", key, value)
    outcome = _install_requirements(job, folder, combined)
    if outcome is None:
        outcome = _execute(job, folder, options, combined)
    result.seconds = outcome.seconds
    result.exitcode = outcome.exitcode
    result.reason = outcome.problem or ""
    if outcome.exitcode and not outcome.problem:
        result.reason = "exit status {}{}".format(outcome.exitcode, _last_words(folder / "stderr"))
    _collect(job, result, folder, options)
    if result.exitcode == 0 and result.reason:
        result.exitcode = 1
    result.status = FAILED if result.reason else PASSED
    _add_reference_metrics(job, result, options)
    result.checkpoint = _newest_checkpoint(job, result.start)
    write_json(folder / "variant_result.json", result.to_dict())
    _log_result(result, folder)
    return result


def _install_requirements(job: _Job, folder: Path, combined: IO[bytes]) -> Optional[Outcome]:
    """pip install what the entry's requirements_file lists; an Outcome only when that failed."""
    name = job.variant.benchmark.requirements_file
    if name is None:
        return None
    words = (sys.executable, "-m", "pip", "install", "-r", name)
    logger.info("    installing %s", name)
    outcome = run(words, job.variant.benchmark.folder, job.env, folder / "requirements_stdout",
                  folder / "requirements_stderr", Output(combined))
    if outcome.exitcode == 0:
        return None
    for stream in ("stdout", "stderr"):
        (folder / ("requirements_" + stream)).replace(folder / stream)
    return Outcome(outcome.exitcode, outcome.seconds, "requirements_file: pip could not install {}".format(name))


def _execute(job: _Job, folder: Path, options: RunOptions, combined: IO[bytes]) -> Outcome:
    benchmark = job.variant.benchmark
    words, env = _with_this_python(job.command.words, job.env)
    limits = [limit for limit in (options.timeout, benchmark.timeout) if limit is not None]
    # Unbuffered, or a command that is ended at its time limit would take what it printed with it.
    env.setdefault("PYTHONUNBUFFERED", "1")
    with contextlib.ExitStack() as stack:
        if options.gc_monitor:
            stack.enter_context(ipu_monitor(folder / "ipu-monitor.jsonl"))
        progress = stack.enter_context(Progress(job.variant.name, options.progress_period))
        return run(words, benchmark.folder, env, folder / "stdout", folder / "stderr", Output(combined),
                   timeout=min(limits) if limits else None, period=progress.period, on_progress=progress)


def _with_this_python(words: Sequence[str], env: Mapping[str, str]) -> Tuple[List[str], Dict[str, str]]:
    """Let `python3` mean the Python of this runner: the first one of the PATH may have none of our packages.

    Its folder goes to the front of the PATH; where that holds another python3, the word is replaced.
    """
    words, env = list(words), dict(env)
    folder = os.path.dirname(sys.executable)
    named = os.path.join(folder, words[python_index(words)])
    if os.path.realpath(named) == os.path.realpath(sys.executable):
        env["PATH"] = os.pathsep.join([folder] + [path for path in env.get("PATH", os.defpath).split(os.pathsep)
                                                  if path != folder])
    else:
        words[python_index(words)] = sys.executable
    return words, env


def _collect(job: _Job, result: VariantResult, folder: Path, options: RunOptions) -> None:
    """Read the metrics into the result. A command that failed has none, whatever it printed before."""
    benchmark = job.variant.benchmark
    stdout, stderr = folder / "stdout", folder / "stderr"
    wanted, derived = (benchmark.metrics, benchmark.derived) if not options.compile_only else ((), ())
    if result.exitcode:
        result.results = {item.name: {item.reduction: None} for item in tuple(wanted) + tuple(derived)}
        result.results["total_compiling_time"] = {"mean": None}
    else:
        result.results, problems = metrics.extract(wanted, stdout, stderr, job.command.num_processes)
        problems += metrics.derive(derived, result.results, job.variant.params)
        result.reason = "; ".join(problems)
        result.results["total_compiling_time"] = {"mean": metrics.compile_seconds(stdout, stderr)}
    metrics.apply_custom_metrics(options.custom_metrics, result.results, stdout, stderr, int(result.exitcode or 0))


def _add_reference_metrics(job: _Job, result: VariantResult, options: RunOptions) -> None:
    if not options.additional_metrics:
        return
    result.results.update({name: {name: value} for name, value in (
        ("test_duration", result.seconds), ("cmd", " ".join(job.command.words)),
        ("result", str(result.status == PASSED)), ("git_commit_hash", _commit(job.variant.benchmark.folder)),
        ("env", "".join("{}={} ".format(key, value) for key, value in job.added.items())))})


def _commit(folder: Path) -> str:
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=str(folder), stderr=subprocess.DEVNULL,
                                       universal_newlines=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "Not a git repo"


def _sdk(env: Mapping[str, str]) -> Optional[Path]:
    """Folder of the Poplar SDK: the parent of the one that POPLAR_SDK_ENABLED names."""
    return Path(env[POPLAR]).resolve().parent if env.get(POPLAR) else None


def _newest_checkpoint(job: _Job, start: datetime) -> Optional[Path]:
    """The newest checkpoint file of this run in --checkpoint-output-dir, or its folder when there is one for each."""
    name = option_value(job.command.words, "--checkpoint-output-dir", "--checkpoint_output_dir")
    folder = job.variant.benchmark.folder / name if name else None
    if folder is None or not folder.is_dir():
        return None
    candidates = [(path.stat().st_mtime, path) for path in _checkpoints(folder)]
    newest = max(candidates, default=(0.0, None))
    return newest[1].resolve() if newest[1] is not None and newest[0] >= start.timestamp() - 1 else None


def _checkpoints(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and CHECKPOINT.fullmatch(path.name):
            yield path
        elif path.is_dir() and any(CHECKPOINT.fullmatch(inner.name) for inner in path.iterdir()):
            yield path


def _last_words(stderr: Path) -> str:
    """`: ` and the last line that names an error, else the last line with a word in it; nothing if there is none."""
    last = named = ""
    for line in metrics.lines(stderr):
        last = line.strip() if re.search(r"[^\W\d_]", line) else last
        named = line.strip() if ERROR_LINE.match(line) else named
    words = " ".join((named or last).split())
    return ": " + (words if len(words) <= 200 else words[:197] + "...") if words else ""


def _log_result(result: VariantResult, folder: Path) -> None:
    for name in result.results:
        if not isinstance(result.value(name), str):
            logger.info("    %s = %s", name, result.value(name))
    if result.status == PASSED:
        logger.info("%s: passed in %.1f s", result.variant.name, result.seconds)
        return
    logger.error("%s: failed: %s", result.variant.name, result.reason)
    tail = [line for line in metrics.lines(folder / "stderr") if line.strip()][-TAIL_LINES:]
    if tail:
        logger.error("last lines of %s:\n    %s", folder / "stderr", "\n    ".join(tail))


def folder_name(variant_name: str) -> str:
    """A variant's name as a folder: parameters may hold slashes, and file systems take 255 bytes."""
    name = re.sub(r"[^\w.,=+@-]", "_", variant_name)
    name = "_" + name[1:] if name.startswith(".") else name
    if name == variant_name and len(name.encode()) <= 150:
        return name
    # Different variants must not share a folder after the change.
    digest = hashlib.sha256(variant_name.encode()).hexdigest()[:8]
    return "{}-{}".format(name.encode()[:150].decode(errors="ignore"), digest)
