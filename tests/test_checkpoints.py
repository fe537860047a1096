"""This application's checkpoints: exact round trips, damage, refused options, export, and the files of a run."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile

import pytest
import torch
from helpers import assert_same, full_disk, refused
from models_for_tests import randomised
from safetensors.torch import save_file

from checkpoints import (
    checkpoint_name,
    dalle_checkpoint,
    export_safetensors,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_dalle,
    save_checkpoint,
    trust,
    verify,
)
from checkpoints.__main__ import main
from checkpoints.files import export_digest, read_safetensors
from checkpoints.trust import aliases, check_state, empty_weights, model_config
from models.config import DalleConfig
from models.dalle import DalleModel
from utils.errors import UserError, run_main

TINY = DalleConfig(
    num_text_tokens=11, num_image_tokens=6, text_seq_len=3, grid=2, dim=8, depth=3, heads=2, dim_head=6,
    attn_types=("full", "axial_row"),
)
OPTIONS = {
    "plain": {}, "sandwich": {"sandwich_norm": True},
    "rotary": {"rotary": True, "shift_tokens": True, "text_positions": False, "image_positions": "none"},
    "stable tied": {"stable": True, "tie_embeddings": True},
    "shared": {"attn_types": ("full",), "shared_attn_ids": (0, 1), "shared_ff_ids": (4, 4, 2)},
    "mindalle": {
        "bos": False, "unique_pads": False, "layer_scale": False, "activation": "gelu", "image_positions": "learned",
        "qkv_bias": True, "head_bias": False, "init_std": 0.02,
    },
    "unusual": {"ff_mult": 2, "out_bias": False, "ff_bias": False, "activation": "quick_gelu", "attn_dropout": 0.25,
                "value_residual": True},
}


def random_model(seed=3, **options):
    """A tiny DALL-E in which no two weights are equal, not even biases and norms, so that every term matters."""
    return randomised(DalleModel(dataclasses.replace(TINY, **options)), seed)


def logits(model):
    """Text and image logits of a fixed batch, as one vector."""
    text = torch.tensor([[4, 7, 0], [1, 0, 0]])
    codes = torch.tensor([[5, 0, 3, 1], [2, 2, 4, 0]])
    with torch.no_grad():
        return torch.cat([part.flatten() for part in model(text, codes)])


def rebuilt(checkpoint):
    """The model that a checkpoint describes, in fp32."""
    model = DalleModel(DalleConfig.from_dict(checkpoint.config)).eval()
    model.load_state_dict(checkpoint.weights)
    return model


def ours(model=None, **parts):
    """A checkpoint of this application."""
    model = model or random_model()
    return dalle_checkpoint(model.config.to_dict(), model.state_dict(), parts.pop("epoch", 2), **parts)


def stored(folder, model=None, name="dalle_2.pt", **parts):
    """The path of such a checkpoint."""
    save_checkpoint(folder / name, ours(model, **parts))
    return folder / name


def exported(path, dtype=None):
    """The path of a checkpoint's export."""
    export_safetensors(read_dalle(path), path.with_name("model.safetensors"), dtype)
    return path.with_name("model.safetensors")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trip_is_exact(tmp_path, options):
    model = random_model(**options)
    own = stored(tmp_path, model)
    for path, layout in ((own, "ours"), (exported(own), "safetensors")):
        checkpoint = read_dalle(path)
        assert (checkpoint.path, checkpoint.format) == (path, layout)
        assert DalleConfig.from_dict(checkpoint.config) == model.config
        assert_same(checkpoint.weights, model.state_dict())
        assert torch.equal(logits(rebuilt(checkpoint)), logits(model))
    # Aliases are those of the model.
    by_storage, groups = {}, {}
    for name, tensor in model.state_dict().items():
        by_storage.setdefault(tensor.data_ptr(), set()).add(name)
    for name, source in aliases(empty_weights(model.config)).items():
        groups.setdefault(source, {source}).add(name)
    shared = {frozenset(names) for names in by_storage.values() if len(names) > 1}
    assert {frozenset(names) for names in groups.values()} == shared


