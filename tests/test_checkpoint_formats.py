"""Others' checkpoints: every layout reads as the model it is, and what cannot be expressed is refused by name."""
from __future__ import annotations

import copy
import dataclasses
import random
import sys
import types

import pytest
import torch
import yaml
from helpers import refused
from mindalle_folder import reference_blocks, stage2_shapes, wave
from safetensors.torch import save_file
from test_checkpoints import OPTIONS, TINY, logits, random_model, rebuilt
from test_vqgan import TINY as TINY_VQGAN
from test_vqgan import averages, prefixed, tiny

from checkpoints import read_dalle
from checkpoints.deepspeed import AUXILIARY as NOTE
from dalle.loading import _open_vqgan
from models.config import DalleConfig
from utils.errors import UserError

# ---- files of others


def published_names(model, wrappers="fn.fn.", layers="transformer.layers."):
    """The weights of a model under published names, written down here independently of the application's own map."""
    names = {
        "attention.fn.qkv": "0.{}to_qkv", "attention.fn.out": "0.{}to_out.0", "feed_forward.fn.up": "1.{}net.0",
        "feed_forward.fn.down": "1.{}net.3", "attention.norm": "0.fn.norm", "feed_forward.norm": "1.fn.norm",
        "attention.scale": "0.scale", "feed_forward.scale": "1.scale",
    }
    state = model.state_dict()
    published = {"to_logits.0.weight": state["norm.weight"], "to_logits.0.bias": state["norm.bias"]}
    if "image_pos_emb.rows" in state:
        published["image_pos_emb.weights_0"] = state["image_pos_emb.rows"].reshape(1, TINY.grid, 1, TINY.dim)
        published["image_pos_emb.weights_1"] = state["image_pos_emb.columns"].reshape(1, 1, TINY.grid, TINY.dim)
    for kind in ("weight", "bias"):
        published["to_logits.1." + kind] = torch.cat([state["text_head." + kind], state["image_head." + kind]])
    for name in ("text_emb.weight", "image_emb.weight", "text_pos_emb.weight"):
        if name in state:
            published[name] = state[name]
    for name, tensor in state.items():
        if name.startswith("transformer.layers."):
            layer, rest = name[len("transformer.layers.") :].split(".", 1)
            for ours_, theirs in names.items():
                if rest == ours_ or rest.startswith(ours_ + "."):
                    published[layers + layer + "." + theirs.format(wrappers) + rest[len(ours_) :]] = tensor
    return published


def mini_dalle(model=None):
    model = model or random_model()
    hparams = dict(num_text_tokens=11, text_seq_len=3, dim=8, depth=3, heads=2, dim_head=6, loss_img_weight=7)
    hparams.update(attn_types=("full", "axial_row"), sandwich_norm=False, ff_dropout=0.0, attn_dropout=0.1)
    hparams.update(embedding_ipu_id=0, embedding_serialization_factor=2, layers_per_ipu=[0, 3], cls_ipu_id=None)
    weights = {"model." + name: tensor for name, tensor in published_names(model).items()}
    document = {"hparams": dict(hparams, fp16=True, byteio=False), "vae_params": None, "epoch": 4, "weights": weights}
    return dict(document, opt_state={"state": {}}, scheduler_state=None)


def dalle_pytorch(model=None):
    model = model or random_model()
    document = dict(mini_dalle(model), version="1.6.6", vae_class_name="VQGanVAE")
    document["hparams"].update(shift_tokens=False, rotary_emb=False)
    return dict(document, weights=published_names(model, "fn.fn.fn.", "transformer.layers.layers."))


def mindalle():
    shapes = stage2_shapes(texts=9, codes=7, width=8, layers=2, text_len=3, image_len=4)
    return {"state_dict": {name: wave(name, shape) for name, shape in shapes.items()}}


def saved(path, document, name="dalle.pt"):
    path.mkdir(exist_ok=True, parents=True)
    torch.save(document, path / name)
    return path / name


