"""Runs that are killed, terminated, interrupted or lose their newest files: --resume ends with the undisturbed bits."""
from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, flags, flat, read_metrics, run

import checkpoints

STEPS = 10  # of `arguments`: five in each of two epochs, validated after each
LAST = "dalle_1.pt"


def arguments(folder, out, *more):
    """A run that saves all the time, and whose every random state matters."""
    options = ("--ff-dropout", "0.1", "--ema-decay", "0.9", "--lr-scheduler", "ReduceLROnPlateau")
    return flags(folder, out, "--checkpoint-save-steps", "2", "--cache-codes", str(out / "codes"), *options, *more)


def start(server, folder, out, *more, processes=1, kill=None, **options):
    """The last one of the processes is killed."""
    out.mkdir(exist_ok=True)
    kills = [*[None] * (processes - 1), kill]
    return server.start_all(arguments(folder, out, *more), [out / "stderr.log"] * processes, kills, **options)


def finish(server, pids, out):
    assert [server.wait(pid) for pid in pids] == [0] * len(pids), (out / "stderr.log").read_text()[-3000:]


def result(out):
    """All that must not depend on interruptions: the last checkpoint, metrics and loss.png."""
    state = torch.load(out / "ckpt" / LAST, weights_only=True)
    state["training"].pop("config")  # says --resume
    state["training"]["position"].pop("seconds")
    times = ("time", "samples_per_second")
    events = [{key: line[key] for key in line if key not in times} for line in read_metrics(out)]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, STEPS + 1))
    assert [event["step"] for event in events if event["event"] == "validation"] == [STEPS // 2, STEPS]
    return flat(state), events, (out / "loss.png").read_bytes()


def run_undisturbed(server, folder, out, processes):
    """The result of a run that nothing happens to, and the CPU time that it took."""
    pids = start(server, folder, out, processes=processes)
    finish(server, pids, out)
    return result(out), server.seconds[pids[0]]


def assert_as_undisturbed(out, expected):
    state, events, curve = result(out)
    assert events == expected[1]
    assert [key for key in {**state, **expected[0]} if state.get(key) != expected[0].get(key)] == []
    assert curve == expected[2]


MOMENTS = {
    "encoding": ("data.code_files:Writer.write", 2, "before"),
    "in a step": ("engines.native:NativeEngine._update_weights", 4, "before"),
    "writing a checkpoint": ("torch.serialization:_save", 2, "after"),
    "before its rename": ("utils.files:os.fsync", 6, "after"),
    "after its rename": ("checkpoints:prune_checkpoints", 2, "before"),
    "in validation": ("engines.native:NativeEngine._averaged_weights", 1, "after"),
    "between metrics and checkpoint": ("utils.metrics:_JsonLines.write", 7, "after"),
}
FAST = ("encoding", "writing a checkpoint", "between metrics and checkpoint")


def slow_unless(fast, *names_and_values):
    """Parameters of a test, of which the fast suite runs only some."""
    every = [values if isinstance(values, tuple) else (values,) for values in names_and_values]
    return [pytest.param(*values, marks=() if values in fast else pytest.mark.slow) for values in every]


@pytest.mark.parametrize("moment", slow_unless([(name,) for name in FAST], *MOMENTS))
def test_killed_at_a_certain_moment_it_goes_on_with_the_same_bits(server, folder, tmp_path, undisturbed, moment):
    pids = start(server, folder, tmp_path, "--resume", kill=MOMENTS[moment])
    assert [server.wait(pid) for pid in pids] == [-signal.SIGKILL], "was not killed"
    finish(server, start(server, folder, tmp_path, "--resume"), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])


@pytest.mark.parametrize("zeros", [False, True])
def test_a_loss_of_power_costs_the_newest_files_not_the_run(server, folder, tmp_path, undisturbed, zeros):
    pids = start(server, folder, tmp_path, kill=MOMENTS["between metrics and checkpoint"])
    assert [server.wait(pid) for pid in pids] == [-signal.SIGKILL]
    *_, sure, newest = checkpoints.list_checkpoints(tmp_path / "ckpt")
    size, metrics = newest.stat().st_size, tmp_path / "metrics.jsonl"
    os.truncate(newest, size // 2)
    if zeros:
        os.truncate(newest, size)
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert 0 < lines_until(lines, sure) < metrics.stat().st_size
    os.truncate(metrics, lines_until(lines, sure) + 10)  # what was synced with the older one, and a half line
    finish(server, start(server, folder, tmp_path, "--resume"), tmp_path)
    assert newest.name in (tmp_path / "stderr.log").read_text()
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])


