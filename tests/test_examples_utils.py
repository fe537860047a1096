"""The benchmark runner: spec format, commands, metrics, processes, skipping, result files, exit status."""
from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import psutil
import pytest
from helpers import ROOT, refused, run_script
from matplotlib.figure import Figure

import args as train_args
import log
from benchmarks import busy, compare_peers
from dalle import evaluation, generation
from examples_utils import machine, metrics, process, report, runner
from examples_utils.spec import FAILED, PASSED, load_entries, make_benchmark, select, variants
from utils.errors import UsageError, UserError

# Programs beside the spec. `python -m pip` finds the one here, as it looks in the working directory first.
PROGRAMS = {
    "train.py": """import sys
for step in range(1, 4):
    print("step {} loss: {:.4f} throughput: {:.2f} samples/sec".format(step, 4.0 - step, 10.0 * step))
print("seen", sys.argv[1:], file=sys.stderr)""",
    "wait.py": "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)",
    "pip.py": "import sys; print('pip', *sys.argv[1:], file=sys.stderr); sys.exit(5 * ('bad' in sys.argv[-1]))",
    "sub/save.py": """import os, sys
print(os.getcwd(), os.environ["WHO"], sys.executable, os.environ["PATH"])
for age, name in enumerate(("dalle_2.pt", "dalle_1.pt")):
    open("ckpt/" + name, "w")
    os.utime("ckpt/" + name, (os.stat("ckpt").st_mtime - 0.1 * age,) * 2)""",
    "mine.py": """from examples_utils import register_custom_metric
register_custom_metric("lines", lambda out, err, status: {"sum": len(out.splitlines())})
register_custom_metric("bad", lambda out, err, status: 1 / 0)""",
}
OPTIONS = r"""
common_options: &common_options
  data:
    throughput: {reduction_type: final, regexp: 'throughput: *(.*?) samples/sec'}
    loss: {reduction_type: final, regexp: 'loss: *(\d*\.\d*)'}
  output: [[samples/sec, throughput]]
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A folder of programs; app(spec text) writes benchmarks.yml and returns its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POPLAR_SDK_ENABLED", raising=False)
    monkeypatch.delenv("DATASETS_DIR", raising=False)
    (tmp_path / "sub/ckpt").mkdir(parents=True)
    for name, source in {**PROGRAMS, "gc-monitor": "#!/bin/sh\necho '{\"cards\": 1}'"}.items():
        (tmp_path / name).write_text(source)
        (tmp_path / name).chmod(0o755)

    def write(spec):
        (tmp_path / "benchmarks.yml").write_text(OPTIONS + spec)
        return tmp_path / "benchmarks.yml"

    return write


def benchmark(entry, name="x_gen", path="/app/benchmarks.yml"):
    return make_benchmark(name, Path(path), entry)


def variant(cmd, name="x_gen", env=None, entry=None, **flags):
    """The only variant of a benchmark."""
    (found,) = variants(benchmark({"cmd": cmd, **(entry or {})}, name), env or {}, **flags)
    return found


# Spec ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters, names, first", [
    ([["size", "batch"], [8, 1], ["a", 2.5]], ["batch_1_size_8", "batch_2.5_size_a"], {"size": "8", "batch": "1"}),
    ({"a": "1, 2", "b": "x,y"}, ["a_1_b_x", "a_2_b_x", "a_1_b_y", "a_2_b_y"], {"a": "1", "b": "x"}),
    ({"a": 3}, ["a_3"], {"a": "3"})])
def test_variants_are_rows_or_a_product_with_the_first_key_fastest_and_sorted_keys_in_names(parameters, names, first):
    found = variants(benchmark({"cmd": "python3 t.py", "parameters": parameters}), {})
    assert [variant.name for variant in found] == ["x_gen_" + name for name in names] and found[0].params == first


def test_options_are_no_benchmarks_and_convergence_runs_only_when_asked_for(app):
    entries = load_entries([str(app("a_gen: {cmd: python3 t.py}\nb_gen_conv: {cmd: python3 t.py}\n"))])
    assert [item.name for item in select(entries, None)] == ["a_gen"]
    assert [item.name for item in select(entries, None, include_convergence=True)] == ["a_gen", "b_gen_conv"]
    assert [item.name for item in select(entries, ["b_gen_conv", "a_gen", "a_gen"])] == ["b_gen_conv", "a_gen"]
    refused("no benchmark 'a_gne'.*Did you mean 'a_gen'", select, entries, ["a_gne"])
    refused("no benchmark 'common_options'", select, entries, ["common_options"])


def test_what_is_given_twice_is_said(app, caplog):
    spec = app("a_gen: {cmd: python3 train.py}")
    other = spec.with_name("other.yml")
    other.write_text("common_options: {}\na_gen: {cmd: python3 other.py}")
    assert load_entries([str(spec), str(other)])["a_gen"][0] == other
    metrics.load_custom_metrics(["mine.py", "mine.py"])
    first, second, _ = (record.message for record in caplog.records)
    assert first == f"'a_gen' of {other} replaces the one of {spec}" and "'lines' is registered again" in second
    metrics.load_custom_metrics([])


def test_real_data_is_needed_unless_name_or_entry_says_otherwise():
    for name, entry, needed in (
        ("real", {}, True), ("train_gen", {}, False), ("synth", {}, False), ("real", {"generated": True}, False),
        ("real", {"synthetic": True}, False), ("real", {"generated": False, "data": []}, True),
    ):
        assert benchmark(dict(entry, cmd="python3 t.py"), name).needs_dataset is needed, (name, entry)


@pytest.mark.parametrize("entry, message", [
    ([], "must be a mapping with the key cmd"), ({"cmd": None}, "must be a mapping with the key cmd"),
    ({"cmd": None, "notebook": "a.ipynb"}, "notebooks are not run"), ({"cmd": ["python3"]}, "cmd: expected text"),
    ({"timeout": "soon"}, "timeout: expected a number"), ({"timeout": -1}, "timeout: must be above 0"),
    ({"data": [1]}, "data must be a mapping"), ({"data": {"t": {}}}, "data.t must be a mapping with the key regexp"),
    ({"data": {"t": {"regexp": "("}}}, "data.t: regexp"), ({"data": {"t": {"regexp": "(a)(b)"}}}, "one group, not 2"),
    ({"data": {"t": {"regexp": "(a)", "reduction_type": "finl"}}}, "Did you mean 'final'"),
    ({"data": {"t": {"regexp": "(a)", "skip": -1}}}, "data.t: skip: must be at least 0"),
    ({"derived": {"t": "1"}}, "derived.t must be a mapping"), ({"derived": {"t": {}}}, "with the key expr"),
    ({"parameters": "a"}, "parameters must be"), ({"parameters": [["a", "b"], [1]]}, "does not fit the header"),
    ({"env": {"A": True}}, "env.A must be text or a number"), ({"env": [1]}, "env must be a mapping"),
    ({"requires": ["tpu"]}, "requires: must be one of .*, got 'tpu'"),
    ({"parameters": {"a": "1,1"}}, "parameters give the variant x_gen_a_1 twice"),
    ({"cmd": "bash run.sh"}, "cmd must call `python3 SCRIPT`"), ({"cmd": "python3"}, "cmd must call"),
    ({"cmd": "python3 t.py {size}"}, "cmd: no parameter for {'size'}"), ({"cmd": "python3 t.py {"}, "literal brace"),
    ({"cmd": "python3 t.py 'a"}, "cmd: no closing quotation")])
def test_wrong_entries_are_refused_with_file_name_and_key(entry, message):
    entry = {"cmd": "python3 t.py", **entry} if isinstance(entry, dict) else entry
    refused("benchmarks.yml: 'x_gen'.*" + message, lambda: variants(benchmark(entry), {}))


@pytest.mark.parametrize("text, message", [
    ("a: [1", "is not valid YAML"), ("- a", "must be a YAML mapping"), (None, "cannot be read: No such file")])
def test_files_that_are_no_spec_are_refused(tmp_path, text, message):
    if text:
        (tmp_path / "other.yml").write_text(text)
    refused("--spec .*other.yml " + message, load_entries, [str(tmp_path / "other.yml")])


# Commands ------------------------------------------------------------------------------------------------------------


WANDB = "python3 t.py --wandb --wandb-project-name p --epochs 2 --wandb-run-name=r --text 'a b'"
VIPU = "poprun --vipu-partition=p --vipu-server-host h --num-replicas 4 python3 t.py --wandb"


@pytest.mark.parametrize("cmd, flags, expected", [
    ("python3 train.py\n  --text 'a b'", {}, "python3 /app/train.py --text a-b"),
    ("python3 -m torch.distributed.run train.py", {}, "python3 -m torch.distributed.run train.py"),
    ("poprun -v python train.py", {}, "poprun -v python /app/train.py"),
    (WANDB, {}, "python3 /app/t.py --epochs 2 --text a-b"),
    (WANDB, {"allow_wandb": True},
     "python3 /app/t.py --wandb --wandb-project-name p --epochs 2 --wandb-run-name=r --text a-b"),
    (r'python3 t.py --x-wandb "a \" b" --epochs 2', {}, "python3 /app/t.py --epochs 2"),
    # --compile-only is appended, and strips flags of wandb and vipu.
    (VIPU, {"allow_wandb": True, "compile_only": True}, "poprun --num-replicas 4 python3 /app/t.py --compile-only"),
])
def test_the_script_becomes_absolute_unless_it_is_a_module_and_flags_of_wandb_go(cmd, flags, expected):
    assert " ".join(word.replace(" ", "-") for word in variant(cmd, **flags).words) == expected


def test_parameters_and_environment_are_filled_in():
    made = variant('python3 t.py --n {n} --in "$DATA/coco" ${{MORE}} $NONE', entry={"parameters": [["n"], [8]]},
                   env={"DATA": "/my data", "MORE": "--a --b"})
    assert made.words == ["python3", "/app/t.py", "--n", "8", "--in", "/my data/coco", "--a", "--b", "$NONE"]
    assert made.text == 'python3 /app/t.py --n 8 --in "$DATA/coco" ${MORE} $NONE'  # results show no one's folders
    made = variant("python3 t.py --wandb", entry={"location": "sub", "allow_wandb": True})
    assert made.text == "python3 /app/sub/t.py --wandb"


# Metrics -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    def write(stdout, stderr=""):
        (tmp_path / "stdout").write_text(stdout)
        (tmp_path / "stderr").write_text(stderr)
        return tmp_path

    return write


def collect(data, logs, cmd="python3 t.py", **entry):
    """The results of metrics whose regexp is by default m=(.*?); and the reason why they fail."""
    data = {name: {"regexp": "m=(.*?);", **settings} for name, settings in data.items()}
    return collected(variant(cmd, entry={"data": data, **entry}), logs)


def collected(made, logs):
    metrics.collect(made, logs)
    assert "mean" in made.results.pop("total_compiling_time") and bool(made.exitcode) == bool(made.reason)
    return made.results, made.reason


LOG = "m=4;\nm=2; m=1;\n"


@pytest.mark.parametrize("stdout, name, settings, value", [
    (LOG, "m", {}, 2.5), (LOG, "m", {"skip": 1}, 3.0), (LOG, "latency", {"skip": 1}, 2.0),
    (LOG, "m", {"reduction_type": "final"}, 3.0), (LOG, "m", {"reduction_type": "min"}, 1.0),
    (LOG, "m", {"reduction_type": "value"}, 4.0), (LOG, "m", {"reduction_type": "value", "skip": 3}, 4.0),
    ("nothing", "m", {}, "m: no line matches 'm=(.*?);'"), ("m=1\n;", "m", {}, "m: no line matches 'm=(.*?);'"),
    ("m=1;m=2;", "m", {"skip": 2}, "m: 2 matches, all skipped by skip: 2"),
    ("m=fast;", "m", {}, "m: could not convert string to float: 'fast'"),
    ("m=1;m=nan;", "m", {}, "m: not finite in the log")])
def test_a_metric_is_reduced_over_stdout_then_stderr_or_says_why_it_has_no_value(logs, stdout, name, settings, value):
    results, reason = collect({name: settings}, logs(stdout, "old\rm=3;\r\n" if stdout == LOG else ""))
    expected, problem = (None, value) if isinstance(value, str) else (value, "")
    assert (results, reason) == ({name: {settings.get("reduction_type", "mean"): expected}}, problem)


@pytest.mark.parametrize("cmd, factor", [
    ("mpirun --np 4 python3 t.py --np 9", 4), ("mpirun --tag-output --np 4 python3 t.py", 4),
    ("mpirun --np=2 python3 t.py", 2), ("python3 t.py --np 4", 1)])
def test_only_throughput_is_multiplied_by_the_processes(logs, cmd, factor):
    results, _ = collect({"throughput": {}, "m": {}}, logs("m=3;"), cmd)
    assert results == {"throughput": {"mean": 3.0 * factor}, "m": {"mean": 3.0}}


def test_derived_metrics_use_metrics_parameters_and_earlier_ones(logs):
    derived = {"each": "{throughput} / {n}", "twice": "2 * each - -1", "bad": "{loss} + 1", "typo": "{lost}"}
    results, reason = collect({"throughput": {}, "loss": {"regexp": "loss=(.*)"}}, logs("m=8;"), parameters={"n": "4"},
                              derived={name: {"expr": expression} for name, expression in derived.items()})
    assert results["each"] == {"mean": 2.0} and results["twice"] == {"mean": 5.0} and results["bad"] == {"mean": None}
    assert re.fullmatch("loss: .*; bad: .*; typo: .*: no metric or parameter is called 'lost'", reason)


def test_nothing_but_finite_arithmetic_is_evaluated():
    for expression, value in {
        "1 + 2 * 3": 7, "(1 + 2) * 3": 9, "-2 ** 2": -4, "{a} ** 2": 9, "7 // 2 + 7 % 2": 4, "1e3 / 4": 250,
    }.items():
        assert metrics.evaluate(expression, {"a": -3.0}) == value, expression
    for expression in (
        "__import__('os').system('true')", "open('/etc/passwd')", "(1).__class__", "[1][0]", "a if 1 else 2", "'a' * 3",
        "lambda: 1", "True", "9 ** 9 ** 9 ** 9", "1 / 0", "(-1) ** 0.5", "1 +", "", "x := 1", "1e999",
        "(" * 300 + ")" * 300,
    ):
        refused("", metrics.evaluate, expression, {"a": 1.0})


@pytest.mark.parametrize("stdout, stderr, seconds", [
    ("Compiled model in 3.5 secs", "2024-01-02T10:00:00.000000Z PL:POPLIN 1 I: Poplar version: 3.4\n"
     "2024-01-02T10:00:10.500000Z PO:ENGINE 1 I: Starting compilation\n"
     "2024-01-02T10:01:30.250000Z PO:ENGINE 1 I: Graph compiled\n", 90.25),
    ("Compiled model in 3.5 secs", "", 3.5), ("step 1", "", None)])
def test_compile_time_from_poplar_or_from_the_application(logs, stdout, stderr, seconds):
    assert metrics.compile_seconds(logs(stdout, stderr)) == seconds


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(Python source, ...) -> ((exit status, seconds, problem), stdout, stderr, both)."""
    monkeypatch.setattr(process, "GRACE", 0.3)

    def call(source, *, cwd=tmp_path, program=sys.executable, **settings):
        with open(tmp_path / "both", "wb", buffering=0) as combined:
            outcome = process.run([program, "-c", source], cwd, dict(os.environ, PYTHONUNBUFFERED="1"), tmp_path,
                                  combined, **settings)
        return (outcome, *((tmp_path / name).read_text() for name in ("stdout", "stderr", "both")))

    return call


