"""The shipped demo: its files are small, its vocabulary is repeatable, and it draws what its captions say."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle.loading import load
from data.demo import demo_images, demo_records
from sampling import SamplingOptions, decode, sample_codes

ROOT = Path(__file__).resolve().parents[1]


def test_the_shipped_files_are_small():
    assert (ROOT / "models/demo/vqgan.safetensors").stat().st_size < 3e6
    assert (ROOT / "models/demo/dalle.safetensors").stat().st_size < 10e6


def test_the_vocabulary_is_what_its_command_makes(tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(record.caption + "\n" for record in demo_records("train")), encoding="utf-8")
    command = [sys.executable, "-m", "bpe.train", "--captions", str(captions), "--vocab-size", "2048", "--output"]
    subprocess.run([*command, str(tmp_path / "vocab.txt")], check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / "vocab.txt").read_bytes() == (ROOT / "bpe/demo_vocab.txt").read_bytes()


@pytest.mark.parametrize("split,at_least", [("heldout", 18), ("train", 26)])
def test_the_shipped_model_draws_the_picture_of_a_caption(split, at_least):
    """Of 32 pictures, the nearest of all real ones is the caption's own for most (the README has all figures)."""
    loaded = load("demo", device=torch.device("cpu"))
    everything = demo_records("all")
    real = demo_images(everything, 64).flatten(1).float() / 255
    order = torch.randperm(len(demo_records(split)), generator=torch.Generator().manual_seed(0))[:32].tolist()
    chosen = [demo_records(split)[index] for index in order]
    text = loaded.tokenizer.tokenize([record.caption for record in chosen], loaded.dalle.config.text_seq_len)
    codes = sample_codes(loaded.dalle, text, list(range(32)), SamplingOptions(temperature=0)).codes
    drawn = loaded.vqgan.decode(codes).flatten(1)
    nearest = torch.cdist(drawn, real).argmin(dim=1).tolist()
    assert sum(everything[index].stem == record.stem for index, record in zip(nearest, chosen)) >= at_least


def test_pixels_do_not_depend_on_the_batch():
    loaded = load("demo", device=torch.device("cpu"))
    codes = torch.randint(loaded.vqgan.num_codes, (7, loaded.config.image_seq_len))
    together = decode(loaded, codes)
    for size in (1, 3, 4):
        assert torch.equal(torch.cat([decode(loaded, part) for part in codes.split(size)]), together)