def test_a_save_waits_for_the_disk_before_anything_older_goes(folder, tmp_path, monkeypatch):
    """What a kill cannot show: until it is synced, the system may write the newer before the older, or never."""
    events, fsync, replace, unlink = [], os.fsync, os.replace, Path.unlink

    def noted(kind, path, function, *inputs):
        result = function(*inputs)
        events.append((kind, re.sub(r"^\.(.*\.pt)\..*\.tmp$", r"\1 unfinished", Path(path).name)))
        return result

    monkeypatch.setattr(os, "fsync", lambda file: noted("sync", os.readlink(f"/proc/self/fd/{file}"), fsync, file))
    monkeypatch.setattr(os, "replace", lambda old, new: noted("replace", new, replace, old, new))
    monkeypatch.setattr(Path, "unlink", lambda path, *more: noted("delete", path, unlink, path, *more))
    options = ("--checkpoint-save-steps", "1", "--keep-checkpoints", "1", "--max-steps", "3", "--cache-codes", "off")
    run(folder, tmp_path, *options)
    expected, older = [], None
    for name in ("dalle_0_1.pt", "dalle_0_2.pt", "dalle_0_3.pt"):
        expected += [("sync", "metrics.jsonl"), ("sync", name + " unfinished"), ("replace", name), ("sync", "ckpt")]
        expected += [("delete", older)] if older else []
        older = name
    assert [event for event in events if re.search("metrics|dalle|ckpt", event[1])] == expected


