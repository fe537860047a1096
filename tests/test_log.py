"""Log lines, log file, progress, metric writers and the loss curve."""
from __future__ import annotations

import io
import json
import logging
import re
import sys
import types
from unittest import mock

import pytest
import torch
from helpers import full_disk, read_metrics, refused
from PIL import Image

import log


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def events(path):
    return read_metrics(path.parent)


BLUE, RED = (31, 119, 180), (214, 39, 40)


def colours(png):
    return {colour for _, colour in Image.open(png).convert("RGB").getcolors(1 << 20)}


def test_lines_match_what_benchmarks_look_for():
    line, loss = log.step_line(12, 100, 3, 2.3651, 1.5, 2.5, 1e-3, 85.3), r"loss: *(\d*\.\d*)"
    assert re.findall(r"throughput: *(.*?) samples/sec", line) == ["85.3"] and re.findall(loss, line) == ["2.3651"]
    assert re.findall(r"throughput: *(.*?) samples/sec", log.throughput_line(1234.5)) == ["1234"]
    assert re.findall(r"throughput: *(.*?) images/sec", log.throughput_line(7.125, "images")) == ["7.12"]
    assert re.findall(r"Compiled model in *(.*?) secs", log.compiled_line(12.34)) == ["12.3"]
    line = log.validation_line(12, 3, 2.5, 1.5, 2.75)
    assert "2.5000" in line and not re.search(loss, line)  # it is not taken for the training loss
    for seconds, text in ((0, "0s"), (45, "45s"), (59.7, "1m00s"), (200, "3m20s"), (3900, "1h05m"), (1e5, "1d03h")):
        assert log.duration(seconds) == text
    assert log.duration(float("inf")) == "?"


@pytest.mark.parametrize("value, text", [(0.0, "0"), (0.012345, "0.0123"), (8.527, "8.53"), (85.27, "85.3"),
                                         (852.7, "853"), (12345.6, "12346")])
def test_rates_have_three_digits_everywhere(monkeypatch, value, text):
    assert log.rate(value) == f"{text} images/s" and log.rate(value, "pairs") == f"{text} pairs/s"
    monkeypatch.setattr(log.Progress, "samples_per_second", value)
    bar = log.progress(None, "draw", unit="token", plain=False)
    bar.update(1, **{"images/s": value, "loss": 2.5})
    assert bar.postfix() == f"{text} images/s, loss 2.5000"
    bar.update(1, samples=1)
    assert bar.postfix().endswith(f"{text} tokens/s")


def test_the_main_process_writes_console_and_file_the_others_only_errors(tmp_path, capsys):
    path = log.setup(tmp_path / "new")
    logging.getLogger("a").info("hello %d", 1)
    logging.getLogger("a").warning("careful \udcff")
    assert path.read_text(encoding="utf-8").splitlines()[0].endswith("  hello 1")
    assert "WARNING: careful \\udcff" in path.read_text(encoding="utf-8") and "hello 1" in capsys.readouterr().err

    assert log.setup(tmp_path / "other", is_main=False) is None
    logging.getLogger("a").warning("quiet")
    logging.getLogger("a").error("loud")
    written = capsys.readouterr().err
    assert "quiet" not in written and "ERROR: loud" in written and not (tmp_path / "other").exists()
    assert "loud" not in path.read_text(encoding="utf-8")  # set up again: the first file is closed


def test_a_log_file_that_cannot_be_made_or_written_is_only_a_warning(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert log.setup(tmp_path / "file" / "below") is None and "continuing without it" in capsys.readouterr().err

    log.setup(tmp_path)
    file = next(handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)
            and handler.baseFilename == str(tmp_path / "train.log"))
    monkeypatch.setattr(file, "stream", types.SimpleNamespace(write=full_disk, flush=full_disk, close=lambda: None))
    logging.getLogger("a").info("one")
    logging.getLogger("a").info("two")
    written = capsys.readouterr().err
    assert written.count("No space left on device") == 1 and "Traceback" not in written
    assert "one" in written and "two" in written