def test_training_state_comes_back(tmp_path):
    model = random_model()
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    ema = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    training = {
        "engine": {"ema": ema, "random_states": [{"cpu": torch.get_rng_state()}]}, "position": {"step": 7},
        "tokenizer": {"type": "yttm", "sha256": "ab"}, "vqgan": {"sha256": "cd"},
    }
    states = {"opt_state": optimizer.state_dict(), "scheduler_state": {"last": 0.5}}
    checkpoint = read_dalle(stored(tmp_path, model, training=training, **states))
    assert checkpoint.epoch == 2 and checkpoint.training["position"] == {"step": 7}
    assert checkpoint.scheduler_state == {"last": 0.5}
    assert checkpoint.identity == {"tokenizer": {"type": "yttm", "sha256": "ab"}, "vqgan": {"sha256": "cd"}}
    assert torch.equal(checkpoint.training["engine"]["random_states"][0]["cpu"], torch.get_rng_state())
    assert_same(checkpoint.ema, ema)
    restored = torch.optim.Adam(rebuilt(checkpoint).parameters())
    restored.load_state_dict(checkpoint.opt_state)
    for key, values in optimizer.state_dict()["state"].items():
        assert_same(restored.state_dict()["state"][key], values)


def test_published_layout(tmp_path):
    """The file holds exactly the names that the published application knows, with its shapes."""
    extra = {
        "layers_per_ipu": [0, 1], "embedding_ipu_id": 0, "embedding_serialization_factor": 4, "cls_ipu_id": None,
        "fp16": True, "byteio": False,
    }
    path = stored(tmp_path, random_model(depth=1, sandwich_norm=True), epoch=5, hparams_extra=extra)
    document = torch.load(path, weights_only=True)
    assert {"hparams", "vae_params", "epoch", "weights", "opt_state", "scheduler_state"} <= set(document)
    assert document["vae_params"] is None and document["epoch"] == 5
    assert document["hparams"] == dict(
        extra, num_text_tokens=11, text_seq_len=3, dim=8, depth=1, heads=2, dim_head=6, loss_img_weight=7.0,
        attn_types=("full", "axial_row"), sandwich_norm=True, ff_dropout=0.0, attn_dropout=0.0,
    )
    layer = "model.transformer.layers.0."
    assert {name: tuple(tensor.shape) for name, tensor in document["weights"].items()} == {
        "model.text_emb.weight": (14, 8), "model.image_emb.weight": (6, 8), "model.text_pos_emb.weight": (4, 8),
        "model.image_pos_emb.weights_0": (1, 2, 1, 8), "model.image_pos_emb.weights_1": (1, 1, 2, 8),
        layer + "0.scale": (1, 1, 8), layer + "0.fn.norm.weight": (8,), layer + "0.fn.norm.bias": (8,),
        layer + "0.fn.norm_out.weight": (8,), layer + "0.fn.norm_out.bias": (8,),
        layer + "0.fn.fn.to_qkv.weight": (36, 8), layer + "0.fn.fn.to_out.0.weight": (8, 12),
        layer + "0.fn.fn.to_out.0.bias": (8,), layer + "1.scale": (1, 1, 8), layer + "1.fn.norm.weight": (8,),
        layer + "1.fn.norm.bias": (8,), layer + "1.fn.norm_out.weight": (8,), layer + "1.fn.norm_out.bias": (8,),
        layer + "1.fn.fn.net.0.weight": (64, 8), layer + "1.fn.fn.net.0.bias": (64,),
        layer + "1.fn.fn.net.3.weight": (8, 32), layer + "1.fn.fn.net.3.bias": (8,), "model.to_logits.0.weight": (8,),
        "model.to_logits.0.bias": (8,), "model.to_logits.1.weight": (20, 8), "model.to_logits.1.bias": (20,),
    }


