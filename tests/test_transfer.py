"""Transfer learning: image-only models, of classes or of none, from a tiny model in minDALL-E's layout."""
from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import ROOT, assert_same, read_metrics, refused, run_script, weights
from mindalle_folder import CODES, GRID, STAGE1, STAGE2, reference_blocks, start_weights
from PIL import Image

import generate
from bpe import load_tokenizer
from bpe.classes import ClassTokenizer, class_file
from checkpoints import read_dalle
from dalle import published
from dalle.models import Dalle
from dalle.transfer import check_shape, image_only, read_downstream
from data.classes import class_names, imagenet_folders, list_class_images
from data.images import image_to_tensor, prepare_image
from engines.native import NativeEngine
from examples import transfer_learning_ex
from models.config import DalleConfig
from models.dalle import DalleModel
from sampling import SamplingOptions, sample_codes
from utils.locks import only_writer

CLASSES = ["dark", "light wood"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Two classes: four times nearly the same picture of coloured squares each, and once in val."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 4), ("val", 1)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng(1 + 4 * number).integers(0, 256, (4, 5, 3)).astype(np.uint8)
                pixels = pixels.repeat(4, 0).repeat(4, 1)
                pixels[0, 0, 0] = index  # never the same file twice
                Image.fromarray(pixels).save(folder / f"{index}.JPEG", format="PNG")
    return root


def write(path, **changes):
    """Write a downstream configuration that fits the tiny model; changes: {"section.key": value}."""
    hparams = {key: value for key, value in STAGE2.items() if key != "ctx_len_txt"}
    document = {
        "dataset": {"dataset": "imagenet", "image_resolution": 16},
        "stage1": {"type": "vqgan", "embed_dim": 32, "n_embed": CODES, "hparams": dict(STAGE1)},
        "stage2": {
            "type": "igpt", "use_cls_cond": True, "vocab_size_img": CODES, "hparams": dict(hparams, n_classes=2),
        },
        "optimizer": {
            "opt_type": "adamW", "base_lr": 0.02, "weight_decay": 0.0, "betas": [0.9, 0.95], "grad_clip_norm": 4.0,
        },
        "experiment": {"local_batch_size": 2, "total_batch_size": 4, "epochs": 40},
    }
    for key, value in changes.items():
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, document)[last] = value
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name, classes", [("uncond", 0), ("clscond", 1000)])
def test_the_shipped_configurations_are_the_published_ones(name, classes):
    found = read_downstream(ROOT / "configs" / f"transfer-imagenet-{name}-gen.yaml")
    assert found.num_classes == classes and found.image_size == 256 and found.stage1.num_codes == 16384
    assert (found.learning_rate, found.min_learning_rate, found.betas) == (1e-4, 0.0, (0.9, 0.95))
    assert (found.weight_decay, found.clip_grad_norm) == (0.0, 4.0)
    assert (found.local_batch_size, found.total_batch_size, found.epochs) == (2, 512, 8) and found.mixed_precision
    shape = found.shape
    assert (shape["embed_dim"], shape["n_layers"], shape["n_heads"], shape["ctx_len_img"]) == (1536, 42, 24, 256)