def gone(pid):
    """Whether a process has ended within a second (it may be a zombie of a foreign parent)."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_both_streams_go_to_their_files_and_to_the_shared_one_while_the_command_runs(run, tmp_path):
    outcome, out, err, both = run("import sys; print('a'); sys.stderr.write('b'); sys.exit(3)")
    assert (outcome[0], out, err) == (3, "a\n", "b") and sorted(both) == ["\n", "a", "b"]

    def tick(seconds):
        if (tmp_path / "stdout").read_bytes() == b"60%":
            (tmp_path / "go").touch()

    source = "import os, time\nprint('60%', end='')\nwhile not os.path.exists('go'): time.sleep(0.01)"
    assert run(source, timeout=60, tick=tick)[0][0] == 0


READY = "while not os.path.exists('ready'): time.sleep(0.01)\n"
ESCAPE = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()                       # out of the session ...
    if os.fork() == 0:                # ... and away from the parent
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid())
        open('ready', 'w').close()
        time.sleep(60)
    os._exit(0)
""" + READY
FORGET = """
import os, subprocess, sys, time
source = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w').close(); time.sleep(60)"
print(subprocess.Popen([sys.executable, '-c', source], env={}, start_new_session=True).pid)
""" + READY
linux = pytest.mark.skipif(not process.LINUX, reason="orphans without an environment are known on Linux only")