def test_what_cannot_be_saved_is_refused(tmp_path):
    state = random_model().state_dict()
    del state["norm.bias"]
    refused("'norm.bias' is missing", dalle_checkpoint, TINY.to_dict(), state, 0)
    values, complaint = ours(training={"seen": [1, {2}]}), r"checkpoint\['training'\]\['seen'\]\[1\] is a set"
    refused(complaint, save_checkpoint, tmp_path / "dalle_1.pt", values, kind=TypeError)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    refused("cannot write the checkpoint .*dalle_1.pt", save_checkpoint, tmp_path / "file" / "dalle_1.pt", ours())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = stored(tmp_path, name="dalle_1.pt")
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: (file.write(b"PK"), full_disk()))
    refused("dalle_1.pt: No space left on device", save_checkpoint, path, ours())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("values, message", [
    ({"dim": 64.0}, "'dim' has the impossible value 64.0"),
    ({"text_seq_len": trust.MAX_SEQ_LEN, "unique_pads": False, "text_positions": False}, "positions; at most"),
    ({"dim": trust.MAX_WIDTH}, "channels; at most"), ({"ff_mult": 10**9}, "channels; at most"),
    ({"heads": 10**9, "dim_head": 10**30}, "channels; at most"),
    ({"num_text_tokens": trust.MAX_TOKENS + 1}, "num_text_tokens 1000000001 the model has 1000000001 tokens"),
    ({"activation": "relu"}, "dalle_2.pt: unknown activation 'relu'"),
    ({"label_smoothing": 1.5}, "dalle_2.pt: model option label_smoothing must be from 0 to below 1, not 1.5"),
    ({"attn_types": []}, "'attn_types' has the impossible value"),
    ({"layer_scale": "yes"}, "'layer_scale' has the impossible value 'yes'"),
    ({"depht": 3}, "unknown model option 'depht'. Did you mean 'depth'"),
    ({"shared_ff_ids": ["a"]}, "'shared_ff_ids' has the impossible value"),
])
def test_refused_options_of_our_own_files(tmp_path, values, message):
    document = ours()
    document["config"].update(values)
    save_checkpoint(tmp_path / "dalle_2.pt", document)
    refused(message, read_dalle, tmp_path / "dalle_2.pt")


def test_more_layers_memory_or_names_than_a_file_can_have_are_refused(tmp_path):
    weights = dict.fromkeys(f"transformer.layers.{layer}.x" for layer in range(trust.MAX_DEPTH + 1))
    complaint = "depth 1025 the model has 1025 layers; at most 1024"
    refused(complaint, model_config, dict(TINY.to_dict(), depth=trust.MAX_DEPTH + 1), weights)
    # Shapes may be honest one by one and still add up to far more memory than the file has bytes.
    document, largest = ours(random_model(depth=40, attn_types=("full",), dim=32)), torch.zeros(64 * 1024)
    views = {name: largest[: tensor.numel()].view(tensor.shape) for name, tensor in document["weights"].items()}
    save_checkpoint(tmp_path / "dalle_2.pt", dict(document, weights=views))
    refused("claim more memory than the file holds", read_dalle, tmp_path / "dalle_2.pt")
    weights = {"a": torch.zeros(2), "stray": torch.zeros(1)}
    shapes = dict(dict.fromkeys("bcd", torch.zeros(1)), a=torch.zeros(3))
    refused("x.pt: .*'b' is missing, 'c' is missing, 'd' is missing and 2 more", check_state, shapes, weights, "x.pt")
    check_state({"a": torch.zeros(2)}, {"a": torch.ones(2)}, "model.pt")


@pytest.mark.parametrize("name", ["dalle_1.pt", "model.safetensors"])
def test_cut_off_and_empty_files(tmp_path, name):
    exported(stored(tmp_path, name="dalle_1.pt"))
    path = tmp_path / name
    verify(path)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for read in (verify, read_dalle):
            refused(name, read, path)


@pytest.mark.parametrize("name", ["dalle_1.pt", "model.safetensors"])
def test_a_flipped_bit_is_found_or_harmless(tmp_path, name):
    """Wherever one bit flips, the file is refused or still reads as what it was (alignment bytes carry nothing)."""
    model, path, found = random_model(depth=1), tmp_path / name, 0
    exported(stored(tmp_path, model, "dalle_1.pt"))
    content = path.read_bytes()
    for position in torch.randint(len(content), (150,), generator=torch.Generator().manual_seed(1)).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        try:
            checkpoint = read_dalle(path)
        except UserError as error:
            assert name in str(error)
            found += 1
            continue
        assert DalleConfig.from_dict(checkpoint.config) == model.config
        assert_same(checkpoint.weights, model.state_dict())
    assert found > 50


