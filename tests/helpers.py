"""What more than one test file needs: tiny models, data sets and tokenizers, runs in this process and beside it."""
from __future__ import annotations

import errno
import functools
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import args
import checkpoints
import data
import engines
from bpe import load_tokenizer
from data import DataSettings, Team
from models.config import DalleConfig
from models.dalle import DalleModel
from models.vqgan import VQGAN, VqganConfig
from training.run import train
from utils.errors import UserError
from utils.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
NOBODY = 65534  # user id

# Tokenizers and models -----------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id per character, small enough to see through; knows what the data sets ask of one."""

    vocab_size = 300

    def unknown(self, text):
        return []

    def tokenize(self, texts, text_seq_len, truncate=False):
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), text_seq_len, dtype=torch.int64)
        for row, text in zip(rows, texts):
            if len(text) > text_seq_len and not truncate:
                raise UserError(f"caption {text!r} is too long: --truncate-captions")
            ids = [ord(character) % 299 + 1 for character in text[:text_seq_len]]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows


def words(text):
    """The letters of a text made by `Letters`, for ASCII captions."""
    return "".join(chr(number - 1) for number in text.tolist() if number)


def tiny_vqgan(**changes):
    """The configuration of a VQGAN of 16 codes, from 16x16 pixels to 4x4 codes, in the least time."""
    sizes = {"num_codes": 16, "embed_dim": 8, "resolution": 16, "z_channels": 8, "ch": 8, "ch_mult": (1, 1, 1)}
    sizes.update(num_res_blocks=1, attn_resolutions=(), num_groups=4)
    return VqganConfig(**{**sizes, **changes})


TINY_VQGAN = tiny_vqgan(num_codes=24, embed_dim=4, z_channels=4, ch_mult=(1, 2, 2))


def write_vqgan(folder, **changes):
    """Write a tiny VQGAN, always the same, into a folder; return the flags that name its files."""
    config = tiny_vqgan(**changes)
    torch.manual_seed(0)
    save_file(VQGAN(config).state_dict(), str(folder / "vqgan.safetensors"))
    config.to_yaml(folder / "vqgan.yaml")
    return vqgan_flags(folder)


def vqgan_flags(folder):
    return [f"--vqgan-model-path={folder / 'vqgan.safetensors'}", f"--vqgan-config-path={folder / 'vqgan.yaml'}"]


class TinyModel:
    """A tiny model on disk: checkpoint, vocabulary of letters, VQGAN of 24 codes on a 4x4 grid of a 16x16 image."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.vocabulary, letters = folder / "letters.txt", "abcdefghijklmnopqrstuvwxyz\u2581"
        lines = [f"{len(letters)} 0", *(f"{ord(letter)} {4 + index}" for index, letter in enumerate(letters))]
        self.vocabulary.write_text("\n".join([*lines, "1 0 2 3"]) + "\n", encoding="utf-8")
        self.tokenizer = load_tokenizer(str(self.vocabulary))
        self.vqgan_model, self.vqgan_config = folder / "vqgan.ckpt", folder / "vqgan.yaml"
        vqgan = VQGAN(TINY_VQGAN)
        torch.nn.init.normal_(vqgan.quantize.embedding.weight)
        TINY_VQGAN.to_yaml(self.vqgan_config)
        torch.save({"state_dict": vqgan.state_dict()}, self.vqgan_model)
        self.model = DalleModel(
            DalleConfig(self.tokenizer.vocab_size, 24, 10, 4, 24, 2, 2, 12, attn_types=("full", "axial_row"))
        )
        for name, parameter in self.model.named_parameters():  # a new model is nearly indifferent: give it opinions
            if name.endswith(".scale"):
                parameter.data.fill_(2.0)
            elif name.startswith("image_head."):
                parameter.data *= 6
            elif name == "text_head.bias":
                pads = [0, *range(self.tokenizer.vocab_size, len(parameter))]
                parameter.data[pads] = -50.0  # captions never end
        self.identity = {
            "tokenizer": dict(self.tokenizer.identity, path=str(self.vocabulary)),
            "vqgan": {
                "sha256": sha256_file(self.vqgan_model), "weights": str(self.vqgan_model),
                "config": str(self.vqgan_config),
            },
        }
        self.dalle = self.save("dalle_3.pt", self.identity)

    def save(self, name, training, weights=None, config=None):
        path = self.folder / name
        options, weights = (config or self.model.config).to_dict(), weights or self.model.state_dict()
        checkpoints.save_checkpoint(path, checkpoints.dalle_checkpoint(options, weights, 3, training=training))
        return path

    def other_vocabulary(self, folder):
        """A vocabulary of the same size that reads "a" as another letter."""
        path = folder / "letters.txt"
        path.write_text(self.vocabulary.read_text(encoding="utf-8").replace("97 4", "65 4"), encoding="utf-8")
        return path


def assert_same(first, second):
    """Both are {name: tensor} with the same bits."""
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def flat(state, name=""):
    """Every tensor (as its bytes) and every number of a nested state, by its path."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}.{part}").items()}
    return {name: state.detach().cpu().numpy().tobytes() if isinstance(state, torch.Tensor) else state}


