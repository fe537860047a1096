"""Processes that read data: they end with their use, and no program waits for them at its exit, however it ends."""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import pytest
import torch
from helpers import flags, run

import args
import engines
from engines.native import NativeEngine
from training.setup import build_parts
from utils.errors import UserError
from utils.loading import make_loader, read

WORKERS = ("--dataloader-workers", "2", "--cache-codes", "off")


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index == 500:
            raise UserError("number 500")
        return index


def children():
    return len(multiprocessing.active_children())


def test_they_end_when_reading_ends_whoever_holds_a_part_of_it(folder, tmp_path, monkeypatch):
    before, loader = children(), make_loader(Numbers(), 2, batch_size=10)
    batches = read(loader)
    assert next(batches).tolist() == list(range(10)) and children() == before + 2
    batches.close()
    assert children() == before
    with pytest.raises(UserError, match="number 500") as held:  # its traceback holds the loader's iterator
        list(read(loader))
    assert children() == before

    def step(self, batch):
        list(batch)
        assert children() == before + 2
        raise RuntimeError("in a step")

    monkeypatch.setattr(NativeEngine, "step", step)
    with pytest.raises(RuntimeError, match="in a step") as held_too:
        run(folder, tmp_path, *WORKERS)
    assert children() == before and held and held_too


def main():
    """What a program may do that uses the engine: keep a loader that is not at its end, and end."""
    engine = engines.create(args.parse())
    sys.kept = engine.loader(build_parts(engine.config).train_set, 0)
    list(next(sys.kept))
    assert children() == 2


STEP, ENCODE, VALIDATE = (
    ("engines.native:NativeEngine." + name, number, "after")
    for name, number in (("step", 2), ("encode", 1), ("_codes", 11))
)
ENDINGS = {
    "an error of the user": ("train", WORKERS, (*STEP, "UserError"), 1),
    "a defect": ("train", WORKERS, (*STEP, "RuntimeError"), 1),
    "sys.exit": ("train", WORKERS, (*STEP, "SystemExit"), 1),
    "Ctrl-C at once": ("train", WORKERS, (*STEP, "KeyboardInterrupt"), 130),
    "SIGTERM": ("train", WORKERS, (*STEP, int(signal.SIGTERM)), 0),
    "a defect while images are encoded": ("train", WORKERS[:2], (*ENCODE, "RuntimeError"), 1),
    "Ctrl-C while images are encoded": ("train", WORKERS[:2], (*ENCODE, int(signal.SIGINT)), 130),
    "a defect in validation": ("train", WORKERS, (*VALIDATE, "RuntimeError"), 1),
    "a loader that is kept": ("test_loading", WORKERS, None, 0),
    "stage 1, a defect": ("train_vqgan", (), ("training.vqgan_trainer:Trainer.step", 2, "after", "RuntimeError"), 1),
    "evaluation, a defect": ("evaluate", (), ("models.dalle:TextToImage.forward", 1, "after", "RuntimeError"), 1),
}


@pytest.mark.parametrize("script, more, ending, status", ENDINGS.values(), ids=ENDINGS)
def test_no_program_waits_for_them_at_its_exit(server, folder, tmp_path, script, more, ending, status):
    argv = flags(folder, tmp_path, "--cache-codes", str(tmp_path / "codes"), *more)
    if script == "train_vqgan":
        argv = ["--input-folder", str(folder / "pairs"), "--output", str(tmp_path), "--steps", "4", "--batch-size", "4"]
        argv += ["--config", str(folder / "vqgan.yaml"), "--dataloader-workers", "2", "--device", "cpu"]
    if script == "evaluate":
        argv = ["--dalle-path", "demo", "--max_pairs", "40", "--batch_size", "4", "--dataloader_workers", "2"]
    pid = server.start(argv, tmp_path / "stderr.log", ending, script)
    assert server.wait(pid, seconds=200) == status, (tmp_path / "stderr.log").read_text()[-3000:]
    with pytest.raises(ProcessLookupError):  # the program was a process group: nobody is left of it
        os.killpg(pid, 0)
    said = (tmp_path / "stderr.log").read_text()
    assert "is killed by signal" not in said and "Exception ignored" not in said
