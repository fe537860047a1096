"""One writer for each folder: a second one is refused, and a killed one leaves no lock behind."""
from __future__ import annotations

import errno
import os
import signal
import types

import pytest
from helpers import refused
from test_crash import arguments, assert_as_undisturbed, finish, start, wait_for

import train_vqgan
from dalle.prompt_folders import lock_folder, prompt_folders
from utils import locks
from utils.locks import only_writer, try_lock


def test_a_second_training_into_the_same_folder_is_refused(server, folder, tmp_path, undisturbed):
    (first,) = start(server, folder, tmp_path)
    wait_for(tmp_path, "step 2/")
    os.kill(first, signal.SIGSTOP)
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*"))
    for more, flag, where in [
        ((), "--checkpoint-output-dir", tmp_path / "ckpt"),
        (("--checkpoint-output-dir", str(tmp_path / "other/ckpt"), "--log-dir", str(tmp_path)), "--log-dir", tmp_path),
    ]:
        assert server.wait(server.start(arguments(folder, tmp_path, *more), tmp_path.parent / "second.log")) == 1
        error = (tmp_path.parent / "second.log").read_text().splitlines()[-1]
        assert error.startswith(f"error: {flag} {where}: process {first} on "), error
    after = sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*") if "other" not in path.parts)
    assert after == before
    os.kill(first, signal.SIGCONT)
    finish(server, [first], tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_hold_no_lock_and_leave_signals_to_the_main_process(server, folder, tmp_path, undisturbed, number):
    workers = ("--dataloader-workers", "1", "--checkpoint-save-steps", "1")
    (pid,) = start(server, folder, tmp_path, *workers)
    wait_for(tmp_path, "step 2/")
    if number == signal.SIGKILL:
        os.kill(pid, number)  # the worker lives on until it notices
        assert server.wait(pid) == -number
    else:
        os.killpg(pid, number)  # as a scheduler does: to every process of the job
        assert server.wait(pid) == 0
    finish(server, start(server, folder, tmp_path, "--resume", *workers), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(1)[0])


def test_a_lock_lasts_until_it_is_closed_and_survives_no_fork(tmp_path):
    lock = try_lock(tmp_path / "lock")
    assert try_lock(tmp_path / "lock") is None
    (ready, says_ready), (ends, says_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(says_ready, b".")
        os.read(ends, 1)  # until the parent says so
        os._exit(0)
    os.read(ready, 1)
    assert try_lock(tmp_path / "lock") is None  # the child has not unlocked it,
    lock.forget()  # as when this process is killed
    again = try_lock(tmp_path / "lock")
    assert again is not None  # nor kept it
    os.write(says_end, b".")
    assert os.waitpid(child, 0)[1] == 0
    for descriptor in (ready, says_ready, ends, says_end):
        os.close(descriptor)
    del again
    assert try_lock(tmp_path / "lock") is not None


@pytest.mark.parametrize("missing", ["on this file system", "on this system"])
def test_without_locks_everything_goes_on_and_says_so_once(missing, monkeypatch, tmp_path, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = None if missing == "on this system" else types.SimpleNamespace(flock=none, LOCK_EX=2, LOCK_NB=4, LOCK_UN=8)
    monkeypatch.setattr(locks, "fcntl", fcntl)
    with only_writer(("--a", tmp_path)), only_writer(("--b", tmp_path)), open(str(tmp_path / "file"), "w") as file:
        for _ in range(2):
            locks.wait_for_lock(file)
    warned = [] if fcntl is None else [str(tmp_path / name) for name in (".lock", "file")]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == warned


def test_what_a_link_in_place_of_a_lock_points_to_is_not_written(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to("mine")
    refused("", try_lock, tmp_path / ".lock", kind=OSError)
    with only_writer(("--a", tmp_path)):
        assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_given_twice_is_locked_once(tmp_path):
    with only_writer(("--a", tmp_path), ("--b", tmp_path)):
        refused(f"--c .*: process {os.getpid()} on .* already writing there", only_writer(("--c", tmp_path)).__enter__)
    with only_writer(("--a", tmp_path)):
        pass


def test_stage_1_and_generation_are_refused_too(tmp_path, monkeypatch):
    argv = ["train_vqgan.py", "--input-folder", "demo", "--output", str(tmp_path), "--steps", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with only_writer(("--output", tmp_path)):
        refused("--output .* already writing there", train_vqgan.main)
    cat, dog = prompt_folders(tmp_path, ["a cat", "a dog"])
    first = lock_folder(cat)
    refused("--outputs-dir: another process is writing images into .*a_cat", lock_folder, cat)
    lock_folder(dog)
    first.close()
    lock_folder(cat)
