"""Disks that are full, folders that vanish or may not be written: what was finished stays, and training goes on."""
from __future__ import annotations

import errno
import shutil
import signal
import sys
import types

import pytest
import torch
from helpers import assert_same, flags, full_disk, read_metrics, refused, weights
from test_crash import assert_as_undisturbed, finish, slow_unless, start

import args
import engines
import log
from engines.native import NativeEngine
from training.run import train

SMALL = 20_000  # bytes: more than any log here takes, less than a checkpoint


def trained(folder, out, *more):
    config = args.parse(flags(folder, out, *more))
    log.setup(config.log_dir)
    train(config, engines.create(config))


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def steps(out):
    return [line["step"] for line in read_metrics(out, "train")]


@pytest.mark.parametrize("processes", slow_unless([(2,)], 1, 2))
def test_no_room_for_checkpoints(server, folder, tmp_path, undisturbed, processes):
    """Trained to the end, exit 1, what was good is good; and with room it goes on from there."""
    moment = ("engines.native:NativeEngine._update_weights", 4, "before")
    assert -signal.SIGKILL in map(server.wait, start(server, folder, tmp_path, processes=processes, kill=moment))
    good, log_file = everything(tmp_path / "ckpt"), tmp_path / "stderr.log"
    log_file.unlink()
    pids = start(server, folder, tmp_path, "--resume", processes=processes, largest_file=SMALL)
    assert [server.wait(pid) for pid in pids] == [1, 0][:processes]
    text = log_file.read_text()
    assert "Traceback" not in text and text.count("ERROR: step ") == 7  # it tries more often
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert f"dalle_1.pt: File too large; the newest checkpoint is {tmp_path / 'ckpt/dalle_0_2.pt'}" in line
    assert everything(tmp_path / "ckpt") == good  # and nothing half-written
    assert steps(tmp_path) == list(range(1, 11))
    finish(server, start(server, folder, tmp_path, "--resume", processes=processes), tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed(processes)[0])


def test_a_disk_that_has_room_again(folder, tmp_path, monkeypatch, caplog):
    save, calls = torch.save, []

    def full_for_a_while(*values):
        calls.append(len(steps(tmp_path)))
        full_disk() if 4 <= calls[-1] < 8 else save(*values)

    monkeypatch.setattr(torch, "save", full_for_a_while)
    trained(folder, tmp_path, "--checkpoint-save-steps", "4")
    assert calls == [4, 5, 6, 7, 8, 10]
    assert caplog.text.count("No space left on device; the newest checkpoint is none") == 4
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["dalle_1.pt", "dalle_1_8.pt"]


def test_no_room_for_logs_metrics_curve_and_codes(server, folder, tmp_path):
    options = ("--checkpoint-output-dir", "", "--log-dir", str(tmp_path / "log"))
    # The standard error of a real run may be a file on the same disk: it is full, too.
    finish(server, start(server, folder, tmp_path, *options, largest_file=600), tmp_path)
    assert (tmp_path / "stderr.log").stat().st_size == 600
    assert 0 < len(log.read_metrics(tmp_path / "log/metrics.jsonl")) < 5
    assert not (tmp_path / "log/loss.png").exists() and not list((tmp_path / "log").glob(".*tmp"))


def test_a_read_only_log_folder(server, folder, tmp_path):
    (tmp_path / "log").mkdir(mode=0o555)
    finish(server, start(server, folder, tmp_path, "--log-dir", str(tmp_path / "log")), tmp_path)
    warnings = [line for line in (tmp_path / "stderr.log").read_text().splitlines() if "WARNING" in line]
    for name in ("train.log (", "metrics.jsonl in ", "loss.png ("):
        assert sum(name in line for line in warnings) == 1, name
    assert (tmp_path / "ckpt/dalle_1.pt").exists() and not list((tmp_path / "log").iterdir())


def test_tensorboard_that_cannot_be_made(tmp_path, monkeypatch, caplog):
    def writer(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    with log.Metrics(tmp_path, tensorboard=True) as metrics:
        metrics.log("train", 1, loss=1.0)
    assert f"TensorBoard in {tmp_path} cannot be written (Permission denied)" in caplog.text and steps(tmp_path) == [1]


def test_folders_that_vanish_are_made_again(folder, tmp_path, monkeypatch, caplog):
    step, count = NativeEngine.step, [0]

    def vanishing(self, batch):
        count[0] += 1
        if count[0] == 3:
            shutil.rmtree(tmp_path / "run")
        return step(self, batch)

    monkeypatch.setattr(NativeEngine, "step", vanishing)
    trained(folder, tmp_path / "run", "--checkpoint-save-steps", "2")
    assert sorted(path.name for path in (tmp_path / "run/ckpt").glob("*.pt")) == [
        "dalle_0.pt", "dalle_0_4.pt", "dalle_1.pt", "dalle_1_6.pt", "dalle_1_8.pt",
    ]
    assert "metrics.jsonl was deleted: starting a new one at step 3" in caplog.text
    assert steps(tmp_path / "run") == list(range(3, 11)) and (tmp_path / "run/loss.png").exists()
    assert "step 5/10" in (tmp_path / "run/train.log").read_text()


def test_a_log_folder_that_vanishes_and_cannot_be_made_again(tmp_path, caplog):
    with log.Metrics(tmp_path / "log") as metrics:
        metrics.log("train", 1, loss=1.0)
        shutil.rmtree(tmp_path / "log")
        (tmp_path / "log").write_text("")
        metrics.log("train", 2, loss=1.0)
        metrics.log("train", 3, loss=1.0)
    assert caplog.text.count("can no longer be written") == 1


def test_an_earlier_run_that_cannot_be_moved_is_left_alone(folder, tmp_path):
    trained(folder, tmp_path, "--max-steps", "2")
    (tmp_path / "ckpt/earlier.1").mkdir()
    (tmp_path / "ckpt/earlier.2").symlink_to(tmp_path / "nowhere")  # does not exist, nor can be made
    good = weights(tmp_path / "ckpt/dalle_0_2.pt")
    complaint = "--checkpoint-output-dir: cannot make .*earlier.2: File exists"
    refused(complaint, trained, folder, tmp_path, "--max-steps", "2")
    assert_same(weights(tmp_path / "ckpt/dalle_0_2.pt"), good)