@pytest.mark.parametrize("source", [ESCAPE, pytest.param(FORGET, marks=linux)])
def test_the_time_limit_ends_the_whole_tree_even_a_daemon_that_ignores_sigterm(run, tmp_path, monkeypatch, source):
    real = time.monotonic  # a clock that jumps once the daemon is there, so that on no machine the limit comes before
    monkeypatch.setattr(process.time, "monotonic", lambda: real() + (1000 if (tmp_path / "ready").exists() else 0))
    (exitcode, _, problem), out, err, both = run(source + "time.sleep(60)", timeout=500)
    assert exitcode == process.TIMED_OUT and "time limit of 500 seconds" in problem
    assert gone(int(out)) and err == "\nTimeout (500)\n" and "Timeout" in both


@pytest.mark.parametrize("linux", [process.LINUX, False])
def test_a_daemon_left_behind_is_ended_and_does_not_hold_up_the_runner(run, monkeypatch, linux):
    if process.LINUX and not linux:  # as on macOS: what loses its parent becomes a child of another process
        monkeypatch.setattr(process, "LINUX", False)
        process.ctypes.CDLL(None).prctl(36, 0)
    (exitcode, seconds, _), out, _, _ = run(ESCAPE)
    assert exitcode == 0 and seconds < 50 and gone(int(out))


