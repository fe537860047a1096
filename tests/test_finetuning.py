"""minDALL-E's architecture in training: from nothing, from its layout, and back into it; memory estimates."""
from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from mindalle_folder import TEXT_LEN, make_folder
from PIL import Image

import args
import checkpoints
import dalle.export
import engines
import train
from bpe import load_tokenizer
from bpe.char_train import learn_char_vocabulary
from dalle.models import Dalle
from engines.memory import training_memory
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DalleModel
from models.vqgan_config import VqganConfig, stage1_config, stage1_options
from utils.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("finetuning") / "tiny")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(1)
    for index in range(12):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a painting of cat {index}")
    return folder


def flags(pairs, out, *more):
    words = "--config minDALLE_tiny --bpe-path none --vqgan-model-path none --vqgan-config-path none --image-size 16"
    words += f" --text-seq-len {TEXT_LEN} --batch-size 4 --max-steps 0 --epochs 1 --device cpu"
    words += " --validation-fraction 0 --log-every 1"
    folders = ["--input-folder", str(pairs), "--checkpoint-output-dir", str(out / "ckpt")]
    return words.split() + folders + list(map(str, more))


def run(pairs, out, *more):
    train.train(config := args.parse(flags(pairs, out, *more)), engines.create(config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(folder, name):
    return torch.load(folder / name, weights_only=True)["state_dict"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# The layout ----------------------------------------------------------------------------------------------------------


def test_reading_and_writing_the_layout_keeps_every_bit(source, tmp_path):
    dalle.export.main([str(source), str(tmp_path / "out")])
    for name in ("stage1_last.ckpt", "stage2_last.ckpt"):
        assert_same(state_of(source, name), state_of(tmp_path / "out", name))
    for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt"):
        assert (tmp_path / "out/tokenizer" / name).read_bytes() == (source / "tokenizer" / name).read_bytes()
    before, after = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (source, tmp_path / "out"))
    assert after["stage2"] == before["stage2"] and after["dataset"] == before["dataset"]
    assert stage1_config(after, "x") == stage1_config(before, "x")
    first, second = Dalle.from_pretrained(source), Dalle.from_pretrained(tmp_path / "out")
    generated = [model.generate("the sea", num_candidates=2, seed=3, progress=False) for model in (first, second)]
    assert torch.equal(generated[0].codes, generated[1].codes) and torch.equal(generated[0].images, generated[1].images)
    with pytest.raises(UserError, match="the folder is not empty"):
        dalle.export.main([str(source), str(tmp_path / "out")])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bos": True}, "bos = True"),
        ({"layer_scale": True}, "layer_scale"),
        ({"attn_types": ("axial_row",)}, "attn_types must be full"),
        ({"dim_head": 4}, "heads x dim_head"),
        ({"activation": "geglu"}, "no geglu"),
        ({"shared_ff_ids": (0, 0)}, "shared_ff_ids"),
    ],
)
def test_what_has_no_place_in_the_layout_is_named(source, changes, message):
    config = DalleConfig(
        **dict(
            dict(num_text_tokens=9, num_image_tokens=8, text_seq_len=4, grid=2, dim=16, depth=2, heads=2, dim_head=8),
            **dict(ARCHITECTURES["mindalle"], **changes),
        )
    )
    with pytest.raises(UserError, match=message):
        dalle.export.export_options(config, VqganConfig(), load_tokenizer(str(source / "tokenizer")))
    with pytest.raises(UserError, match="character BPE vocabulary, not one of type yttm"):
        dalle.export.export_options(config, VqganConfig(), load_tokenizer(str(ROOT / "bpe/demo_vocab.txt")))
    with pytest.raises(UserError, match="variant gumbel"):
        stage1_options(VqganConfig(variant="gumbel"))


# Training ------------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_folders_weights_vocabulary_and_vqgan(source, pairs, tmp_path, caplog):
    out, exported = tmp_path / "run", tmp_path / "exported"
    start = ("--pretrained-checkpoint", source)
    with caplog.at_level(logging.INFO):
        run(pairs, out, *start, "--learning-rate", "1e-12", "--export-mindalle", exported)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "memory for training: about 0.00 GB" in told and "peak memory: " in told
    assert_same(state_of(source, "stage1_last.ckpt"), state_of(exported, "stage1_last.ckpt"))
    before, after = state_of(source, "stage2_last.ckpt"), state_of(exported, "stage2_last.ckpt")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    checkpoint = checkpoints.read_dalle(out / "ckpt/dalle_0.pt")
    assert checkpoint.identity["tokenizer"]["path"] == str(source / "tokenizer")
    # Drawn from the run's own checkpoint, and from what was exported: the same.
    models = [Dalle.from_pretrained(path) for path in (out / "ckpt/dalle_0.pt", exported)]
    generated = [model.generate("a cat", num_candidates=2, seed=3, progress=False).images for model in models]
    assert torch.equal(*generated)


