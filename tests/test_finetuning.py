"""minDALL-E's architecture in training: from nothing, from its layout, and back into it; memory estimates."""
from __future__ import annotations

import logging

import pytest
import torch
import yaml
from helpers import ROOT, assert_same, read_metrics, refused, train_here, write_pairs
from mindalle_folder import TEXT_LEN

import args
import checkpoints
import dalle.export
from bpe import load_tokenizer
from bpe.char_train import learn_char_vocabulary
from dalle.models import Dalle
from data.demo import demo_records
from engines.memory import training_memory
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DALLE
from models.vqgan_config import VqganConfig, stage1_config, stage1_options
from utils.errors import UsageError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), [f"a painting of cat {index}" for index in range(12)])


def flags(pairs, out, *more):
    words = "--config minDALLE_tiny --bpe-path none --vqgan-model-path none --vqgan-config-path none --image-size 16"
    words += f" --text-seq-len {TEXT_LEN} --batch-size 4 --max-steps 0 --epochs 1 --device cpu"
    words += " --validation-fraction 0 --log-every 1"
    folders = ["--input-folder", str(pairs), "--checkpoint-output-dir", str(out / "ckpt")]
    return words.split() + folders + list(map(str, more))


def run(pairs, out, *more):
    train_here(flags(pairs, out, *more))
    return read_metrics(out)


def state_of(folder, name):
    return torch.load(folder / name, weights_only=True)["state_dict"]


def test_reading_and_writing_the_layout_keeps_every_bit(mindalle_folder, tmp_path):
    folders = mindalle_folder, tmp_path / "out"
    dalle.export.main(list(map(str, folders)))
    for name in ("stage1_last.ckpt", "stage2_last.ckpt"):
        assert_same(*(state_of(folder, name) for folder in folders))
    for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt"):
        first, second = ((folder / "tokenizer" / name).read_bytes() for folder in folders)
        assert first == second
    before, after = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders)
    assert after["stage2"] == before["stage2"] and after["dataset"] == before["dataset"]
    assert stage1_config(after, "x") == stage1_config(before, "x")
    models = map(Dalle.from_pretrained, folders)
    drawn = [model.draw("the sea", num_candidates=2, seed=3, progress=False) for model in models]
    assert torch.equal(drawn[0].codes, drawn[1].codes) and torch.equal(drawn[0].images, drawn[1].images)
    refused("the folder is not empty", dalle.export.main, list(map(str, folders)))


@pytest.mark.parametrize("changes, message", [
    ({"bos": True}, "bos = True"), ({"layer_scale": True}, "layer_scale"),
    ({"attn_types": ("axial_row",)}, "attn_types must be full"), ({"dim_head": 4}, "heads x dim_head"),
    ({"activation": "geglu"}, "no geglu"), ({"shared_ff_ids": (0, 0)}, "shared_ff_ids"),
])
def test_what_has_no_place_in_the_layout_is_named(mindalle_folder, changes, message):
    sizes = dict(num_text_tokens=9, num_image_tokens=8, text_seq_len=4, grid=2, dim=16, depth=2, heads=2, dim_head=8)
    config = DalleConfig(**{**sizes, **ARCHITECTURES["mindalle"], **changes})
    own, other = (load_tokenizer(str(path)) for path in (mindalle_folder / "tokenizer", ROOT / "bpe/demo_vocab.txt"))
    refused(message, dalle.export.export_options, config, VqganConfig(), own)
    complaint = "character BPE vocabulary, not one of the kind yttm"
    refused(complaint, dalle.export.export_options, config, VqganConfig(), other)
    refused("variant gumbel", stage1_options, VqganConfig(variant="gumbel"))