def test_reads_mini_dalle(tmp_path):
    model = random_model()
    document = mini_dalle(model)
    document["weights"]["model.vae.model.encoder.conv_in.weight"] = torch.ones(2, 3, 3, 3)
    document["weights"]["model.vae.model.loss.discriminator.weight"] = torch.ones(1)
    checkpoint = read_dalle(saved(tmp_path, document))
    assert checkpoint.format == "mini-dalle" and checkpoint.epoch == 4
    assert checkpoint.training is None and checkpoint.opt_state is None
    assert DalleConfig.from_dict(checkpoint.config) == dataclasses.replace(TINY, attn_dropout=0.1)
    assert list(checkpoint.vqgan_weights) == ["encoder.conv_in.weight"]
    assert torch.equal(logits(rebuilt(checkpoint)), logits(model))
    # Half precision, split embeddings and newer names of positions.
    document = mini_dalle(model)
    weights = document["weights"]
    # Twelve pieces: sorted as text, piece 10 would come before piece 2.
    for index, piece in reversed(list(enumerate(torch.tensor_split(weights.pop("model.text_emb.weight"), 12)))):
        weights[f"model.text_emb.split_embeddings.{index}.weight"] = piece.clone()
    for axis in "01":
        weights["model.image_pos_emb.weights." + axis] = weights.pop("model.image_pos_emb.weights_" + axis)
    document["weights"] = {name: tensor.half() for name, tensor in weights.items()}
    checkpoint = read_dalle(saved(tmp_path, document))
    assert all(tensor.dtype == torch.float16 for tensor in checkpoint.weights.values())
    expected = random_model()
    expected.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    assert torch.equal(logits(rebuilt(checkpoint)), logits(expected))


@pytest.mark.parametrize("version, pattern", [
    ("1.6.6", "conv_causal"), ("1.5.0", "conv_causal"), ("1.4.2", "conv_like"), (None, "conv_like"),
])
def test_conv_like_means_what_it_meant_in_that_version_of_dalle_pytorch(tmp_path, version, pattern):
    document = mini_dalle(random_model())
    document["weights"] = published_names(random_model(), "fn.fn.fn.", "transformer.layers.layers.")
    document["hparams"]["attn_types"] = ("conv_like",)
    if version:
        document["version"] = version
    checkpoint = read_dalle(saved(tmp_path, document))
    assert checkpoint.format == "dalle-pytorch" and checkpoint.config["attn_types"] == [pattern]


def mindalle_yaml(folder, quick=False):
    stage1 = dict(type="vqgan", embed_dim=8, n_embed=16, hparams=TINY_VQGAN.to_dict()["model"]["params"]["ddconfig"])
    hparams = dict(embed_dim=8, n_layers=2, n_dense_layers=2, n_heads=4, ctx_len_img=4, ctx_len_txt=3)
    stage2 = dict(type="transformer1d", vocab_size_txt=9, vocab_size_img=7, hparams=hparams)
    hparams["gelu_use_approx"] = quick
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage1": stage1, "stage2": stage2}))


def assert_mindalle(checkpoint, quick=False):
    """Its logits are those of minDALL-E's own forward pass over its own names."""
    text, codes = torch.tensor([[4, 0, 0], [8, 2, 5]]), torch.tensor([[6, 1, 0, 3], [2, 2, 4, 5]])
    w, last = mindalle()["state_dict"], text.shape[1] - 1
    images = w["tok_emb_img.weight"][codes[:, :-1]] + w["pos_emb_img.weight"][:3]
    x = torch.cat([w["tok_emb_txt.weight"][text] + w["pos_emb_txt.weight"], images], 1)
    x = reference_blocks(w, x, heads=4, layers=2, quick=quick)
    expected = x[:, :last] @ w["head_txt.weight"].T, x[:, last:] @ w["head_img.weight"].T
    assert checkpoint.format == "mindalle"
    for ours, theirs in zip(rebuilt(checkpoint)(text, codes), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "gelu_use_approx"])
def test_reads_mindalle(tmp_path, quick):
    saved(tmp_path, mindalle(), "stage2_last.ckpt")
    mindalle_yaml(tmp_path, quick)
    checkpoint = read_dalle(tmp_path)  # the folder
    assert checkpoint.path.name == "stage2_last.ckpt"
    assert_mindalle(checkpoint, quick)


def with_averages(weights):
    """Other weights, beside the averages that are kept of them: these."""
    return {**{name: tensor + 1 for name, tensor in weights.items()}, **averages(weights)}


@pytest.fixture
def lightning(monkeypatch):
    """A class that old Lightning checkpoints name as a key of their "callbacks"."""
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
    return {"epoch": 3, "pytorch-lightning_version": "1.0.8", "callbacks": {callback: {"best": torch.tensor(1.0)}}}