@pytest.mark.parametrize("changes, message", [
    ({"optimizer.base_lrr": 1}, "unknown key 'optimizer.base_lrr'. Did you mean 'base_lr'?"),
    ({"optimiser": {}}, "unknown key 'optimiser'. Did you mean 'optimizer'?"),
    ({"stage2.hparams.n_clases": 2}, "unknown key 'stage2.hparams.n_clases'. Did you mean 'n_classes'?"),
    ({"stage1.hparams.chh": 2}, "chh"), ({"stage1.n_embd": 2}, "n_embd"),
    ({"optimizer.betas": [0.9]}, "optimizer.betas must be two numbers"),
    ({"optimizer.betas": 0.9}, "optimizer.betas must be a list"),
    ({"optimizer.base_lr": "fast"}, "optimizer.base_lr must be a number of at least 0, not 'fast'"),
    ({"optimizer.base_lr": 0}, "optimizer.base_lr must be above 0"),
    ({"optimizer.opt_type": "sgd"}, "optimizer.opt_type can only be adamW"),
    ({"experiment.epochs": 0}, "experiment.epochs must be at least 1"),
    ({"experiment.epochs": True}, "experiment.epochs must be a whole number, not True"),
    ({"experiment.use_amp": 1}, "experiment.use_amp must be true or false"),
    ({"experiment.save_ckpt_freq": 2}, "save_ckpt_freq can only be 1.*--keep-checkpoints"),
    ({"stage2.hparams.resid_pdrop": 0.1}, "resid_pdrop can only be 0.0"),
    ({"stage2.type": "transformer1d"}, "stage2.type can only be igpt"),
    ({"stage2.hparams.n_classes": 0}, "use_cls_cond needs stage2.hparams.n_classes"),
    ({"stage2": 5}, "stage2 must be a table"),
])
def test_what_is_wrong_in_a_configuration_is_named(tmp_path, changes, message):
    refused(message, read_downstream, write(tmp_path / "x.yaml", **changes))


def test_files_that_are_no_configuration_and_values_that_yaml_takes_for_text(tmp_path):
    for content, message in (("a: [", "is not valid YAML"), ("5", "must be a YAML mapping"), (None, "No such file")):
        if content is not None:
            (tmp_path / "x.yaml").write_text(content)
        refused(message, read_downstream, tmp_path / ("x.yaml" if content else "y.yaml"))
    changes = {"optimizer.base_lr": "1e-4", "stage1.hparams.num_groups": 8, "stage1.hparams.patch_size": 2}
    found = read_downstream(write(tmp_path / "x.yaml", **changes))  # the last two only our VQGANs have
    assert (found.learning_rate, found.stage1.num_groups, found.stage1.patch_size) == (1e-4, 8, 2)


def test_classes_are_a_vocabulary(tmp_path, imagenet):
    (tmp_path / "classes.txt").write_bytes(class_file(["b", "a cat", "10"]))
    tokenizer = load_tokenizer(str(tmp_path / "classes.txt"))
    assert isinstance(tokenizer, ClassTokenizer) and tokenizer.vocab_size == 4
    assert tokenizer.tokenize(["b", " a cat ", "10", "1", ""], 1).tolist() == [[1], [2], [3], [2], [0]]
    assert tokenizer.decode([2]) == "a cat" and tokenizer.decode([0]) == "" and tokenizer.decode([9]) == ""
    refused(r"'a car' is not a class of this model. Did you mean 'a cat'\? It has 3 ", tokenizer.encode, "a car")
    none = ClassTokenizer(class_file([]), "x")
    assert none.vocab_size == 1 and none.tokenize("whatever", 1).tolist() == [[0]]
    for content in (b"#classes 2\na\n", b"#classes 2\na\na\n", b"#classes x\na\n", b"#classes 1\n \n"):
        refused("x: ", ClassTokenizer, content, "x")
    for name in ("", "a\nb", " a"):
        refused("cannot be a class name", class_file, [name])
    train, validation = imagenet_folders(str(imagenet))
    assert (train, validation) == (str(imagenet / "train"), str(imagenet / "val"))
    assert imagenet_folders(train) == (train, "") and class_names(train) == CLASSES
    pairs = list_class_images(train, CLASSES)
    assert len(pairs.images) == 8 and [pairs.captions[i] for i in (0, 7)] == CLASSES
    part = list_class_images(train, CLASSES[:1])
    assert len(part.images) == 4 and "4 images in folders that are not classes" in part.report()
    assert [list_class_images(train, []).captions[i] for i in range(8)] == [""] * 8
    refused("has no subfolders", class_names, tmp_path)
    refused("no image in it", list_class_images, str(tmp_path), CLASSES)


