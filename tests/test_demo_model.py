"""The shipped demo: its files are small, its vocabulary is repeatable, and it draws what its captions say."""
from __future__ import annotations

import runpy
import sys

import pytest
import torch
from helpers import ROOT, refused

from dalle.loading import load
from data.demo import demo_images, demo_records
from sampling import SamplingOptions, decode, sample_codes


@pytest.fixture(scope="module")
def loaded():
    return load("demo", device=torch.device("cpu"))


def test_the_shipped_files_are_small():
    assert (ROOT / "models/demo/vqgan.safetensors").stat().st_size < 3e6
    assert (ROOT / "models/demo/dalle.safetensors").stat().st_size < 10e6


def test_the_vocabulary_is_what_its_command_makes(tmp_path, monkeypatch):
    captions, vocabulary = tmp_path / "captions.txt", tmp_path / "vocab.txt"
    captions.write_text("".join(record.caption + "\n" for record in demo_records("train")), encoding="utf-8")
    command = f"bpe.train --captions {captions} --vocab-size 2048 --output {vocabulary}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.delitem(sys.modules, "bpe.train", raising=False)
    assert refused("", runpy.run_module, "bpe.train", run_name="__main__", kind=SystemExit) in ("0", "None")
    assert vocabulary.read_bytes() == (ROOT / "bpe/demo_vocab.txt").read_bytes()


def test_the_shipped_model_draws_the_picture_of_a_caption(loaded):
    """Of 32 pictures, the nearest of all real ones is the caption's own for most (the README has all figures)."""
    everything = demo_records("all")
    real = demo_images(everything, 64).flatten(1).float() / 255
    for split, at_least in (("heldout", 24), ("train", 30)):
        order = torch.randperm(len(demo_records(split)), generator=torch.Generator().manual_seed(0))[:32].tolist()
        chosen = [demo_records(split)[index] for index in order]
        text = loaded.tokenizer.tokenize([record.caption for record in chosen], loaded.dalle.config.text_seq_len)
        codes = sample_codes(loaded.dalle, text, list(range(32)), SamplingOptions(temperature=0)).codes
        nearest = torch.cdist(loaded.vqgan.decode(codes).flatten(1), real).argmin(dim=1).tolist()
        assert sum(everything[index].stem == record.stem for index, record in zip(nearest, chosen)) >= at_least, split


def test_pixels_do_not_depend_on_the_batch(loaded):
    codes = torch.randint(loaded.vqgan.num_codes, (7, loaded.config.image_seq_len))
    together = decode(loaded, codes)
    for size in (1, 3, 4):
        assert torch.equal(torch.cat([decode(loaded, part) for part in codes.split(size)]), together)