@pytest.mark.parametrize("optimizer, rate", [("AdamW", "0.01"), ("Adafactor", "0.1")])
def test_fine_tuning_learns_saves_memory_and_resumes(source, pairs, tmp_path, optimizer, rate):
    more = ("--optimizer", optimizer, "--learning-rate", rate, "--epochs", "4", "--lr-scheduler", "constant")
    start = ("--pretrained-checkpoint", source)
    events = run(pairs, tmp_path / "whole", *more, *start)
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    run(pairs, tmp_path / "parts", *more, *start, "--max-steps", "5")
    run(pairs, tmp_path / "parts", *more, "--resume")  # vocabulary and VQGAN as noted in the checkpoint
    whole, parts = (checkpoints.read_dalle(tmp_path / name / "ckpt/dalle_3.pt") for name in ("whole", "parts"))
    assert_same(whole.weights, parts.weights)
    if optimizer == "Adafactor":  # next to no state
        held = sum(t.numel() for state in whole.opt_state["state"].values() for t in state.values())
        assert held < 0.2 * sum(tensor.numel() for tensor in whole.weights.values())
    else:
        saving = run(pairs, tmp_path / "saving", *more, *start, "--activation-checkpointing", "--precision", "bf16")
        assert [e["loss"] for e in saving if e["event"] == "train"] == pytest.approx(losses, rel=0.05)


def test_an_export_that_cannot_work_is_refused_before_training(source, pairs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="--export-mindalle .*not empty"):
        run(pairs, tmp_path, "--pretrained-checkpoint", source, "--export-mindalle", tmp_path / "full")
    for words, message in (
        (["--config", "demo", "--export-mindalle", "x"], "--architecture mindalle"),
        (["--config", "minDALLE_tiny", "--generated-data", "--export-mindalle", "x"], "generated data"),
    ):
        with pytest.raises(UsageError, match=message):
            args.parse(words)
    vocabulary = ["--bpe-path", str(ROOT / "bpe/demo_vocab.txt")]
    stage1 = ["--vqgan-model-path", source / "stage1_last.ckpt", "--vqgan-config-path", source / "config.yaml"]
    with pytest.raises(UserError, match="character BPE vocabulary"):
        run(pairs, tmp_path, *vocabulary, *stage1, "--export-mindalle", tmp_path / "new")


@pytest.mark.slow
def test_the_tiny_configuration_trains_from_nothing_on_the_demo_and_is_exported(tmp_path):
    words = ["--config", "minDALLE_tiny", "--device", "cpu", "--checkpoint-output-dir", str(tmp_path / "ckpt")]
    config = args.parse([*words, "--export-mindalle", str(tmp_path / "out")])
    train.train(config, engines.create(config))
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    model = Dalle.from_pretrained(tmp_path / "out")
    assert model.sampling("red apple", num_candidates=2, progress=False).shape == (2, 3, 64, 64)


# Memory --------------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_what_is_held():
    config = args.parse(["--config", "minDALLE_1.3B", "--generated-data", "--batch-size", "1"])
    model = DalleConfig(
        num_text_tokens=16384, num_image_tokens=16384, text_seq_len=64, grid=16, dim=1536, depth=42, heads=24,
        dim_head=64, **ARCHITECTURES["mindalle"],
    )
    memory = training_memory(model, config, "bf16")
    assert memory.weights == memory.gradients == memory.optimizer / 2 == 4 * 1291081728
    less = training_memory(model, config.replace(optimizer="Adafactor", gradient_accumulation=1), "bf16")
    assert less.optimizer == 0 and less.activations < memory.activations - 2.5e9
    more = training_memory(model, config.replace(activation_checkpointing=False, ema_decay=0.9), "bf16")
    assert more.activations > memory.activations and more.optimizer == 12 * 1291081728
    assert "= 5.16 weights + 5.16 gradients + 10.33 optimizer + " in memory.describe()


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["mini-dalle", "mindalle"])
def test_the_estimate_of_activations_is_what_autograd_keeps(architecture, half):
    model = DalleConfig(
        num_text_tokens=50, num_image_tokens=60, text_seq_len=12, grid=6, dim=64, depth=3, heads=4, dim_head=16,
        **ARCHITECTURES[architecture],
    )
    config = args.parse(["--config", "unit_test", "--batch-size", "4", "--gradient-accumulation", "1"])
    network = DalleModel(dataclasses.replace(model))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    text, codes = torch.randint(1, 50, (4, 12)), torch.randint(0, 60, (4, 36))
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=half):
        network.loss(*network(text, codes), text, codes)
    held = sum(size for address, (size, _) in kept.items() if address not in weights)
    estimate = training_memory(model, config, "bf16" if half else "fp32").activations
    assert 0.75 < estimate / held < 1.35


# Vocabulary ----------------------------------------------------------------------------------------------------------


def test_a_learned_character_vocabulary_is_read_and_does_not_depend_on_order(tmp_path):
    captions = ["A cat on a mat", "the cats; the CAT!", "a mat"] * 3
    vocabulary, merges = learn_char_vocabulary(captions, 40)
    assert (vocabulary, merges) == learn_char_vocabulary(reversed(captions), 40)
    for name, content in (("x-vocab.json", vocabulary), ("x-merges.txt", merges)):
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size <= 40 and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert len(tokenizer.encode("cat")) == 1 and 1 in tokenizer.encode("zebra")
    with pytest.raises(UserError, match="--vocab-size 5 cannot hold"):
        learn_char_vocabulary(captions, 5)
    with pytest.raises(UserError, match="no captions"):
        learn_char_vocabulary(["", " "], 40)


def test_the_shipped_character_vocabulary_is_the_one_that_is_learned():
    from data.demo import demo_records

    learned = learn_char_vocabulary([record.caption for record in demo_records("train")], 1024)
    for name, content in zip(("bpe-16k-vocab.json", "bpe-16k-merges.txt"), learned):
        assert (ROOT / "bpe" / "demo_char" / name).read_bytes() == content