def lose_power(out, choice):
    """What a loss of power may leave of the newest files: cut off, or of full length but zeros from somewhere on."""
    found = checkpoints.list_checkpoints(out / "ckpt")
    if not found:
        return
    newest, size = found[-1], found[-1].stat().st_size
    os.truncate(newest, choice.randrange(size))
    if choice.random() < 0.5:
        os.truncate(newest, size)
    before = [line for line in open(out / "metrics.jsonl", "rb")]
    sure = sum(len(line) for line in before[: len(before) // 2]) if len(found) < 2 else lines_until(before, found[-2])
    os.truncate(out / "metrics.jsonl", choice.randint(sure, sum(map(len, before))))


def lines_until(lines, checkpoint):
    """Length of the lines that were on the disk before a checkpoint was written."""
    step = torch.load(checkpoint, weights_only=True)["training"]["position"]["step"]
    return sum(len(line) for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step)


def disturb(server, folder, out, processes, seconds, choice, kills):
    """Kill a run up to so often, now and then with a loss of power, and let it come to its end; returns how often."""
    flag, killed = [], 0
    while killed < kills:
        pids = start(server, folder, out, *flag, processes=processes)
        first, *rest = choice.sample(pids, len(pids))
        server.kill_after(first, choice.uniform(0.0, 0.95) * seconds)
        time.sleep(choice.uniform(0.0, 0.05))
        for pid in rest:  # which wait for the first one now: a launcher ends them
            server.kill_after(pid, 0.0)
        if [server.wait(pid) for pid in pids] == [0] * processes:
            break  # it was faster
        killed += 1
        if choice.random() < 0.3:
            lose_power(out, choice)
        flag = ["--resume"]
    finish(server, start(server, folder, out, "--resume", processes=processes), out)
    return killed


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bits(server, folder, tmp_path, undisturbed, processes):
    expected, seconds = undisturbed(processes)
    assert disturb(server, folder, tmp_path, processes, seconds, random.Random(processes), kills=4 - processes)
    assert_as_undisturbed(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fifty_kills_at_random_moments(server, folder, tmp_path, undisturbed, processes):
    expected, seconds = undisturbed(processes)
    choice, killed, runs = random.Random(50 + processes), 0, 0
    while killed < 50:
        out = tmp_path / str(runs)
        killed += disturb(server, folder, out, processes, seconds, choice, kills=min(10, 50 - killed))
        assert_as_undisturbed(out, expected)
        runs += 1
    print(f"{killed} kills in {runs} runs of {processes} process(es)")


def wait_for(out, text, seconds=300):
    deadline = time.monotonic() + seconds
    while text not in ((out / "stderr.log").read_text() if (out / "stderr.log").exists() else ""):
        assert time.monotonic() < deadline, f"no {text!r} in {seconds} s"
        time.sleep(0.01)


SIGNALS = [(number, status, processes) for number, status in ((15, 0), (2, 130)) for processes in (1, 2)]


@pytest.mark.parametrize("number, status, processes", slow_unless([(15, 0, 2), (2, 130, 1)], *SIGNALS))
def test_asked_to_stop_it_saves_at_the_next_step(server, folder, tmp_path, undisturbed, processes, number, status):
    only_epochs = ("--checkpoint-save-steps", "0")
    pids = start(server, folder, tmp_path, *only_epochs, processes=processes)
    wait_for(tmp_path, "step 2/")
    for pid in reversed(pids):  # never at the same moment, nor always in the same step
        os.kill(pid, number)
    assert [server.wait(pid) for pid in pids] == [status] * processes
    (saved,) = (tmp_path / "ckpt").glob("*.pt")
    assert f"saved as {saved}; continue with --resume" in (tmp_path / "stderr.log").read_text()
    assert (tmp_path / "loss.png").exists()
    finish(server, start(server, folder, tmp_path, "--resume", *only_epochs, processes=processes), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(processes)[0])


@pytest.mark.parametrize("validation, processes", slow_unless([(2, 2)], (1, 1), (1, 2), (2, 1), (2, 2)))
def test_asked_to_stop_while_it_validates(server, folder, tmp_path, undisturbed, processes, validation):
    """Of two processes the last one alone gets the signal."""
    moment = ("engines.native:NativeEngine._averaged_weights", validation, "after", signal.SIGTERM)
    finish(server, start(server, folder, tmp_path, processes=processes, kill=moment), tmp_path)
    events = read_metrics(tmp_path)
    assert [event["event"] for event in events].count("validation") == validation - 1
    assert events[-1]["step"] == 5 * validation
    finish(server, start(server, folder, tmp_path, "--resume", processes=processes), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(processes)[0])


def test_killed_before_it_saved_it_does_not_resume_an_earlier_run(server, folder, tmp_path, undisturbed):
    finish(server, start(server, folder, tmp_path, "--random-seed", "7", "--max-steps", "6"), tmp_path)
    (pid,) = start(server, folder, tmp_path, kill=("engines.native:NativeEngine._update_weights", 2, "before"))
    assert server.wait(pid) == -signal.SIGKILL
    finish(server, start(server, folder, tmp_path, "--resume"), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])
    assert (tmp_path / "ckpt/earlier.1/dalle_1_6.pt").exists() and (tmp_path / "metrics.1.jsonl").exists()


@pytest.mark.parametrize("damage", slow_unless([("bit",)], "bit", "half", "empty"))
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(server, folder, tmp_path, undisturbed, damage):
    finish(server, start(server, folder, tmp_path, "--max-steps", "7"), tmp_path)
    newest = tmp_path / "ckpt/dalle_1_7.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes({"bit": content, "half": content[: len(content) // 2], "empty": b""}[damage])
    finish(server, start(server, folder, tmp_path, "--resume"), tmp_path)
    text = (tmp_path / "stderr.log").read_text()
    assert "WARNING: skipping a checkpoint: " in text and str(newest) in text
    assert "resumed {}: epoch 1, step 6".format(tmp_path / "ckpt/dalle_1_6.pt") in text
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])


@pytest.mark.slow
def test_torchrun_passes_sigterm_on(folder, tmp_path, undisturbed):
    """The launcher has SIGTERM from a scheduler, its processes have it from the launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train.py"), *arguments(folder, tmp_path)]

    def torchrun(*more):
        with open(tmp_path / "stderr.log", "a") as log:
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            return subprocess.Popen([*command, *more], env=environment, cwd=ROOT, stdout=log, stderr=log)

    launcher = torchrun()
    try:
        wait_for(tmp_path, "step 2/")
    finally:
        launcher.terminate()
    launcher.wait(300)  # its own status is not ours to decide
    assert "continue with --resume" in (tmp_path / "stderr.log").read_text() and torchrun("--resume").wait(600) == 0
    assert_as_undisturbed(tmp_path, undisturbed(2)[0])