def test_fine_tuning_starts_from_the_folders_weights_vocabulary_and_vqgan(mindalle_folder, pairs, tmp_path, caplog):
    out, exported = tmp_path / "run", tmp_path / "exported"
    start = ("--pretrained-checkpoint", mindalle_folder)
    with caplog.at_level(logging.INFO):
        run(pairs, out, *start, "--learning-rate", "1e-12", "--export-mindalle", exported)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "memory for training: about 0.00 GB" in told and "peak memory: " in told
    assert_same(state_of(mindalle_folder, "stage1_last.ckpt"), state_of(exported, "stage1_last.ckpt"))
    before, after = state_of(mindalle_folder, "stage2_last.ckpt"), state_of(exported, "stage2_last.ckpt")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    checkpoint = checkpoints.read_dalle(out / "ckpt/dalle_0.pt")
    assert checkpoint.identity["tokenizer"]["path"] == str(mindalle_folder / "tokenizer")
    # Drawn from the run's own checkpoint, and from what was exported: the same.
    models = [Dalle.from_pretrained(path) for path in (out / "ckpt/dalle_0.pt", exported)]
    drawn = [model.draw("a cat", num_candidates=2, seed=3, progress=False).images for model in models]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("optimizer, rate", [("AdamW", "0.01"), ("Adafactor", "0.1")])
def test_fine_tuning_learns_saves_memory_and_resumes(mindalle_folder, pairs, tmp_path, optimizer, rate):
    more = ("--optimizer", optimizer, "--learning-rate", rate, "--epochs", "4", "--lr-scheduler", "constant")
    start = ("--pretrained-checkpoint", mindalle_folder)
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


def test_an_export_that_cannot_work_is_refused_before_training(mindalle_folder, pairs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    start = ("--pretrained-checkpoint", mindalle_folder, "--export-mindalle", tmp_path / "full")
    refused("--export-mindalle .*not empty", run, pairs, tmp_path, *start)
    for words, message in (
        ("--config demo --export-mindalle x", "--architecture mindalle"),
        ("--config minDALLE_tiny --generated-data --export-mindalle x", "generated data"),
    ):
        refused(message, args.parse, words.split(), kind=UsageError)
    stage1 = ["--vqgan-model-path", mindalle_folder / "stage1_last.ckpt"]
    stage1 += ["--vqgan-config-path", mindalle_folder / "config.yaml", "--bpe-path", ROOT / "bpe/demo_vocab.txt"]
    refused("character BPE vocabulary", run, pairs, tmp_path, *stage1, "--export-mindalle", tmp_path / "new")


@pytest.mark.slow
def test_the_tiny_configuration_trains_from_nothing_on_the_demo_and_is_exported(tmp_path):
    words = ["--config", "minDALLE_tiny", "--device", "cpu", "--checkpoint-output-dir", str(tmp_path / "ckpt")]
    train_here([*words, "--export-mindalle", str(tmp_path / "out")])
    losses = [event["loss"] for event in read_metrics(tmp_path, "train")]
    assert losses[-1] < 0.9 * losses[0]
    model = Dalle.from_pretrained(tmp_path / "out")
    assert model.sampling("red apple", num_candidates=2, progress=False).shape == (2, 3, 64, 64)


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
    network, kept = DALLE(model), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

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


def test_a_learned_character_vocabulary_is_read_and_does_not_depend_on_order(tmp_path):
    files = ("bpe-16k-vocab.json", "bpe-16k-merges.txt")
    captions = ["A cat on a mat", "the cats; the CAT!", "a mat"] * 3
    learned = learn_char_vocabulary(captions, 40)
    assert learned == learn_char_vocabulary(reversed(captions), 40)
    for name, content in zip(files, learned):
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size <= 40 and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert len(tokenizer.encode("cat")) == 1 and 1 in tokenizer.encode("zebra")
    refused("--vocab-size 5 cannot hold", learn_char_vocabulary, captions, 5)
    refused("no caption", learn_char_vocabulary, ["", " "], 40)
    shipped = learn_char_vocabulary([record.caption for record in demo_records("train")], 1024)
    assert [(ROOT / "bpe" / "demo_char" / name).read_bytes() for name in files] == list(shipped)