def test_every_flipped_bit_of_an_export_is_found(tmp_path):
    """Also in options, names of keys, the digest and the format, and in names, types and shapes of weights."""
    metadata, _ = read_safetensors(exported(stored(tmp_path)))
    weights = {"norm.weight": torch.tensor([[1.0, -2.0]])}  # one small weight, so that every bit takes seconds
    metadata["sha256"] = export_digest(metadata, weights)
    path = tmp_path / "small.safetensors"
    save_file(weights, path, metadata)
    verify(path)
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([byte ^ 1 << bit]))
                refused("small.safetensors is damaged", verify, path)
            file.seek(position)
            file.write(bytes([byte]))
    verify(path)


def test_an_export_of_the_first_format_has_a_digest_of_its_weights(tmp_path):
    path, weight = tmp_path / "x.safetensors", torch.tensor([1.0, -2.0])
    metadata = {"format": "mini-dalle", "sha256": hashlib.sha256(b"w\0" + weight.numpy().tobytes()).hexdigest()}
    save_file({"w": weight}, path, metadata)
    verify(path)
    save_file({"w": weight + 1}, path, metadata)
    refused("x.safetensors is damaged", verify, path)
    save_file({"w": weight}, path, dict(metadata, format="mini-dalle/2"))
    refused("x.safetensors is damaged", verify, path)