def test_without_a_terminal_progress_is_plain_log_lines(capsys):
    log.setup()
    with log.progress(4, "train", initial=1, unit="step", interval=0) as bar:
        for _ in range(3):
            bar.update(1, samples=8, loss=2.5)
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"train 2/4 \(50%\) steps, loss 2\.5000, \d+(\.\d)? images/s, .+ left$", lines[0])
    assert "train 4/4 (100%) steps, loss 2.5000" in lines[-1] and "\r" not in "".join(lines)
    with log.progress(None, "read", unit="image", interval=3600) as bar:  # which wait for their interval,
        for _ in range(5):
            bar.update(10)
        assert capsys.readouterr().err == ""
    assert "read 50 images" in capsys.readouterr().err
    for settings in (dict(plain=False), dict(is_main=False)):  # and may be disabled
        with log.progress(2, "read", interval=0, **settings) as bar:
            bar.update(2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_log_lines_do_not_tear_the_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log.setup()
    logger = logging.getLogger("a")
    with log.progress(2, "train") as bar:
        bar.update(1, samples=4, loss=2.5)
        logger.warning("between")
        logger.info("a detail", extra=log.DETAIL)
        bar.update(1, samples=4, loss=1.25)
    logger.info("a later detail", extra=log.DETAIL)
    text = terminal.getvalue()
    assert "2/2" in text and "loss 1.2500" in text and "0s left" in text
    line = [part for part in re.split("[\r\n]", text) if "between" in part]
    assert len(line) == 1 and line[0].endswith("WARNING: between") and "train" not in line[0]
    assert " a detail" not in text and "a later detail" in text


def test_rates_leave_out_the_first_step_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    bar = log.progress(10, "train", max_seconds=60, plain=False)
    assert (bar.samples_per_second, bar.overall_samples_per_second, bar.seconds_left) == (0.0, 0.0, 60.0)

    def step(seconds):
        now[0] += seconds
        bar.update(1, samples=6)

    step(20)  # compiling
    assert bar.overall_samples_per_second == pytest.approx(6 / 20)
    step(2)
    step(2)
    assert bar.overall_samples_per_second == pytest.approx(3.0)
    with bar.paused():
        now[0] += 7
    step(2)
    assert bar.overall_samples_per_second == pytest.approx(3.0) and bar.samples_per_second == pytest.approx(24 / 26)
    assert bar.seconds_left == pytest.approx(60 - 33)  # 6 steps at 6.5 s would take longer than the limit
    for _ in range(5):
        step(0.5)
    assert bar.seconds_left == pytest.approx((26 + 2.5) / 9)


def write_losses(folder, *losses, **settings):
    """Metrics of so many steps; returns their path."""
    with log.Metrics(folder, **settings) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.log("train", step, loss=loss)
    return metrics.path


def test_metrics_are_one_flushed_json_line_each(tmp_path):
    metrics = log.Metrics(tmp_path)
    metrics.log("train", 1, epoch=0, loss=torch.tensor(2.5), image_loss=float("nan"), note="x")
    (event,) = events(metrics.path)  # readable before close
    assert event.pop("time") > 1e9
    assert event == {"event": "train", "step": 1, "epoch": 0, "loss": 2.5, "image_loss": None, "note": "x"}
    metrics.close()
    log.Metrics(tmp_path / "other", is_main=False).log("train", 1, loss=1.0)
    assert not (tmp_path / "other").exists()
    for loss in (2.0, 3.0):  # a new run keeps the metrics of the one before
        write_losses(tmp_path, loss)
    names = ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert [json.loads((tmp_path / name).read_text())["loss"] for name in names] == [2.5, 2.0, 3.0]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with log.Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log("train", step, loss=float(step))
            metrics.log("validation", step, loss=float(step))
    with open(metrics.path, "a", encoding="utf-8") as file:
        file.write('{"event": "train", "st')  # killed while writing
    with log.Metrics(tmp_path, resume_step=2) as metrics:
        metrics.log("validation", 2, loss=9.0)  # validated again at the very step: already there
        metrics.log("train", 3, loss=3.5)
    found = [(event["event"], event["step"], event["loss"]) for event in events(metrics.path)]
    assert found == [("train", 1, 1.0), ("validation", 1, 1.0), ("train", 2, 2.0), ("validation", 2, 2.0),
                     ("train", 3, 3.5)]


def test_a_full_disk_stops_only_the_metrics(tmp_path, monkeypatch, caplog):
    metrics = log.Metrics(tmp_path).__enter__()
    full = types.SimpleNamespace(write=full_disk, flush=full_disk, close=full_disk)
    monkeypatch.setattr(metrics._writers["metrics.jsonl"], "_file", full)
    for step in range(3):
        metrics.log("train", step, loss=1.0)
    metrics.close()
    assert caplog.text.count("No space left on device") == 1
    (tmp_path / "file").write_text("")
    write_losses(tmp_path / "file", 1.0)  # a folder that cannot be made
    assert "continuing without it" in caplog.text


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_the_way_out(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # what Python does with a module that cannot be imported
    refused(f"--{name} needs .* pip install {name}$", log.Metrics, tmp_path, **{name: True})


def test_tensorboard_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    write_losses(tmp_path, 2.5, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package; the run that it makes is `wandb.init.return_value`."""
    wandb = mock.Mock(Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_gets_numbers_and_a_resumed_run_its_id(tmp_path, wandb):
    names, run = {"wandb_project_name": "p", "wandb_run_name": "r"}, wandb.init.return_value
    for step, resume_step in ((1, None), (2, 1), (1, None)):
        with log.Metrics(tmp_path, wandb=True, config={"a": 1}, resume_step=resume_step, **names) as metrics:
            metrics.log("train", step, loss=2.5, note="x")
            metrics.images("samples", step, ["a", "b"], torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
    first, resumed, new = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["project"], first["name"], first["config"], first["dir"]) == ("p", "r", {"a": 1}, str(tmp_path))
    assert resumed["id"] == first["id"] != new["id"] and (first["resume"], resumed["resume"]) == (None, "allow")
    logged, image = run.log.call_args_list, wandb.Image.return_value
    assert logged[:4:2] == [mock.call({"train/loss": 2.5}, step=step) for step in (1, 2)]
    assert logged[1] == mock.call({"samples": [image, image]}, step=1)
    assert [(call.args[0].shape, call.kwargs) for call in wandb.Image.call_args_list[:2]] == [
        ((4, 5, 3), {"caption": "a"}), ((4, 5, 3), {"caption": "b"})
    ]
    assert run.finish.call_count == 3


def test_wandb_that_fails_is_left_out_and_the_rest_goes_on(tmp_path, wandb, caplog):
    wandb.init.return_value.log.side_effect = [None, None, ConnectionError("gone")]
    assert len(events(write_losses(tmp_path, 1.0, 1.0, 1.0, 1.0, wandb=True))) == 4
    assert [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list] == [1, 2, 3]
    assert caplog.text.count("ConnectionError: gone") == 1
    wandb.init.side_effect = RuntimeError("No API key configured.")  # as without an account
    refused("--wandb: No API key configured.*WANDB_MODE=offline", log.Metrics, tmp_path, wandb=True)


def test_nothing_is_drawn_without_a_training_loss_and_smoothing_is_centred(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1, "loss": null}\nnonsense\n[1]\n{"event": "train", "loss": 1}\n')
    assert log.plot_losses(path, tmp_path / "loss.png") is False and not (tmp_path / "loss.png").exists()
    refused("absent.jsonl: No such file", log.plot_losses, tmp_path / "absent.jsonl", tmp_path / "loss.png")
    assert log.smoothed([1.0, 2.0, 6.0, 4.0], 1) == [1.5, 3.0, 4.0, 5.0] and log.smoothed([1.0, 2.0], 0) == [1.0, 2.0]
    line = [float(value) for value in range(20)]
    assert log.smoothed(line, 3)[3:-3] == line[3:-3]  # no lag


def test_loss_png_shows_training_and_validation(tmp_path):
    with log.Metrics(tmp_path) as metrics:
        for step in range(1, 101):
            loss = float("nan") if step == 50 else 2 + 6 / step
            metrics.log("train", step, loss=loss, text_loss=1 + 6 / step, image_loss=2.2 + 6 / step)
    png = tmp_path / "pictures" / "loss.png"
    assert log.plot_losses(metrics.path, png) and Image.open(png).size == (1080, 660)
    assert BLUE in colours(png) and RED not in colours(png)
    with log.Metrics(tmp_path, resume_step=100) as metrics:
        metrics.log("validation", 50, loss=3.0)
        metrics.log("validation", 100, loss=2.5)
    assert log.plot_losses(metrics.path, png) and RED in colours(png)
    assert log.plot_losses(write_losses(tmp_path / "single", 2.5), png) and BLUE in colours(png)
