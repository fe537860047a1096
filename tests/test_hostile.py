"""Strangers' files: a pickle with code in it is refused by every reader of the commands, and its code never runs.

The payload is a real one: loaded by a trusting reader it makes a file, which a test shows first.
"""
from __future__ import annotations

import json
import pickle
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, Payload, refused, tar_of
from safetensors.torch import load_file

import checkpoints
import checkpoints.__main__
import evaluate
import generate
import train
import train_vqgan
from checkpoints.vqgan import load_vqgan, load_vqgan_state
from dalle.loading import load
from dalle.reranking import ClipRanker
from models.vqgan_config import DEMO_CONFIGS
from training.run import Run
from utils import archives
from utils.archives import unpack
from utils.files import sha256_file
from utils.tarballs import unpack_tar

DEMO = ROOT / "models" / "demo"
DEMO_YAML = ["--vqgan-config-path", str(DEMO / "vqgan.yaml")]

FORMS = ["zip", "legacy", "pickle"]


def write(path, document, form):
    if form == "pickle":
        path.write_bytes(pickle.dumps(document))
    else:
        torch.save(document, str(path), _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", FORMS)
def test_the_payload_works_where_files_are_trusted(tmp_path, form):
    write(tmp_path / "evil", {"x": Payload(tmp_path / "trap")}, form)
    with open(tmp_path / "evil", "rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert (tmp_path / "trap").exists()


def demo_weights():
    return load_file(str(DEMO / "vqgan.safetensors"))


def evil_dalle(trap):
    document = {"hparams": {}, "vae_params": None, "epoch": 0, "weights": {"x": torch.ones(1)}, "opt_state": None}
    return dict(document, scheduler_state=Payload(trap))


def evil_options(trap):
    document = evil_dalle(trap)
    return dict(document, scheduler_state=None, hparams={"x": document["scheduler_state"]})


def evil_vqgan(trap):
    return {"state_dict": demo_weights(), "callbacks": Payload(trap)}


TRAIN = ["--config", "demo", "--device", "cpu", "--max-steps", "1", "--cache-codes", "off", "--checkpoint-output-dir"]
VQGAN = ["--input-folder", "demo", "--device", "cpu", "--steps", "1", "--output"]
# What to run: (document, where it lies, command). {} is the folder of the test.
READERS = {
    "train --pretrained-checkpoint": (evil_dalle, "e", train, [*TRAIN, "{}/out", "--pretrained-checkpoint", "{}/e"]),
    "train --resume": (evil_dalle, "out/dalle_0.pt", train, [*TRAIN, "{}/out", "--resume"]),
    "train --vqgan-model-path": (evil_vqgan, "e", train, [*TRAIN, "{}/out", "--vqgan-model-path", "{}/e"]),
    "generate --dalle-path": (evil_dalle, "e", generate, ["--text", "a", "--dalle-path", "{}/e"]),
    "generate --vqgan-model-path": (
        evil_vqgan, "e", generate, ["--text", "a", "--dalle-path", "demo", "--vqgan-model-path", "{}/e", *DEMO_YAML],
    ),
    "evaluate --dalle-path": (evil_dalle, "e", evaluate, ["--dalle-path", "{}/e"]),
    "train_vqgan --vqgan-model-path": (
        evil_vqgan, "e", train_vqgan, [*VQGAN, "{}/out", "--vqgan-model-path", "{}/e", *DEMO_YAML],
    ),
    "train_vqgan --perceptual-weights": (
        evil_vqgan, "e", train_vqgan, [*VQGAN, "{}/out", "--perceptual-weights", "{}/e"],
    ),
    "train_vqgan --resume": (evil_vqgan, "out/training.pt", train_vqgan, [*VQGAN, "{}/out", "--resume"]),
    "checkpoints export": (evil_dalle, "e", checkpoints.__main__, ["export", "{}/e", "{}/o"]),
    "evaluate --dalle-path, safetensors": (evil_dalle, "e.safetensors", evaluate, ["--dalle-path", "{}/e.safetensors"]),
    "evaluate --dalle-path, in options": (evil_options, "e", evaluate, ["--dalle-path", "{}/e"]),
    "evaluate --dalle-path, bare": (Payload, "e", evaluate, ["--dalle-path", "{}/e"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_file_is_refused_and_never_runs(reader, form, tmp_path, monkeypatch):
    document, place, program, words = READERS[reader]
    (tmp_path / "out").mkdir()
    write(tmp_path / place, document(tmp_path / "trap"), form)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x", *(word.format(tmp_path) for word in words)])
    if reader == "train --resume" and form != "zip":
        # What no run of ours wrote is passed over, by name: the run starts from the beginning.
        monkeypatch.setattr(Run, "take_epochs", lambda self: None)
        monkeypatch.setattr(Run, "finish", lambda self: None)
        program.main()
    else:
        message = refused(Path(place).name, program.main)
        if form == "zip" and reader not in ("train_vqgan --resume", "evaluate --dalle-path, safetensors"):
            assert "holds more than tensors and plain values (posix.mkdir) and was not opened" in message
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_code_in_a_clip_folder_never_runs(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, trap, code = tmp_path / "clip", tmp_path / "trap", ["evil.X", "evil.X"]
    folder.mkdir()
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.CLIPConfig(text_config=part, vision_config=dict(part)).save_pretrained(str(folder))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(trap)!r})")
    table = json.loads((folder / "config.json").read_text())
    table["auto_map"] = {"AutoModel": "evil.X", "AutoTokenizer": code, "AutoConfig": "evil.X"}
    (folder / "config.json").write_text(json.dumps(table))
    tokenizer = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": code}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.save({"x": Payload(trap)}, str(folder / name))
    refused("--clip-path", ClipRanker, folder)
    assert not trap.exists()


HUGE = {"num_hidden_layers": 10**9, "hidden_size": 10**9, "vocab_size": 10**12, "image_size": 10**6}
#: (content of config.json, what is named in it), also of what is no model at all.
CLIPS = [(json.dumps({"model_type": "clip", part: {name: value}}), name)
         for part in ("text_config", "vision_config") for name, value in HUGE.items()]  # fmt: skip
CLIPS += [(content, "") for content in ("[1]", "{", "[" * 100000, '{"text_config": 3, "vision_config": [1]}')]


@pytest.mark.parametrize("content, name", CLIPS, ids=range(len(CLIPS)))
def test_a_clip_model_of_absurd_size_is_refused_before_it_is_built(content, name, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    refused(f"--clip-path .*{name}", ClipRanker, tmp_path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    path = tmp_path / "v.ckpt"
    torch.save({str(number): torch.ones(1000).half()[:] for number in range(3)}, path)
    assert len(load_vqgan_state(path)) == 3
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(path) as source:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    refused("compressed archive", load_vqgan_state, tmp_path / "bomb.ckpt")
    torch.save(dict(demo_weights(), **{"quantize.embedding.weight": torch.ones(1).expand(10**6, 10**6)}), path)
    refused("claims more than the file holds", load_vqgan_state, path)
    torch.save(dict.fromkeys(map(str, range(1000)), torch.ones(100000).half()), path)
    refused("more memory than the file holds", load_vqgan_state, path)


def demo_document(**parts):
    checkpoint = checkpoints.read_dalle(DEMO / "dalle.safetensors")
    weights = {name: value.float() for name, value in checkpoint.weights.items()}
    return checkpoints.dalle_checkpoint(checkpoint.config, weights, 1, **parts)


def nested(value, levels):
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "state, message", [
        (torch.ones(1).expand(10**6, 10**6), "claims more than the file holds"),
        (nested([0], 15), None),  # parts that refer to each other take no time
        (nested([0], 25), "nested too deeply"),
    ], ids=["claims more", "deep", "too deep"],
)
def test_an_optimizer_state_is_looked_at(tmp_path, state, message):
    torch.save(demo_document(opt_state={"state": {0: {"exp_avg": state}}}), str(tmp_path / "d.pt"))
    if message is None:
        assert checkpoints.read_dalle(tmp_path / "d.pt").epoch == 1
    else:
        refused(message, checkpoints.read_dalle, tmp_path / "d.pt")


def test_a_configuration_larger_than_the_weights_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    document = DEMO_CONFIGS["f8_demo"].to_dict()
    document["model"]["params"]["n_embed"] = 1 << 20
    document["model"]["params"]["ddconfig"]["ch"] = 256
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(document))
    built, original = [], torch.nn.Conv2d.__init__

    def noted(self, *positional, **named):
        original(self, *positional, **named)
        built.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", noted)
    refused("the weights do not fit", load_vqgan, DEMO / "vqgan.safetensors", tmp_path / "v.yaml")
    assert built and set(built) == {"meta"}


def test_a_training_state_of_another_program_is_one_line(tmp_path, monkeypatch):
    # Its weights are good; the rest has our form and no sense.
    training = {"position": {"epoch": "x"}, "engine": {"engine": "native"}, "num_samples": None}
    (tmp_path / "out").mkdir()
    checkpoints.save_checkpoint(tmp_path / "out" / "dalle_0.pt", demo_document(training=training))
    monkeypatch.setattr("sys.argv", ["x", *TRAIN, str(tmp_path / "out"), "--resume"])
    refused("--resume: .*dalle_0.pt.*--pretrained-checkpoint", train.main)


def test_a_link_in_a_zip_archive_becomes_a_plain_file(tmp_path):
    with zipfile.ZipFile(str(tmp_path / "a.zip"), "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    unpack(tmp_path / "a.zip", tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "link").is_symlink() and (tmp_path / "out" / "link").read_text() == "/etc"


def test_bombs_of_archives_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_SMALL", 1000)
    with zipfile.ZipFile(str(tmp_path / "a.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(10**6))
    refused("unpacks to far more", unpack, tmp_path / "a.zip", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and (tmp_path / "a.zip").exists()
    top = tarfile.TarInfo("top")
    top.type = tarfile.DIRTYPE  # the same one again and again
    (tmp_path / "a.tar").write_bytes(top.tobuf() * 10002 + bytes(1024))
    refused("more than 10000 files", unpack_tar, tmp_path / "a.tar", tmp_path / "top", 1 << 30)
    assert not (tmp_path / "top").exists()


KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
UNSAFE = [[("top/a", (kind, "/etc/passwd"))] for kind in KINDS] + [[("a/x", b"x"), ("a/x", b"y")]]
UNSAFE += [[(name, b"x")] for name in ("/abs", "../up", "top/../../up", "a\\b", "c:x")]


@pytest.mark.parametrize("files, message", [
    *((files, f"unsafe entry {files[0][0]!r}") for files in UNSAFE), ([("a", b"x"), ("a/x", b"y")], "cannot unpack"),
    ([("a/large", b"x" * 2000)], "more than the 1000 bytes"), ([("a/x", b"x"), ("b/x", b"x")], "2 top-level entries"),
])
def test_links_devices_and_names_that_lead_out_of_a_tar_archive_are_refused(tmp_path, files, message):
    archive, content = tar_of(tmp_path / "x.tar.gz", files), (tmp_path / "x.tar.gz").read_bytes()
    refused(re.escape(message), unpack_tar, archive, tmp_path / "sub" / "top", 1000)
    assert list((tmp_path / "sub").iterdir()) == [] and sorted(tmp_path.iterdir()) == [tmp_path / "sub", archive]
    assert archive.read_bytes() == content
    archive.write_bytes(content[:40])
    refused("is damaged", unpack_tar, archive, tmp_path / "top", 10**6)


def test_what_a_checkpoint_records_is_data_not_a_path_to_trust(tmp_path):
    """A recorded path is only followed to a file whose sha256 is the recorded one, and read like any other."""
    evil = tmp_path / "evil"
    torch.save(Payload(tmp_path / "trap"), evil)
    vqgan = {"weights": str(evil), "config": str(DEMO / "vqgan.yaml"), "sha256": sha256_file(evil)}
    training = {"vqgan": vqgan, "tokenizer": {"sha256": "0" * 64, "path": "/etc/passwd"}, "engine": {}}
    checkpoints.save_checkpoint(tmp_path / "d.pt", demo_document(training=training))
    refused("", load, tmp_path / "d.pt")
    refused("", load, tmp_path / "d.pt", ROOT / "bpe" / "demo_vocab.txt")
    assert not (tmp_path / "trap").exists()