def refused(message, function, *given, kind=UserError, **named):
    """Call what must raise such an error with a message like this pattern; return its text."""
    with pytest.raises(kind, match=message or None) as caught:
        function(*given, **named)
    return str(caught.value)


class Payload:
    """Unpickled freely, it makes a folder: what a hostile file would do with its reader's rights."""

    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


class Brightness:
    """Stands in for CLIP: how bright a picture is, from 0 to 1; for the prompt "dark" the less so, the better."""

    def __init__(self, path="", device="cpu"):
        self.path = path

    def similarity(self, prompt, pictures):
        self.prompt = prompt
        values = torch.tensor([float(np.asarray(picture).mean()) for picture in pictures]) / 255
        return -values if prompt == "dark" else values


# Pictures ------------------------------------------------------------------------------------------------------------


def random_picture(seed, size=16):
    """A PIL picture like no other, four pixels wider than high."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size + 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def as_bytes(image, form="PNG", **options):
    """A PIL picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb(width, height=None):
    """The bytes of a small PNG that claims so many pixels: a square, without a height."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height or width, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def random_images(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth random images of different contrast, uint8 (n, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return (torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def write_pairs(folder, captions, size=16, seed=1):
    """Write a random picture and a text file for each element of `captions`, numbered in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index, caption in enumerate(captions):
        random_picture(generator, size).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(caption, encoding="utf-8")
    return folder


def tar_of(path, files):
    """Write a compressed tar archive of (name, its bytes or the kind of a link or device and its target)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return path


def fill(folder, count):
    """Put a tiny VQGAN and so many pairs with two captions each into a folder, as `training_flags` wants them."""
    write_vqgan(folder)
    write_pairs(folder / "pairs", [f"picture {index}\nthe {index} th\n" for index in range(count)])
    return folder


# Training ------------------------------------------------------------------------------------------------------------


def training_flags(folder, out, *more, source="pairs", image_size=16):
    """The command line of a tiny training run, four pairs in a step, on the data and the VQGAN in a folder."""
    text = f"--config unit_test --device cpu --image-size {image_size} --batch-size 2 --gradient-accumulation 2"
    text += " --epochs 2 --max-steps 0 --text-seq-len 8 --hidden-size 16 --dim-head 8 --log-every 1"
    places = [] if "--generated-data" in more else [f"--input-folder={folder / source}"]
    places += [f"--checkpoint-output-dir={out / 'ckpt'}", *vqgan_flags(folder)]
    return [*text.split(), *places, *map(str, more)]


def flags(folder, out, *more):
    """`training_flags` with four of 24 pairs held out for validation, where options leave it the choice."""
    held_out = () if {"--generated-data", "--validation-folder"} & set(more) else ("--validation-fraction", "0.17")
    return training_flags(folder, out, *held_out, *more)


def train_here(flags):
    """Train in this process and return the engine."""
    config = args.parse(flags)
    engine = engines.create(config)
    train(config, engine)
    return engine


def read_metrics(folder, event=None):
    """All lines of metrics.jsonl, or those of one kind of event."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def run(folder, out, *more):
    """Train in this process and return the metrics."""
    train_here(flags(folder, out, *more))
    return read_metrics(out)


def losses_of(out):
    """(event, step, loss, image loss) of every line of metrics.jsonl."""
    return [(line["event"], line["step"], line["loss"], line["image_loss"]) for line in read_metrics(out)]


def weights(path):
    return checkpoints.read_dalle(path).weights


def weights_of(out):
    """The weights in the newest checkpoint of a run."""
    return weights(checkpoints.newest_checkpoint(out / "ckpt"))


# Processes -----------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_threads(*works):
    """Run functions at the same time and return their results."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(300) for future in [pool.submit(work) for work in works]]


def teams(count):
    """The `Team`s of threads that play so many processes: they average over each other."""
    values, barrier = [0.0] * count, threading.Barrier(count, timeout=60)

    def mean(rank, value):
        values[rank] = float(value)
        barrier.wait()
        result = sum(values) / count
        barrier.wait()
        return result

    return [Team(rank, count, functools.partial(mean, rank)) for rank in range(count)]


def run_script(*command, cwd=ROOT, **environment):
    """Run a Python script as a user does; returns the ended process, with the text it wrote."""
    words = [sys.executable, *map(str, command)]
    environment = {**os.environ, **environment}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def full_disk(*_, **__):
    """Stands in for whatever writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


def give_away(path):
    """Let a file belong to another user; skip the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(str(path), NOBODY, NOBODY, follow_symlinks=False)


def create_dataset(input_folder, tokenizer, text_seq_len, image_size, demo_split="all", **settings):
    """`data.create_dataset`, by the names of its settings."""
    settings = DataSettings(text_seq_len, image_size, **settings)
    return data.create_dataset(input_folder, tokenizer, settings, demo_split=demo_split)


def create_datasets(input_folder, tokenizer, text_seq_len, image_size, **options):
    """`data.create_datasets`, likewise."""
    apart = {name: options.pop(name) for name in ("validation_folder", "validation_holdout") if name in options}
    return data.create_datasets(input_folder, tokenizer, DataSettings(text_seq_len, image_size, **options), **apart)