def image_logits(weights, start, codes):
    """The logits of an image GPT with the published names, in float64.

    weights: minDALL-E's stage 2 with the new head as "head"; start: vector (D,); codes (N,) -> (N, C).
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    rows = weights["tok_emb_img.weight"][codes[:-1]] + weights["pos_emb_img.weight"][: len(codes) - 1]
    x = reference_blocks(weights, torch.cat([start.double()[None], rows])[None], STAGE2["n_heads"])
    return x[0] @ weights["head.weight"].T


@pytest.mark.parametrize("classes, text", [(2, 2), (0, 0)])
def test_logits_and_loss_are_those_of_an_image_gpt(mindalle_folder, classes, text):
    start = image_only(read_dalle(mindalle_folder), classes, seed=3)
    model = DalleModel(DalleConfig.from_dict(start.config))
    model.load_state_dict(start.weights)
    stored = torch.load(mindalle_folder / "stage2_last.ckpt", weights_only=True)["state_dict"]
    stored["head.weight"] = start.weights["image_head.weight"]
    codes = torch.arange(GRID * GRID) * 7 % CODES
    expected = image_logits(stored, start.weights["text_emb.weight"][text], codes)
    labels = torch.full((3, 1), text)
    text_logits, logits = model(labels, codes.expand(3, -1))
    assert text_logits.shape[:2] == (3, 0) and torch.allclose(logits[1].double(), expected, atol=1e-4)
    losses = model.loss(text_logits, logits, labels, codes.expand(3, -1))
    assert float(losses.total.detach()) == pytest.approx(float(F.cross_entropy(expected, codes)), abs=1e-5)
    assert losses.text == 0 and torch.equal(losses.total, losses.image)
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # what several processes need


@pytest.mark.parametrize("classes", [0, 2])
def test_logits_and_greedy_codes_are_the_published_ones(mindalle_folder, classes):
    """Against numbers of the published image-only model, which were made with other code (assets/)."""
    golden = json.loads((ROOT / "tests" / "assets" / "mindalle_golden.json").read_text())["image_gpt"][str(classes)]
    start = image_only(read_dalle(mindalle_folder), classes)
    head, vectors = start_weights(classes)
    start.weights["image_head.weight"] = head
    start.weights["text_emb.weight"][-len(vectors) :] = vectors
    model = DalleModel(DalleConfig.from_dict(start.config)).eval()
    model.load_state_dict(start.weights)
    labels = torch.arange(classes)[:, None] + 1 if classes else torch.zeros(1, 1, dtype=torch.long)
    codes = (torch.arange(len(labels) * GRID * GRID) * 5 % CODES).view(-1, GRID * GRID)
    with torch.no_grad():
        logits = model(labels, codes)[1][-1]
    assert torch.allclose(logits.flatten(), torch.tensor(golden["logits"]), atol=2e-4)
    assert sample_codes(model, labels, [0] * len(labels), SamplingOptions(top_k=1)).codes.tolist() == golden["greedy"]


def test_only_head_and_start_vectors_are_new(mindalle_folder, tmp_path):
    before = read_dalle(mindalle_folder)
    start, again, other = (image_only(before, 2, seed) for seed in (1, 1, 2))
    new = {"text_emb.weight", "text_head.weight", "image_head.weight"}
    for name, tensor in start.weights.items():
        assert name in new or torch.equal(tensor, before.weights[name])
        assert torch.equal(tensor, again.weights[name])
    assert set(before.weights) - set(start.weights) == {"text_pos_emb.weight"}
    assert not torch.equal(start.weights["image_head.weight"], other.weights["image_head.weight"])
    assert 0.01 < start.weights["image_head.weight"].std() < 0.03
    # A configuration of another model is refused.
    check_shape(read_downstream(write(tmp_path / "x.yaml")), before)
    for key, value in (("stage2.hparams.embed_dim", 32), ("stage2.vocab_size_img", 25), ("stage2.hparams.n_heads", 2)):
        refused(key + " is ", check_shape, read_downstream(write(tmp_path / "x.yaml", **{key: value})), before)


@pytest.fixture
def run(mindalle_folder, imagenet):
    """Runs the script; returns the folder of the run, and keeps the exit status."""
    def words(config, result, *flags, upstream=mindalle_folder, images=imagenet):
        base = ["-d", str(config), "-u", str(upstream), "-r", str(result), "--imagenet-path", str(images)]
        return [*base, "--device", "cpu", "--dataloader-workers", "0", *flags]

    def run(config, result, *flags, **places):
        run.status = transfer_learning_ex.main(words(config, result, *flags, **places))
        return result / Path(config).stem

    run.words = words
    return run


def losses(folder, event="train"):
    return [line["loss"] for line in read_metrics(folder, event)]


def test_a_model_of_classes_draws_what_each_class_looks_like(run, imagenet, tmp_path):
    folder = run(write(tmp_path / "cls.yaml"), tmp_path / "result")
    trained = losses(folder)
    assert trained[0] == pytest.approx(math.log(CODES), abs=1.0) and trained[-1] < 0.4 < losses(folder, "validation")[0]
    for split in ("train", "val"):
        assert Image.open(folder / f"originals_{split}.png").size[0] > 16
        assert (folder / f"reconstructions_{split}.png").is_file()
    newest = folder / "ckpt" / "dalle_39.pt"
    assert sorted(path.name for path in newest.parent.glob("*.pt")) == ["dalle_38.pt", "dalle_39.pt"]
    model = Dalle.from_pretrained(newest)
    options = {"top_k": None, "num_candidates": 4, "seed": 1, "progress": False}
    generated = {name: model.generate(name, **options).codes for name in [*CLASSES, "0"]}
    assert torch.equal(generated["0"], generated[CLASSES[0]])
    for name in CLASSES:
        own, other = (real_codes(model, imagenet / "train" / kind) for kind in (name, *(set(CLASSES) - {name})))
        assert agreement(generated[name], own) > 0.8 and agreement(generated[name], other) < 0.5
    flags = ["--text", CLASSES[1], "--num_images", "2", "--device", "cpu", "--outputs_dir", str(tmp_path / "out")]
    generate.main(["--dalle_path", str(newest), *flags])
    assert (tmp_path / "out" / "light_wood" / "1.jpg").is_file()
    refused("'cat' is not a class of this model", model.generate, "cat", num_candidates=1)


def real_codes(model, folder):
    images = [image_to_tensor(prepare_image(Image.open(path), 16)) for path in sorted(folder.iterdir())]
    return model.stage1.encode(torch.stack(images).float() / 255)


def agreement(generated, real):
    """Share of the codes of each generated image that its nearest real image has, at the worst."""
    return float((generated[:, None] == real[None]).float().mean(-1).max(1).values.min())


def test_a_model_without_classes_learns_all_of_them(run, imagenet, tmp_path):
    config = write(tmp_path / "un.yaml", **{"stage2.use_cls_cond": False, "experiment.epochs": 40})
    folder = run(config, tmp_path / "result", "--seed", "3", images=imagenet / "train")
    assert losses(folder)[-1] < 0.6
    model = Dalle.from_pretrained(folder / "ckpt" / "dalle_39.pt")
    generated = model.generate("anything", top_k=None, num_candidates=12, seed=0, progress=False).codes
    both = torch.cat([real_codes(model, imagenet / "train" / name) for name in CLASSES])
    near = (generated[:, None] == both[None]).float().mean(-1).max(1)
    assert near.values.mean() > 0.6 and {int(i) // 4 for i in near.indices} == {0, 1}


def test_a_resumed_run_ends_with_the_same_weights(run, tmp_path):
    config = write(tmp_path / "cls.yaml", **{"experiment.epochs": 3})
    whole = run(config, tmp_path / "a", "--keep-checkpoints", "0") / "ckpt"
    part = tmp_path / "b" / "cls" / "ckpt"
    part.mkdir(parents=True)
    shutil.copy(whole / "dalle_0.pt", part)
    run(config, tmp_path / "b", "--resume")
    assert_same(weights(whole / "dalle_2.pt"), weights(part / "dalle_2.pt"))
    first, last = (weights(whole / name)["image_head.weight"] for name in ("dalle_0.pt", "dalle_2.pt"))
    assert not torch.equal(first, last)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_at_the_next_step(run, tmp_path, monkeypatch, number, status):
    config = write(tmp_path / "cls.yaml", **{"experiment.epochs": 1})
    whole = run(config, tmp_path / "a")
    step, calls = NativeEngine.step, []

    def asked(self, batch):
        calls.append(batch)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(NativeEngine, "step", asked)
    run(config, tmp_path / "b")
    assert run.status == status and len(calls) == 1
    assert [path.name for path in (tmp_path / "b/cls/ckpt").glob("*.pt")] == ["dalle_0_1.pt"]
    part = run(config, tmp_path / "b", "--resume")
    assert len(calls) > 1
    assert_same(weights(whole / "ckpt/dalle_0.pt"), weights(part / "ckpt/dalle_0.pt"))


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path):
    with only_writer(("--log-dir", tmp_path / "cls")):
        refused("cls: process .* already", run, write(tmp_path / "cls.yaml"), tmp_path)
    assert [path.name for path in (tmp_path / "cls").iterdir() if path.name not in ("ckpt", ".lock")] == []


@pytest.mark.parametrize("changes, message", [
    ({"stage2.hparams.n_classes": 1000}, "has 2 classes: set stage2.hparams.n_classes"),
    ({"experiment.total_batch_size": 5}, "total_batch_size 5 is not a multiple of local_batch_size 2"),
    ({"experiment.total_batch_size": 512}, "8 training images do not fill one batch"),
    ({"stage2.hparams.ctx_len_img": 25}, "gives 16 codes with this VQGAN, but stage2.hparams.ctx_len_img is 25"),
    ({"stage2.hparams.embed_dim": 32}, "stage2.hparams.embed_dim is 32, but .* has 16"),
])
def test_what_does_not_fit_is_named(run, tmp_path, changes, message, monkeypatch):
    """Before a published model is fetched, except for what its own header says."""
    monkeypatch.setattr(published, "download", None)
    places = {} if "stage2.hparams.embed_dim" in changes else {"upstream": "minDALL-E/1.3B"}
    config = write(tmp_path / "x.yaml", **changes)
    refused(message, run, config, tmp_path / "result", **places)
    config = write(tmp_path / "y.yaml")
    refused("--path-upstream .*: not a folder with stage1_last.ckpt", run, config, tmp_path, upstream=tmp_path)
    refused("--imagenet-path .*: no such folder", run, config, tmp_path, images=tmp_path / "no")


@pytest.mark.slow
def test_several_processes_train_the_same_model(run, tmp_path):
    """--n-gpus starts torchrun; the losses are those of one process."""
    config = write(tmp_path / "cls.yaml", **{"experiment.epochs": 2, "experiment.local_batch_size": 1})
    run(config, tmp_path / "a")
    flags = run.words(config, tmp_path / "b", "--n-gpus", "2")
    assert run_script(ROOT / "examples" / "transfer_learning_ex.py", *flags).returncode == 0
    # Not the weights: the keys' biases have no true gradient, and Adam makes whole steps of its rounding.
    for event in ("train", "validation"):
        assert losses(tmp_path / "b" / "cls", event) == pytest.approx(losses(tmp_path / "a" / "cls", event), abs=1e-4)