def test_every_flip_in_a_weight_is_found(tmp_path):
    model = random_model(depth=1)
    path = stored(tmp_path, model, "dalle_1.pt")
    content = path.read_bytes()
    weight = model.transformer.layers[0].attention.fn.qkv.weight.detach().numpy().tobytes()
    start = content.index(weight)
    for position in range(start, start + len(weight), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        refused(r"dalle_1.pt is damaged \(checksum of", verify, path)


def test_paths_that_are_no_checkpoint(tmp_path, monkeypatch, capsys):
    refused("does not exist", verify, tmp_path / "none.pt")
    refused("is a folder", read_dalle, tmp_path)
    (tmp_path / "page.pt").write_text("<html>Not found</html>")
    torch.save(ours(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 20))
    for name, complaint in (("page.pt", "is no checkpoint"), ("legacy.pt", "is no checkpoint"), ("bomb.pt", "compre")):
        refused(f"{name}.*{complaint}", read_dalle, tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["checkpoints", "verify", str(tmp_path / "no.pt")])
    assert refused("", run_main, main, kind=SystemExit) == "1"
    assert capsys.readouterr().err == "error: checkpoint {} does not exist\n".format(tmp_path / "no.pt")


def test_export_in_half_precision_and_of_shared_weights(tmp_path):
    model = random_model()
    checkpoint = read_dalle(exported(stored(tmp_path, model, training={"tokenizer": {"sha256": "ab"}}), torch.float16))
    assert_same(checkpoint.weights, {name: tensor.half() for name, tensor in model.state_dict().items()})
    assert (checkpoint.identity, checkpoint.epoch) == ({"tokenizer": {"sha256": "ab"}}, 2)
    assert checkpoint.training is None and checkpoint.hparams["num_text_tokens"] == 11
    # Shared weights are exported once.
    model = random_model(tie_embeddings=True, attn_types=("full",), shared_attn_ids=(0,))
    names = read_safetensors(exported(stored(tmp_path, model)))[1].keys()
    assert "text_head.weight" in names and "text_emb.weight" not in names
    layers = [f"transformer.layers.{layer}.attention.fn.qkv.weight" for layer in (0, 1)]
    assert [layer in names for layer in layers] == [True, False]
    # Weights beyond half precision are not exported as infinity.
    (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    refused("'norm.weight' does not fit torch.float16", exported, stored(tmp_path, model), torch.float16)
    assert not (tmp_path / "model.safetensors").exists()


def test_export_takes_averaged_weights_unless_told_not_to(tmp_path):
    model = random_model()
    ema = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = stored(tmp_path, model, training={"engine": {"ema": ema}})
    for flags, expected in (([], ema), (["--no-ema"], model.state_dict())):
        main(["export", str(path), str(tmp_path / "out.safetensors"), *flags])
        assert_same(read_dalle(tmp_path / "out.safetensors").weights, expected)


@pytest.mark.parametrize("metadata, message", [
    (None, "holds no options"), ({"format": "pt"}, "holds no options"),
    ({"format": "mini-dalle", "config": "{"}, "'config' is not JSON"),
    ({"format": "mini-dalle", "config": "[]"}, "'config' is not a table"),
    ({"format": "mini-dalle", "config": "{}"}, "'num_text_tokens' is missing"),
    ({"format": "mini-dalle", "config": json.dumps(dict(TINY.to_dict(), depth=10**9))}, "option 'depth'"),
    ({"format": "mini-dalle", "config": json.dumps(TINY.to_dict()), "epoch": "-1"}, "'epoch' must be"),
    ({"format": "mini-dalle", "config": json.dumps(TINY.to_dict()), "sha256": "00"}, r"damaged \(sha256"),
    ({"format": "mini-dalle/2", "config": json.dumps(TINY.to_dict())}, r"damaged \(sha256"),
])
def test_refused_safetensors(tmp_path, metadata, message):
    save_file(random_model().state_dict(), tmp_path / "x.safetensors", metadata)
    assert "x.safetensors" in refused(message, read_dalle, tmp_path / "x.safetensors")


def test_order_of_a_runs_checkpoints(tmp_path):
    names = ["dalle_0_5.pt", "dalle_0.pt", "dalle_1_9.pt", "dalle_1_10.pt", "dalle_1.pt", "dalle_2.pt", "dalle_10.pt"]
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
    for name in ("dalle.pt", "dalle_x.pt", "dalle_3.pt.tmp", "vqgan_4.pt", "dalle_1_2_3.pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "dalle_99.pt").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert list_checkpoints(tmp_path / "none") == [] and newest_checkpoint(tmp_path / "none") is None
    assert checkpoint_name(3) == "dalle_3.pt" and checkpoint_name(3, 120) == "dalle_3_120.pt"


def test_newest_passes_over_damaged_ones_and_names_them(tmp_path, caplog):
    for name in ("dalle_1.pt", "dalle_2_30.pt", "dalle_2.pt"):
        newest = stored(tmp_path, name=name)
    assert newest_checkpoint(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-200])
    assert newest_checkpoint(tmp_path).name == "dalle_2_30.pt"
    assert "dalle_2.pt" in caplog.text and "dalle_2_30" not in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_verifies_once_for_all(rank, tmp_path, monkeypatch):
    for name in ("dalle_1.pt", "dalle_2.pt"):
        stored(tmp_path, name=name)
    verified, sent = [], [tmp_path / "dalle_1.pt"]
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: (verified.append(self.filename), testzip(self))[1])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    def broadcast(found):
        found[:] = sent if rank else found

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    newest = newest_checkpoint(tmp_path, together=True)
    assert newest == (sent[0] if rank else tmp_path / "dalle_2.pt")
    assert read_dalle(newest, verified=True).epoch == ours()["epoch"] and verified == ([] if rank else [str(newest)])
    sent[0] = tmp_path / "elsewhere" / "dalle_2.pt"
    assert newest_checkpoint(tmp_path, together=True) == (None if rank else newest)


def test_pruning_keeps_the_newest(tmp_path):
    names = ["dalle_1.pt", "dalle_2_30.pt", "dalle_2.pt"]
    kept = ["dalle.pt", "notes.txt", ".dalle_other.tmp"]
    leftover = ".dalle_3.pt.abc123.tmp"
    for name in [*names, *kept, leftover]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in prune_checkpoints(tmp_path, 0)] == [leftover]
    assert [path.name for path in prune_checkpoints(tmp_path, 2)] == ["dalle_1.pt"]
    assert prune_checkpoints(tmp_path, 5) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], *kept])