@pytest.mark.parametrize("averages", [False, True], ids=["plain", "model_ema"])
def test_reads_mindalle_with_its_vqgan_from_one_lightning_checkpoint(tmp_path, lightning, averages, caplog):
    caplog.set_level("INFO")
    vqgan, of = tiny(), with_averages if averages else dict
    state = {**prefixed(of(vqgan.state_dict()), "stage1."), **prefixed(of(mindalle()["state_dict"]), "stage2.")}
    path = saved(tmp_path, dict(lightning, state_dict=state), "last.ckpt")
    assert b"pytorch_lightning" in path.read_bytes()
    mindalle_yaml(tmp_path)
    checkpoint = read_dalle(path)
    assert_mindalle(checkpoint)
    assert caplog.text.count("using its averaged weights") == (2 if averages else 0)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(_open_vqgan(None, None, checkpoint).encode(images), vqgan.encode(images))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", [mini_dalle, dalle_pytorch, mindalle])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, kind, prefix):
    document = kind()
    table = "state_dict" if kind is mindalle else "weights"
    document[table] = prefixed(document[table], prefix)
    mindalle_yaml(tmp_path)
    checkpoint = read_dalle(saved(tmp_path, document))
    if kind is mindalle:
        assert_mindalle(checkpoint)
    else:
        assert torch.equal(logits(rebuilt(checkpoint)), logits(random_model()))


PLACES = {
    "the run's folder": ("dalle-ds-cp", "dalle-ds-cp/pytorch_model.bin"),
    "the note": ("dalle-ds-cp/auxiliary.pt", "dalle-ds-cp/pytorch_model.bin"),
    "the weights": ("dalle-ds-cp/pytorch_model.bin", "dalle-ds-cp/pytorch_model.bin"),
    "weights in a folder": ("dalle-ds-cp", "dalle-ds-cp/pytorch_model.bin/pytorch_model.bin"),
    "weights in a folder, themselves": ("dalle-ds-cp/out/model.safetensors", "dalle-ds-cp/out/model.safetensors"),
    "safetensors": ("dalle-ds-cp/auxiliary.pt", "dalle-ds-cp/model.safetensors"),
    "beside the run's folder": ("dalle.pt", "dalle.pt"), "another name": ("x.bin", "x.bin"),
}