@pytest.mark.parametrize("place", [{"program": "no-such-program"}, {"cwd": "no"}])
def test_a_command_that_cannot_start_is_an_outcome(run, place):
    (exitcode, _, problem), _, err, both = run("", **place)
    assert exitcode == 127 and problem.startswith("cannot start") and err == both == problem + "\n"


# What is skipped -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """pretend(packages, programs, GPUs, IPUs): a machine that has these."""

    def call(packages=(), programs=(), cuda=0, ipu=0):
        monkeypatch.setattr(machine, "has_package", packages.__contains__)
        monkeypatch.setattr(machine.shutil, "which", lambda name, path: name in programs)
        monkeypatch.setattr(machine, "available", lambda kind, _: {"cuda": cuda, "ipu": ipu}[kind])

    return call


SDK = {"POPLAR_SDK_ENABLED": "/opt/sdk/poplar"}
BARE, IPU_BOX, GPU_BOX = (), (["torch", "poptorch"], ["poprun"], 0, 16), (["torch"], (), 1)


@pytest.mark.parametrize("box, env, entry, name, reason", [
    # with --compile-only, which needs no IPU
    ((["torch", "poptorch"],), SDK, {"cmd": "python3 t.py"}, "train_gen_pod64 compile", None),
    (BARE, {}, {"cmd": "python3 t.py", "compile_only": False}, "x_gen compile", "has no --compile-only mode"),
    # without
    (BARE, {}, {"cmd": "python3 t.py --device cpu"}, "x_gen", None),
    (BARE, {}, {"cmd": "python3 t.py --device ipu"}, "x_gen", "no Poplar SDK"),
    (BARE, SDK, {"cmd": "python3 t.py --device=ipu"}, "x_gen", "package poptorch is not installed: pip install the wh"),
    (BARE, {}, {"cmd": "python3 t.py"}, "train_gen_pod16", "no Poplar SDK"),
    (BARE, {}, {"cmd": "python3 t.py", "requires": ["ipu:4"]}, "x_gen", "no Poplar SDK"),
    (IPU_BOX, SDK, {"cmd": "python3 t.py"}, "train_gen_pod16", None),
    (IPU_BOX, SDK, {"cmd": "python3 t.py"}, "train_gen_pod64", "fewer IPUs than the 64 needed"),
    (IPU_BOX, SDK, {"cmd": "poprun python3 t.py"}, "train_gen_pod64", None),  # poprun makes the partition itself
    ((["poptorch"],), SDK, {"cmd": "poprun python3 t.py"}, "x_gen", "program poprun is not on"),
    (BARE, {}, {"cmd": "python3 t.py --device cuda"}, "x_gen", "package torch is not installed"),
    (IPU_BOX, {}, {"cmd": "python3 t.py --device cuda:0"}, "x_gen", "CUDA GPUs needed: 1; PyTorch sees 0"),
    (GPU_BOX, {}, {"cmd": "python3 t.py --device cuda"}, "x_gen", None),
    (GPU_BOX, {}, {"cmd": "python3 -m torch.distributed.run --nproc_per_node=2 t.py --device cuda"}, "x_gen",
     "CUDA GPUs needed: 2; PyTorch sees 1"),
    (GPU_BOX, {}, {"cmd": "python3 t.py", "requires": "cuda:8"}, "x_gen", "CUDA GPUs needed: 8"),
    (BARE, {}, {"cmd": "python3 t.py", "requires": ["package:wandb"]}, "x_gen", "package wandb is not installed"),
    (BARE, {}, {"cmd": "python3 t.py", "requires": ["program:aws"]}, "x_gen", "program aws is not on the PATH"),
    (BARE, {}, {"cmd": "python3 t.py", "requires": ["file:vqgan.ckpt"]}, "x_gen", "/app/vqgan.ckpt does not exist"),
    (BARE, {}, {"cmd": "python3 t.py"}, "real", "DATASETS_DIR ('') is not a folder"),
    (BARE, {"DATASETS_DIR": "/no/such"}, {"cmd": "python3 t.py"}, "real", "DATASETS_DIR ('/no/such') is not"),
    (BARE, {"DATASETS_DIR": "/"}, {"cmd": 'python3 t.py --in "$DATASETS_DIR/coco-x"'}, "real", "/coco-x does not"),
    (BARE, {"DATASETS_DIR": "/"}, {"cmd": "python3 t.py --in '${{DATASETS_DIR}}/coco-x'"}, "real", "/coco-x does not"),
    (BARE, {"DATASETS_DIR": "/"}, {"cmd": "python3 t.py --in '$DATASETS_DIR/{{0..9}}.tar'"}, "real", None),
    (BARE, {"DATASETS_DIR": "/"}, {"cmd": "python3 t.py --in $DATASETS_DIR"}, "real", None),
    (BARE, {}, {"cmd": "python3 t.py --host $HOSTS"}, "x_gen", "environment variable HOSTS is not set"),
])
def test_what_is_missing_is_the_reason_to_skip(pretend, box, env, entry, name, reason):
    pretend(*box)
    name, _, only = name.partition(" ")
    made = variant(entry["cmd"], name, env, entry, compile_only=bool(only))
    found = list(machine.missing(made, compile_only=bool(only)))
    assert not found if reason is None else reason in found[0]