@pytest.mark.parametrize("given, weights", PLACES.values(), ids=PLACES)
def test_consolidated_weights_are_read_with_the_note_of_their_run(tmp_path, given, weights, caplog):
    caplog.set_level("INFO")
    model, path = random_model(), tmp_path / weights
    document = dalle_pytorch(model)
    state = {name: tensor.clone() for name, tensor in document.pop("weights").items()}
    note = saved(tmp_path / "dalle-ds-cp", dict(document, weights="To get a working standard checkpoint, ..."), NOTE)
    path.parent.mkdir(exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    checkpoint = read_dalle(tmp_path / given)
    assert (checkpoint.path, checkpoint.format, checkpoint.epoch) == (path, "dalle-pytorch", 4)
    assert torch.equal(logits(rebuilt(checkpoint)), logits(model))
    assert (str(note) in caplog.text) == (given != f"dalle-ds-cp/{NOTE}")


def test_what_is_missing_of_a_deepspeed_run_is_said(tmp_path):
    document = dalle_pytorch()
    state = document.pop("weights")
    lone = saved(tmp_path / "lone", state, "pytorch_model.bin")
    part = saved(tmp_path / "run", {"module": state, "ds_version": "0.5", **document}, "mp_rank_00_model_states.pt")
    note = saved(tmp_path / "run", dict(document, weights="To get ..."), NOTE)
    sharded = saved(tmp_path / "shards", dict(document, weights="To get ..."), NOTE)
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text("{}")
    for run in ("a-ds-cp", "b-ds-cp"):
        saved(tmp_path / "two" / run, dict(document, weights=""), NOTE)
    itself = saved(tmp_path / "itself", dict(document, weights=""), NOTE)
    saved(tmp_path / "itself", dict(document, weights=""), "pytorch_model.bin")
    for path, message in (
        (lone, r"without their options: put the auxiliary.pt of the run's folder \(...-ds-cp\) beside it"),
        (part, "one process's shard of a DeepSpeed run.*zero_to_fp32.py . pytorch_model.bin"),
        (note, "lacks the run's weights.*zero_to_fp32.py . pytorch_model.bin"),
        (note.parent, "lacks the run's weights.*zero_to_fp32.py . pytorch_model.bin"), (sharded, "--max_shard_size"),
        (saved(tmp_path / "two", state), "there are several, such as .*a-ds-cp"), (itself, "is not a plain tensor"),
        (saved(tmp_path / "x", mindalle(), "stage2_last.ckpt"), "'depth' is 42, but there are weights for 2 layers"),
    ):
        caught = refused(message, read_dalle, path)
        assert str(path.parent) in caught and "\n" not in caught


def change(**values):
    """An edit of a checkpoint's hparams."""
    return lambda document: document["hparams"].update(values)


def put(**values):
    """An edit of a checkpoint itself."""
    return lambda document: document.update(values)


def drop(name, table=None):
    """An edit that removes an entry, or a weight."""
    return lambda document: (document[table] if table else document).pop(name)


def replace(name, tensor):
    """An edit that replaces a weight."""
    return lambda document: document["weights"].update({name: tensor})


OLD = {
    "mask before 0.10.8": ({}, "fn.fn.", replace("logits_mask", torch.ones(1, 7, 20, dtype=torch.bool))),
    "no scale before 0.7": ({"layer_scale": False}, "fn.", change()),
    "shift that no option tells": ({"shift_tokens": True}, "fn.fn.fn.", change()),
    "rotary before 1.1.2": (OPTIONS["rotary"], "fn.fn.fn.", replace("transformer.pos_emb", torch.zeros(1, 1, 7, 6))),
    "rotary since": (OPTIONS["rotary"], "fn.fn.fn.", replace("transformer.pos_emb", torch.zeros(1, 8, 6))),
}


@pytest.mark.parametrize("options, wrappers, edit", OLD.values(), ids=OLD)
def test_reads_what_older_versions_of_dalle_pytorch_wrote(tmp_path, options, wrappers, edit):
    model = random_model(**options)
    document = mini_dalle(model)  # hparams without newer options
    document["weights"] = published_names(model, wrappers, "transformer.layers.layers.")
    if "rotary" in options:
        document["hparams"].update(rotary_emb=True, shift_tokens=True)
    edit(document)
    assert torch.equal(logits(rebuilt(read_dalle(saved(tmp_path, document)))), logits(model))


@pytest.mark.parametrize("name, kind", [("vae.enc.w", "OpenAIDiscreteVAE"), ("vae.codebook.weight", "DiscreteVAE")])
def test_codes_of_another_vae_are_worth_a_warning(tmp_path, name, kind, caplog):
    document = dalle_pytorch()
    del document["vae_class_name"]
    document["weights"][name] = torch.ones(1)
    read_dalle(saved(tmp_path, document))
    assert f"was trained on codes of a '{kind}'" in caplog.text


PIECE = "model.text_emb.split_embeddings.{}.weight"
QKV = "model.transformer.layers.0.0.fn.fn.to_qkv.weight"
REVERSIBLE = "model.transformer.layers.blocks.0.f.net.fn.fn.to_qkv.weight"
REFUSED = [
    (change(reversible=True), "option 'reversible' is not supported"),
    (lambda document: document["weights"].update({REVERSIBLE: document["weights"].pop(QKV)}), "option 'reversible'"),
    (change(attn_types=("full", "mlp")), "names 'mlp', which is not supported: a gMLP"),
    (replace("model.text_emb.weight", torch.zeros(11, 8)), "no rows for pads: DALLE-pytorch before 0.9"),
    (lambda document: document.update(state_dict={"stage2.sos": document.pop("weights")[QKV]}), "ImageGPT"),
    (change(attn_types=("full", "sparse")), "option 'attn_types' names 'sparse'"),
    (change(attn_types=("axial_diagonal",)), "option 'attn_types' names 'axial_diagonal'"),
    (change(attn_types=7), "'attn_types' has the impossible value 7"),
    (change(sparse_attn=True), "option 'sparse_attn'"), (drop("hparams"), "neither 'hpar"),
    (change(mixture_of_experts=8), "unknown option 'mixture_of_experts'"),
    (lambda document: document["hparams"].pop("heads") and document["hparams"].pop("dim"), "'dim'"),
    (change(dim="wide"), "as 'dim', not 'wide'"), (change(depth=True), "as 'depth', not True"),
    (change(text_seq_len=-1), "as 'text_seq_len', not -1"),
    (change(loss_img_weight=float("nan")), "as 'loss_img_weight', not nan"),
    (change(ff_dropout=1.5), "'ff_dropout' is a probability"),
    (change(dim=10**12), "dim 1000000000000 .* channels; at most"),
    (change(depth=10**9), "option 'depth' is 1000000000, but there are weights for 3 layers"),
    (change(heads=5), "to_qkv|attention.fn.qkv.weight"),
    (change(text_seq_len=10**9), "'to_logits.1.weight' has 20 rows"),
    (change(shared_attn_ids=[]), "'shared_attn_ids' has the impossible value"),
    (put(hparams=[1]), "'hparams' is not a table"), (drop("weights"), "neither 'weights'"),
    (put(epoch="last"), "'epoch' must be a whole number"), (put(weights={}), "not a table of tensors"),
    (replace(QKV, 3), "is not a plain tensor"), (replace(3, torch.ones(1)), "weight 3 is not a plain tensor"),
    (replace(QKV, torch.eye(36, 8).to_sparse()), "is not a plain tensor"),
    (replace(QKV, torch.zeros(36, 8, dtype=torch.long)), "instead of floating-point numbers"),
    (replace(QKV, torch.zeros(36, 9)), r"fn.qkv.weight' has shape \(36, 9\) instead of \(36, 8\)"),
    (drop(QKV, "weights"), "attention.fn.qkv.weight' is missing"),
    (replace("model.extra.weight", torch.zeros(1)), "'extra.weight' belongs to no known layout"),
    (replace("model.transformer.layers.0.0.fn.fn.to_qkv.scale", torch.zeros(1)),
     "to_qkv.scale' belongs to no known layout"),
    (replace("model.image_pos_emb.weights_0", torch.zeros(2, 8)), r"pos_emb.weights_0' has shape \(2, 8\)"),
    (drop("model.image_pos_emb.weights_0", "weights"), "the size of the code grid is unknown"),
    (drop("model.to_logits.1.weight", "weights"), "'to_logits.1.weight' is missing"),
    (replace("model.text_emb.weight", torch.zeros(1, 1).expand(14, 8)), "claims more than the file holds"),
    (lambda document: document["weights"].update({PIECE.format(n): torch.zeros(7, 8 + n) for n in (0, 1)}),
     "'text_emb.split_embeddings."),
]


@pytest.mark.parametrize("edit, message", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_with_file_and_key(tmp_path, edit, message):
    document = mini_dalle()
    edit(document)
    path = saved(tmp_path, document)
    message = refused(message, read_dalle, path)
    assert str(path) in message and "\n" not in message


def test_endlessly_nested_values_are_not_printed(tmp_path):
    """Forty lists that each hold the next one twice print as a million million brackets."""
    bomb = []
    for _ in range(40):
        bomb = [bomb, bomb]
    for edit in (change(dim=bomb), change(attn_types=bomb), change(odd=bomb), put(epoch=bomb)):
        document = mini_dalle()
        edit(document)
        assert len(refused("", read_dalle, saved(tmp_path, document))) < 500


def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path):
    """Random edits of a checkpoint's entries, options and weights: the outcome is a model or a UserError."""
    odd = [None, True, 0, -1, 7, 10**40, 0.5, float("nan"), float("inf"), "", "full", "1.6.6", [], [1], ["full"]]
    odd += [("0", "1"), {}, {"a": 1}, [[]], torch.zeros(()), torch.zeros(3), torch.zeros(2, 2, dtype=torch.long)]
    odd += [torch.zeros(0), torch.ones(1).expand(9)]
    generator, seeds = random.Random(4), [mini_dalle(), dalle_pytorch(), mindalle()]
    others = "rotary_emb stable version config training shared_ff_ids state_dict".split()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        document = copy.deepcopy(generator.choice(seeds))
        for _ in range(generator.randint(1, 3)):
            table = generator.choice([document, *(value for value in document.values() if isinstance(value, dict))])
            name = generator.choice([*table, *others])
            action = generator.choice(["replace", "remove", "swap"])
            if action == "remove":
                table.pop(name, None)
            elif action == "swap" and table:
                table[name] = table[generator.choice(list(table))]
            else:
                table[name] = generator.choice(odd)
        try:
            logits(rebuilt(read_dalle(saved(tmp_path, document))))
            outcomes["read"] += 1
        except UserError as error:
            assert "dalle.pt" in str(error) and len(str(error)) < 1000
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