def test_the_machine_is_asked_through_pytorch_which_is_imported_only_then(monkeypatch):
    assert run_script("-c", "import sys, examples_utils.runner; sys.exit('torch' in sys.modules)").returncode == 0
    cuda = types.SimpleNamespace(device_count=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    available = types.SimpleNamespace(ipuHardwareIsAvailable=lambda number: number <= 4)
    monkeypatch.setitem(sys.modules, "poptorch", available)
    assert machine.available("cuda", 1) == 3 and [machine.available("ipu", number) for number in (4, 16)] == [4, 0]
    monkeypatch.setattr(machine.importlib, "import_module", mock.Mock(side_effect=OSError("libpopart.so")))
    assert machine.available("cuda", 1) == machine.available("ipu", 1) == 0
    assert machine.has_package("json") and not machine.has_package("no_such.package")


# The whole runner ----------------------------------------------------------------------------------------------------


class Bench:
    """The command line in the folder of `app`, and what it left."""

    def __init__(self, app, capsys):
        self.app, self.capsys, self.logs = app, capsys, app("").parent / "logs"

    def __call__(self, spec, *flags):
        """The exit status and the results by variant."""
        words = ["benchmark", "--spec", str(self.app(spec)), "--log-dir", str(self.logs), *flags]
        status = runner.main(words)
        self.out, self.err = self.capsys.readouterr()
        self.results = read_json(self.logs)
        return status, self.results

    def text(self, place):
        """What was printed (out, err), a file's content, or a key of a result (a_gen.reason)."""
        if place in ("out", "err"):
            return getattr(self, place)
        name, _, key = place.partition(".")
        return str(self.results[name][key]) if name in self.results else (self.logs / place).read_text()


@pytest.fixture
def bench(app, capsys):
    return Bench(app, capsys)


def read_json(folder):
    found = json.loads((folder / "benchmark_results.json").read_text())
    assert all(item["benchmark_name"] == name for name, items in found.items() for item in items)
    return {item["variant_name"]: item for items in found.values() for item in items}


TRAIN = "a_gen: {<<: *common_options, cmd: python3 train.py --wandb, env: {LEVEL: 3}}"
MIXED = """
good_gen: {<<: *common_options, parameters: {n: "1,2"}, cmd: "python3 train.py --n {n}"}
broken_gen: {<<: *common_options, cmd: "python3 -c \\"import sys; print('loss. 1.5'); sys.exit('no memory')\\""}
silent_gen: {<<: *common_options, cmd: "python3 -c \\"print('throughput 5')\\""}
train_gen_pod4: {<<: *common_options, cmd: python3 train.py}
"""


def test_a_run_writes_the_files_of_the_reference_and_fails_when_one_failed(bench):
    status, results = bench(MIXED)
    folder, good = bench.logs, results["good_gen_n_2"]
    fields = "benchmark_path benchmark_name variant_name params command results start_time end_time sdk_path status"
    fields += " compilation_end_time test_duration exitcode log_paths latest_checkpoint_path reason sdk_version"
    assert status == 1 and set(good) == set(fields.split())
    assert good["variant_name"] == "good_gen_n_2" and good["params"] == {"n": "2"} and good["exitcode"] == 0
    assert good["results"] == {"throughput": {"final": 30.0}, "loss": {"final": 1.0},
                               "total_compiling_time": {"mean": None}}
    assert good["command"] == "python3 {} --n 2".format(folder.parent / "train.py")
    assert json.loads((folder / "good_gen_n_2" / "variant_result.json").read_text()) == good
    assert Path(good["log_paths"]["err"]).read_text() == "seen ['--n', '2']\n"
    assert Path(good["log_paths"]["out"]).read_text().count("samples/sec") == 3

    broken, silent, ipu = (results[name] for name in ("broken_gen", "silent_gen", "train_gen_pod4"))
    assert broken["exitcode"] == 1 and broken["reason"] == "exit status 1: no memory"
    assert broken["results"]["loss"] == {"final": None}
    assert silent["exitcode"] == 1 and "throughput: no line matches" in silent["reason"]
    assert ipu["exitcode"] is None and ipu["status"] == "skipped" and "Poplar SDK" in ipu["reason"]

    assert list(csv.reader(bench.text("benchmark_results.csv").splitlines())) == [
        ["benchmark name", "Variant name", "throughput", "latency", "total_compiling_time"],
        ["good_gen", "good_gen_n_1", "30.0", "", ""], ["good_gen", "good_gen_n_2", "30.0", "", ""],
        ["broken_gen", "broken_gen", "", "", ""], ["silent_gen", "silent_gen", "", "", ""],
        ["train_gen_pod4", "train_gen_pod4", "", "", ""]]
    suite = ElementTree.parse(str(folder / "benchmark_results.xml")).getroot().find("testsuite")
    assert [[child.tag for child in case] for case in suite] == [[], [], ["failure"], ["failure"], ["skipped"]]
    assert suite.attrib["failures"] == "2" and suite[3][0].attrib["message"] == silent["reason"]

    for place, texts in {
        "output.log": ["no memory", "seen"], "out": ["2 passed, 2 failed, 1 skipped", "30 samples/sec"],
        "console.log": ["2 passed, 2 failed, 1 skipped", "last lines of"], "err": ["no memory"],
    }.items():
        assert all(text in bench.text(place) for text in texts), place
    assert (folder / "benchmark_results.png").read_bytes().startswith(b"\x89PNG")


LINE = "throughput.latency.total_compiling_time.test_duration.loss.result.cmd.env.git_commit_hash.lines"
RUNS = {
    "the rest is skipped": ("a_gen: {cmd: python3 nothing.py}\nb_gen: {cmd: python3 train.py}", "--stop-on-error", 1, {
        "b_gen.status": "skipped", "b_gen.reason": "a_gen failed and --stop-on-error"}),
    "no metrics": (TRAIN, "--compile-only", 0, {
        "a_gen/stderr": r"\['--compile-only'\]", "a_gen.results": "^{'total_compiling_time': {'mean': None}}$"}),
    "the smaller time limit": ("a_gen: {cmd: python3 wait.py, timeout: 50}", "--timeout 1", 1, {
        "a_gen.exitcode": "^124$", "a_gen.reason": "time limit of 1 seconds", "a_gen.test_duration": r"^[1-4]?\d\."}),
    "of the entry": ("a_gen: {cmd: python3 wait.py, timeout: 1}", "--timeout 50", 1, {
        "a_gen.reason": "time limit of 1 seconds"}),
    "its folder, this Python": ("a_gen: {location: sub, env: {WHO: me}, "
                                "cmd: env python3 save.py --checkpoint-output-dir ckpt}", "", 0, {
        "a_gen.latest_checkpoint_path": "/sub/ckpt/dalle_2.pt$",
        "a_gen/stdout": f"/sub me {sys.executable} {os.path.dirname(sys.executable)}:/usr/bin:/bin\n$"}),
    "requirements": ("a_gen: {cmd: python3 train.py, requirements_file: more.txt}", "", 0, {
        "a_gen/requirements_stderr": "^pip install -r more.txt\n$", "a_gen/stderr": "seen"}),
    "bad requirements": ("a_gen: {cmd: python3 train.py, requirements_file: bad.txt}", "", 1, {
        "a_gen/stderr": "^pip install -r bad.txt\n$", "a_gen.exitcode": "5", "a_gen.reason": "not install bad.txt"}),
    "only skipped": ("a_gen_pod4: {cmd: python3 train.py}", "", 0, {"out": "1 skipped in .*csv,xml}\nnothing was run"}),
    "flags without effect": (TRAIN, "--no-code-sync --remove-dirs-after --profile --allow-wandb", 0, {
        "err": "(?s)(?=.*--no-code-sync has no)(?=.*--remove-dirs-after has no effect).*--profile: a_gen uses no IPU",
        "a_gen/stderr": "--wandb"}),
    "more columns": (TRAIN, "--additional-metrics --csv-metrics lines --custom-metrics-files mine.py", 0, {
        "benchmark_results.csv": LINE.replace(".", '","') + r'"\n"a_gen","a_gen","30.0","","","\d+\.\d+","1.0","True",'
        r'"python3 .*/train.py","LEVEL=3 ","Not a git repo","3"\n$', "err": "'bad' failed: ZeroDivisionError"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_with_flags(bench, monkeypatch, name):
    spec, flags, status, expected = RUNS[name]
    monkeypatch.setattr(process, "GRACE", 0.3)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    bench.logs.mkdir()
    (bench.logs / "benchmark_results.png").touch()  # of an earlier run into this folder
    assert bench(spec, *flags.split())[0] == status
    for place, pattern in expected.items():
        assert re.search(pattern, bench.text(place)), (place, bench.text(place))
    drawn = (bench.logs / "benchmark_results.png")
    assert drawn.stat().st_size if spec == TRAIN and name != "no metrics" else not drawn.exists()


def test_the_reason_of_a_failure_quotes_the_error(tmp_path):
    memory = "[rank0]: torch.OutOfMemoryError: CUDA out of memory."
    for stderr, words in (
        ("step 1\nValueError: no such file\n", ": ValueError: no such file"), ("", ""), ("====\n", ""),
        ("Killed by hand\n=====\n", ": Killed by hand"), (f"{memory}\nexitcode : 1\n=====\n", f": {memory}"),
    ):
        (tmp_path / "stderr").write_text(stderr)
        assert runner._last_words(tmp_path) == words


def test_ipu_flags_reach_ipu_entries(bench, monkeypatch):
    """--profile and --logging become Poplar's variables, gc-monitor is recorded; hardware and program are pretended."""
    monkeypatch.setenv("POPLAR_SDK_ENABLED", "/opt/poplar_sdk-3.4/poplar")
    monkeypatch.setattr(machine, "has_package", lambda name: True)
    monkeypatch.setattr(machine, "available", lambda kind, number: number)
    source = "from os import environ as e; print(e.get(`POPLAR_ENGINE_OPTIONS`), e.get(`POPLAR_LOG_LEVEL`))"
    source = source.replace("`", '\\"')
    spec, folder = f"a_gen_pod4: {{cmd: \"python3 -c '{source}'\"}}", bench.logs.parent
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    status, results = bench(spec, "--profile", "--gc-monitor", "--logging", "DEBUG")
    engine, level = bench.text("a_gen_pod4/stdout").strip().rsplit(" ", 1)
    assert json.loads(engine)["autoReport.directory"] == str(folder / "a_gen_pod4_profile")
    assert (status, level) == (0, "DEBUG")
    recorded = json.loads(bench.text("a_gen_pod4/ipu-monitor.jsonl").splitlines()[0])
    assert recorded["cards"] == 1 and "timestamp" in recorded
    sdk = [results["a_gen_pod4"][key] for key in ("sdk_path", "sdk_version")]
    assert sdk == ["/opt/poplar_sdk-3.4", "poplar_sdk-3.4"]
    (folder / "gc-monitor").write_text("#!/bin/sh\nexit 1\n")
    bench(spec, "--gc-monitor")
    assert not (bench.logs / "a_gen_pod4/ipu-monitor.jsonl").exists()
    assert bench.text("console.log").count("--gc-monitor stops") == 1
    monkeypatch.setenv("POPLAR_ENGINE_OPTIONS", "{")
    refused("POPLAR_ENGINE_OPTIONS is not JSON", bench, spec, "--profile")


def test_ctrl_c_ends_the_command_and_keeps_the_results(app):
    spec = app("".join(f"{name}_gen: {{cmd: python3 {file}.py}}\n" for name, file in zip("abc", ("train", "wait") * 2)))
    words = [sys.executable, "-m", "examples_utils", "benchmark", "--spec", str(spec), "--log-dir", "logs"]
    running = subprocess.Popen(words, cwd=str(spec.parent), env=dict(os.environ, PYTHONPATH=str(ROOT)),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid, end = spec.parent / "pid", time.monotonic() + 60
    try:
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == 130 and err.endswith("interrupted\n") and "Traceback" not in err
    assert gone(int(pid.read_text()))
    results = read_json(spec.parent / "logs")
    assert [results[name]["status"] for name in ("a_gen", "b_gen", "c_gen")] == ["passed", "failed", "skipped"]
    assert results["b_gen"]["reason"] == "interrupted"


@pytest.mark.parametrize("words, kind, message", [
    ("", UsageError, "name a command"), ("bench", UsageError, "command 'bench': expected benchmark"),
    ("benchmark --timout 3", UsageError, "Did you mean '--timeout'"),
    ("benchmark --timeout x", UsageError, "--timeout: expected a whole number, got 'x'"),
    ("benchmark --timeout 0", UsageError, "--timeout: must be at least 1, got 0"),
    ("benchmark --logging LOUD", UsageError, "--logging: expected one of DEBUG"),
    ("benchmark --spec", UsageError, "expected at least one argument"),
    ("benchmark --upload-checkpoints s3", UsageError, "copy what latest_checkpoint_path"),
    ("benchmark --upload-checkpoints wandb", UsageError, "--allow-wandb"),
    ("benchmark --custom-metrics-files no.py", UserError, "no.py: FileNotFoundError"),
    ("benchmark --gc-monitor", UserError, "gc-monitor is not on the PATH"),
    ("benchmark --requirements-file bad.txt", UserError, "pip could not install bad.txt")])
def test_what_cannot_work_is_said_before_anything_runs(app, monkeypatch, words, kind, message):
    folder = app("a_gen: {cmd: python3 train.py}").parent
    monkeypatch.setenv("PATH", "/nowhere")
    refused(message, runner.main, words.split(), kind=kind)
    assert not list(folder.glob("**/stdout"))


@pytest.mark.parametrize("words, status, error", [
    (("-m", "examples_utils", "benchmark", "--sepc", "x"), 2, "error: unknown flag '--sepc'. Did you mean '--spec'?.*"),
    (("-c", "import runpy, sys; sys.modules['psutil'] = None; runpy.run_module('examples_utils', run_name='__main__')"),
     1, "error: .*has no package 'psutil'.*: (pip install -r requirements.txt|enter .*)"),
])
def test_the_module_ends_with_one_line(words, status, error):
    done = run_script(*words)
    assert (done.returncode, done.stdout) == (status, "") and re.fullmatch(error + "\n", done.stderr)


def test_list_names_the_benchmarks_and_runs_none(app, capsys):
    spec = app("my_options: {cmd: x}\na_gen: {cmd: python3  train.py}\nlonger_gen: {cmd: python3 generate.py}")
    assert runner.main(["benchmark", "--list", "--spec", str(spec)]) == 0
    assert capsys.readouterr().out == "a_gen       python3 train.py\nlonger_gen  python3 generate.py\n"
    assert not list(spec.parent.glob("log*"))


# Table, chart, folders -----------------------------------------------------------------------------------------------


def result(name="a_gen", status=PASSED, reason="", unit="samples/sec", **values):
    """A variant that has run, with these metrics."""
    made = variant("python3 t.py", name, entry={"output": [[unit, "throughput"]]})
    made.status, made.reason, made.seconds, made.log_folder = status, reason, 75.0, Path("/logs")
    made.results = {key: {"final": value} for key, value in values.items()}
    return made


def test_the_table_lines_up_puts_reasons_below_and_fits_into_the_terminal():
    results = [result(throughput=0.94321, loss=3.5), result("long_name_gen", throughput=12345.6, loss=12.0),
               result("c_gen", FAILED, "exit status 1: no memory", throughput=None, loss=None)]
    assert report.table(results, 100).splitlines() == [
        "benchmark      result   time          throughput  loss",
        "-------------  ------  -----  ------------------  ----",
        "a_gen          passed  1m15s  0.9432 samples/sec   3.5",
        "long_name_gen  passed  1m15s   12346 samples/sec    12",
        "c_gen          failed  1m15s", "    exit status 1: no memory"]
    results = [result("a_gen", throughput=1.0, loss=3.5, other=1.0, more=2.0),
               result("b_gen", FAILED, "no reason is so long that it may leave the terminal " * 3)]
    text = report.table(results, 51)
    assert "loss" in text and "other" not in text and max(map(len, text.splitlines())) <= 51
    assert " ".join(text.split()).endswith(results[1].reason.strip())


def test_the_chart_has_a_panel_for_each_unit(tmp_path, monkeypatch):
    results = [result(throughput=1.0), result("b_gen", throughput=200.0),
               result("c_gen", unit="images/sec", throughput=3.0), result("d_gen", throughput=None)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **settings: drawn.append(self))
    assert report.draw_chart(tmp_path / "c.png", results)
    first, second = drawn[0].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["a_gen", "b_gen"]
    assert [text.get_text() for text in first.texts] == ["1", "200"] and first.get_xlabel() == "samples/sec"
    assert [bar.get_width() for bar in second.patches] == [3.0] and second.get_xlabel() == "images/sec"
    assert not report.draw_chart(tmp_path / "c.png", results[3:])


def test_variant_names_become_folder_names_that_differ():
    assert runner.folder_name("a_gen_size_2.5") == "a_gen_size_2.5"
    assert "/" not in runner.folder_name("../x/y") and runner.folder_name("x/y") != runner.folder_name("x:y")
    assert len(runner.folder_name("n" * 300)) < 200 and runner.folder_name("n" * 300) != runner.folder_name("n" * 301)


# The shipped benchmarks.yml ------------------------------------------------------------------------------------------


def shipped():
    return select(load_entries([str(ROOT / "benchmarks.yml")]), None, include_convergence=True)


def test_the_shipped_spec_has_the_published_entries_and_reads_our_log_lines(logs):
    entries = {item.name: item for item in shipped()}
    published = ["pytorch_minidalle_train_{}_pod{}".format(*pair)
                 for pair in itertools.product(("real", "gen"), (4, 16, 64))]
    assert set([*published, "pytorch_minidalle_train_real_pod64_conv"]) <= set(entries)
    for name, item in entries.items():
        assert item.needs_dataset == ("_real" in name) == ("$DATASETS_DIR" in item.settings.cmd), name
        assert item.settings.compile_only == ("train.py" in item.settings.cmd), name  # it alone has --compile-only
    lines = [log.step_line(3, 9, 1, 2.5, 2.0, 2.6, 1e-3, 10.0), log.validation_line(3, 1, 9.0, 9.0, 9.0),
             log.throughput_line(85.3), log.compiled_line(12.34)]
    for name in [*published, "dalle_train_cpu_gen"]:
        results, reason = collected(variants(entries[name], {})[0], logs("\n".join(lines)))
        assert not reason and results["throughput"] == {"final": 85.3} and results["loss"] == {"final": 2.5}
        assert results["compile_time"] == {"mean": 12.3}


def parse_configs(names):
    return [train_args.parse(["--config", name, "--generated-data"]) for name in names]


PARSE = {
    "train.py": train_args.parse, "generate.py": generation.COMMAND.parse, "evaluate.py": evaluation.COMMAND.parse,
    "compare_peers.py": lambda words: parse_configs([compare_peers.COMMAND.parse(words).config]),
    "busy.py": lambda words: parse_configs(busy.COMMAND.parse(words).configs),
}


@pytest.mark.parametrize("name", [item.name for item in shipped()])
def test_programs_take_the_flags_of_every_shipped_entry(name, tmp_path):
    """So that a renamed flag or configuration is noticed here and not on a machine with 64 IPUs."""
    (tmp_path / "coco").mkdir()
    (item,) = [item for item in shipped() if item.name == name]
    for found in variants(item, {"DATASETS_DIR": str(tmp_path)}):
        script = next(index for index, word in enumerate(found.words) if word.endswith(".py"))
        assert PARSE[Path(found.words[script]).name](list(found.words[script + 1:]))


def test_the_shipped_spec_reads_the_tables_of_evaluate(logs):
    retrieval = {"captions": 9, "generated": 0.5, "reconstructions": 1.0}
    names = ("fid", "fid_infinity", "kid", "is", "precision", "recall", "psnr", "ssim", "codes_used", "perplexity")
    validation = ("loss", "text_loss", "text_perplexity", "image_loss", "image_perplexity", "bits_per_code")
    folder = logs(evaluation.report({
        "checkpoint": {"name": "x", "sha256": "a" * 64, "parameters": 1, "codebook": 2},
        "data": {"input_folder": "demo", "num_pairs": 9},
        "validation": {name: 2.5 for name in validation},
        "metrics": [dict({name: 0.25 for name in names}, cond_scale=1)], "protocol": {"num_images": 9},
        "retrieval": {"pictures": 9, "heldout": retrieval, "train": dict(retrieval, generated=0.75)},
    }))  # fmt: skip
    entries = [item for item in shipped() if "evaluate.py" in item.settings.cmd]
    assert len(entries) == 4
    for item in entries:
        results, reason = collected(variants(item, {})[0], folder)
        assert not reason and all(None not in found.values() for found in results.values())
