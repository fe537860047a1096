"""minDALL-E on our models: layout and API, against numbers of the published code, and training.

assets/mindalle_golden.json is what that code (commit e548007) computes with the model of mindalle_folder.py. The script
that made it is in the history (`git log -- tests/assets/mindalle_make_golden.py`).
"""
from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, assert_same, read_metrics, refused, tar_of, train_here, write_pairs
from mindalle_folder import CAPTIONS, GRID, TEXT_LEN
from PIL import Image

import args
import checkpoints
import dalle.export
from bpe import load_tokenizer
from bpe.char_train import learn_char_vocabulary
from dalle import published
from dalle.completion import completion_codes, mask_cells, parse_box, picture_pixels, transparent_mask
from dalle.models import Dalle
from dalle.utils.utils import set_seed
from data.demo import demo_records
from engines.memory import training_memory
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DalleModel
from models.vqgan_config import VqganConfig, stage1_config, stage1_options
from ops.sampling_ops import keep_top_k, keep_top_p
from sampling import driver
from utils.errors import UsageError

GOLDEN = json.loads((ROOT / "tests" / "assets" / "mindalle_golden.json").read_text())


@pytest.fixture(scope="module")
def model(mindalle_folder):
    return Dalle.from_pretrained(mindalle_folder)


def codes_of(model, prompt="a painting of the sea", **options):
    return model.generate(prompt, progress=False, **dict({"num_candidates": 3, "seed": 5}, **options)).codes


def test_token_ids_logits_and_codes_of_images_are_the_published_ones(model):
    assert model.tokenizer.tokenize(CAPTIONS, TEXT_LEN, truncate=True).tolist() == GOLDEN["ids"]
    text = torch.tensor(GOLDEN["ids"])
    codes = (torch.arange(len(text) * GRID * GRID) * 7 % 24).view(len(text), -1)
    images = torch.sin(torch.arange(2 * 3 * 16 * 16) * 0.11).view(2, 3, 16, 16)
    with torch.no_grad():
        logits_txt, logits_img = model.stage2(text, codes)
        assert model.stage1.encode(images * 0.5 + 0.5).tolist() == GOLDEN["codes_of_images"]
    assert torch.allclose(logits_txt[0].flatten(), torch.tensor(GOLDEN["logits_txt_0"]), atol=2e-4)
    assert torch.allclose(logits_img[1].flatten(), torch.tensor(GOLDEN["logits_img_1"]), atol=2e-4)


def test_greedy_codes_and_pixels_are_the_published_ones(model):
    for index, caption in enumerate(CAPTIONS):
        assert codes_of(model, caption, top_k=1, num_candidates=1).tolist() == [GOLDEN["greedy"][index]]
    images = model.sampling(CAPTIONS[0], top_k=1, num_candidates=2, device="cpu", progress=False)
    assert images.shape == (2, 3, 16, 16)
    assert torch.allclose(images[0].flatten(), torch.tensor(GOLDEN["pixels_0"]), atol=1e-4)
    row = torch.tensor(GOLDEN["row"])
    for k, expected in GOLDEN["top_k"].items():
        kept = keep_top_k(row, torch.tensor([[int(k) - 1]]), int(k))
        assert torch.allclose(torch.softmax(kept, -1), torch.tensor([expected]), atol=1e-5)
    for p, expected in GOLDEN["top_p"].items():
        kept = keep_top_p(torch.softmax(row, -1), torch.tensor([float(p)]))
        # Which of several equal probabilities stays at the edge is up to the sort; how many do is not.
        assert torch.allclose(kept.sort().values, torch.tensor([expected]).sort().values, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizers_pair(mindalle_folder):
    """Ours, and HF's CharBPETokenizer set up as the published code does."""
    from tokenizers import CharBPETokenizer
    files = [str(mindalle_folder / "tokenizer" / name) for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt")]
    theirs = CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True)
    theirs.add_special_tokens(["[PAD]"])
    return load_tokenizer(str(mindalle_folder / "tokenizer")), theirs


TEXTS = [
    *CAPTIONS, "", "   ", "[PAD] a [UNK]cat[pad]", "İstanbul ΣΑΣ straße ﬁne", "中文 and 猫cat",
    "tab\tnew\nline\xa0space\u200bzero\x00nul", "éclair 🙂 #hash 3.14 don't", "x" * 300,
]


def test_encodes_and_decodes_like_tokenizers(tokenizers_pair):
    ours, theirs = tokenizers_pair
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids).rstrip(" ")


def test_encodes_real_captions_like_tokenizers(tokenizers_pair, shared_data):
    ours, theirs = tokenizers_pair
    annotations = json.loads((shared_data / "captions_val2017.json").read_text())["annotations"][:500]
    captions = [annotation["caption"] for annotation in annotations]
    assert ours.encode_batch(captions) == [encoding.ids for encoding in theirs.encode_batch(captions)]


def test_a_tokenizer_is_known_by_its_files(mindalle_folder, tmp_path):
    ours = load_tokenizer(str(mindalle_folder / "tokenizer"))
    assert ours.identity["type"] == "char_bpe" and len(ours.identity["sha256"]) == 64
    assert ours.encode("a\ud800b") == ours.encode("ab")
    for vocabulary, merges, message in (
        ("{", "", "not JSON"), ('{"a": 0}', "", r"needs the tokens \[PAD\] with id 0"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 1}', "", "same id"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": "x"}', "", "must be whole numbers"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 2}', "a b\n", "line 1 merges tokens that the vocabulary lacks"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 2}', "#version: 0.2\na\n", "line 2 is not a merge"),
    ):
        (tmp_path / "x-vocab.json").write_text(vocabulary)
        (tmp_path / "x-merges.txt").write_text(merges)
        refused(message, load_tokenizer, str(tmp_path))
    (tmp_path / "x-merges.txt").unlink()
    refused("one file", load_tokenizer, str(tmp_path))


def test_seed_guidance_and_temperature_reach_the_sampler(model):
    whole = codes_of(model, num_candidates=5)
    assert torch.equal(codes_of(model, num_candidates=5, batch_size=2), whole)
    assert torch.equal(codes_of(model, num_candidates=2), whole[:2])
    assert not torch.equal(codes_of(model, num_candidates=5, seed=6), whole)
    set_seed(3)
    first = codes_of(model, seed=None)
    set_seed(3)
    assert torch.equal(codes_of(model, seed=None), first) and not torch.equal(codes_of(model, seed=None), first)
    draws = []
    for _ in range(2):
        set_seed(7)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    plain = codes_of(model, softmax_temperature=0)
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain, codes_of(model, top_k=1))
    assert torch.equal(plain, codes_of(model, top_k=None, top_p=1e-6))
    other = codes_of(model, "two cats", softmax_temperature=0, cond_scale=0)
    assert torch.equal(codes_of(model, softmax_temperature=0, cond_scale=0), other)


def test_progress_counts_every_code(model):
    seen = []
    model.generate("a cat", num_candidates=5, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (80, 80) and seen == sorted(seen) and len(seen) == 48
    generated = model.generate("a cat", num_candidates=6, seed=1, progress=False)
    best = generated.best(2)
    assert best.log_likelihood.tolist() == sorted(generated.log_likelihood.tolist(), reverse=True)[:2]
    assert torch.equal(best.images[0], generated.images[int(generated.log_likelihood.argmax())])


def test_what_does_not_fit_is_tried_again_with_less(model, monkeypatch):
    sizes, sample_codes = [], driver.sample_codes

    def limited(stage2, text, seeds, *rest):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.cuda.OutOfMemoryError("full")
        return sample_codes(stage2, text, seeds, *rest)

    expected = codes_of(model, num_candidates=5)
    monkeypatch.setattr(driver, "sample_codes", limited)
    assert torch.equal(codes_of(model, num_candidates=5), expected) and sizes == [5, 3, 2, 1, 2]
    refused("not enough memory for a batch of 3 images: lower --batch-size", codes_of, model, batch_size=3)


@pytest.mark.parametrize("options, message", [
    ({"top_k": 0}, "top_k must be a whole number of at least 1"),
    ({"top_k": 5.5}, "top_k must be a whole number of at least 1"), ({"top_p": 1.5}, "top_p must be above 0"),
    ({"softmax_temperature": 1e-38}, "softmax_temperature must be at least 1e-06 and .*, got 1e-38"),
    ({"num_candidates": 0}, "num_candidates"), ({"batch_size": 0}, "batch_size"),
    ({"cond_scale": 1e38}, "cond_scale must be at least 0 and at most 1e.06, got 1e.38"),
    ({"prompt": 5}, "prompt must be a text"), ({"image": np.zeros((16, 16, 3))}, "image and mask belong together"),
])
def test_impossible_values_are_named(model, options, message):
    refused(message, codes_of, model, **options)


def test_masked_codes_are_drawn_and_all_others_kept(model):
    picture = Image.effect_noise((40, 24), 90).convert("RGB")
    pixels = picture_pixels(picture, 16)
    with torch.no_grad():
        own = model.stage1.encode(pixels[None].float() / 255)[0]
    mask = torch.zeros(4, 4)
    mask[1, 2] = mask[3, 0] = 1
    kept = ~(mask.flatten() > 0)
    generated = [codes_of(model, image=picture, mask=mask, top_k=None, seed=seed) for seed in range(3)]
    assert all(torch.equal(codes[:, kept], own[kept].expand(3, -1)) for codes in generated)
    assert len({tuple(row[~kept].tolist()) for codes in generated for row in codes}) > 1
    assert completion_codes(model.loaded, picture, mask).tolist() == own.masked_fill(~kept, -1).tolist()


def test_masks_of_every_kind_mark_the_same_codes():
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[2:, 1:3] = True
    pixels = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)
    large = Image.fromarray(pixels.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy().astype(np.uint8) * 255)
    for mask in (cells, cells.flatten().int(), cells.numpy(), pixels, large, parse_box("0.25, 0.5,0.75,1.0")):
        assert torch.equal(mask_cells(mask, 4, 16), cells.flatten())
    touched = torch.zeros(16, 16)
    touched[3, 4] = 1
    assert mask_cells(touched, 4, 16).nonzero().tolist() == [[1]]
    for mask, message in ((torch.zeros(4, 4), "nothing is marked"), (torch.ones(5, 5), "expected 4 x 4 codes")):
        refused(message, mask_cells, mask, 4, 16)
    assert parse_box("mask.png") is None and parse_box("1.png") is None
    for box in ("0.5,0,0.5,1", "0,0,2,1", "0,0,1", "0, -1, 1, 1", "0.1,0.2,0.3,0.4,0.5"):
        refused("a box is left,top,right,bottom", parse_box, box)
    picture = Image.new("RGBA", (16, 16), (200, 10, 10, 255))
    assert transparent_mask(picture) is None and transparent_mask(picture.convert("RGB")) is None
    picture.paste((0, 0, 0, 0), (0, 8, 16, 16))
    assert mask_cells(transparent_mask(picture), 4, 16).tolist() == [False] * 8 + [True] * 8
    assert picture_pixels(picture, 16)[:, 12, 3].tolist() == [255, 255, 255]


def test_what_a_folder_lacks_is_named(mindalle_folder, tmp_path):
    refused("minDALL-E/1.4B: no such file.* Did you mean 'minDALL-E/1.3B'", Dalle.from_pretrained, "minDALL-E/1.4B")
    refused("not a folder in minDALL-E's layout", Dalle.from_pretrained, tmp_path)
    for name, argument in (("stage1_last.ckpt", "vqgan_model_path"), ("tokenizer", "bpe_path")):
        part = tmp_path / name
        part.mkdir()
        for path in mindalle_folder.iterdir():
            if path.name != name:
                (part / path.name).symlink_to(path)
        refused(f"{part} lacks {name}.* give {argument}", Dalle.from_pretrained, part)
    assert stage1_config({}, "x").num_codes == 16384
    for document, message in (
        ({"stage1": {"type": "dvae"}}, "stage1.type 'dvae' is not supported"), ({"stage1": 5}, "must be tables"),
        ({"stage1": {"hparams": {"ch": "x"}}}, "ch must be a positive whole number"),
    ):
        refused(message, stage1_config, document, "config.yaml")


def test_other_checkpoints_are_read_too(model, mindalle_folder, tmp_path):
    state, config = model.stage2.state_dict(), dict(model.stage2.config.to_dict())
    config["num_text_tokens"] = model.tokenizer.vocab_size
    for name in ("text_emb.weight", "text_head.weight"):
        state[name] = state[name][: model.tokenizer.vocab_size].clone()
    checkpoints.save_checkpoint(tmp_path / "dalle_1.pt", checkpoints.dalle_checkpoint(config, state, 1))
    VqganConfig.from_yaml(mindalle_folder / "config.yaml").to_yaml(tmp_path / "vqgan.yaml")
    tokenizer, vqgan = mindalle_folder / "tokenizer", mindalle_folder / "stage1_last.ckpt"
    other = Dalle.from_pretrained(tmp_path / "dalle_1.pt", tokenizer, vqgan, tmp_path / "vqgan.yaml")
    assert torch.equal(codes_of(other), codes_of(model))


def test_a_published_name_is_fetched_once(tmp_path, monkeypatch):
    source = tar_of(tmp_path / "source.tar.gz", [("1.3B/config.yaml", b"{}"), ("1.3B/tokenizer/a.json", b"1")])
    content, calls = source.read_bytes(), []

    def download(url, path, md5, size_limit):
        calls.append(url)
        assert md5 == "57b008f02ceaa02b779c8b7463143315" and len(content) < size_limit
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
        return Path(path)

    monkeypatch.setattr(published, "download", download)
    cache = tmp_path / "cache"
    assert published.resolve("minDALL-E/1.3B", cache) == published.resolve("minDALL-E/1.3B", cache) == cache / "1.3B"
    assert len(calls) == 1 and (cache / "1.3B" / "tokenizer" / "a.json").read_text() == "1"
    assert sorted(path.name for path in cache.iterdir()) == ["1.3B"]
    assert published.resolve("somewhere/else") == Path("somewhere/else")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), [f"a painting of cat {index}" for index in range(12)])


def run(pairs, out, *more):
    words = "--config minDALLE_tiny --bpe-path none --vqgan-model-path none --vqgan-config-path none --image-size 16"
    words += f" --text-seq-len {TEXT_LEN} --batch-size 4 --max-steps 0 --epochs 1 --device cpu"
    words += " --validation-fraction 0 --log-every 1"
    folders = ["--input-folder", str(pairs), "--checkpoint-output-dir", str(out / "ckpt")]
    train_here([*words.split(), *folders, *map(str, more)])
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
    generated = [model.generate("the sea", num_candidates=2, seed=3, progress=False) for model in models]
    assert torch.equal(generated[0].codes, generated[1].codes) and torch.equal(generated[0].images, generated[1].images)
    refused("the folder is not empty", dalle.export.main, list(map(str, folders)))


@pytest.mark.parametrize("changes, message", [
    ({"bos": True}, "bos = True"), ({"layer_scale": True}, "layer_scale"),
    ({"attn_types": ("axial_row",)}, "attn_types must be full"), ({"dim_head": 4}, "heads x dim_head"),
    ({"activation": "swiglu"}, "only the activations gelu"), ({"shared_ff_ids": (0, 0)}, "shared_ff_ids"),
    ({"norm": "rms"}, "norm = 'rms'"), ({"qk_norm": True}, "qk_norm"), ({"rotary_2d": True}, "rotary_2d"),
    ({"value_residual": True}, "value_residual"),
])
def test_what_has_no_place_in_the_layout_is_named(mindalle_folder, changes, message):
    sizes = dict(num_text_tokens=9, num_image_tokens=8, text_seq_len=4, grid=2, dim=16, depth=2, heads=2, dim_head=8)
    config = DalleConfig(**{**sizes, **ARCHITECTURES["mindalle"], **changes})
    own, other = (load_tokenizer(str(path)) for path in (mindalle_folder / "tokenizer", ROOT / "bpe/demo_vocab.txt"))
    refused(message, dalle.export.export_options, config, VqganConfig(), own)
    complaint = "character BPE vocabulary, not one of type yttm"
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
    assert before.keys() == after.keys() and all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    checkpoint = checkpoints.read_dalle(out / "ckpt/dalle_0.pt")
    assert checkpoint.identity["tokenizer"]["path"] == str(mindalle_folder / "tokenizer")
    # Drawn from the run's own checkpoint, and from what was exported: the same.
    models = [Dalle.from_pretrained(path) for path in (out / "ckpt/dalle_0.pt", exported)]
    assert torch.equal(*[model.generate("a cat", num_candidates=2, seed=3, progress=False).images for model in models])


@pytest.mark.parametrize("optimizer, rate", [("AdamW", "0.01"), ("Adafactor", "0.1")])
def test_fine_tuning_learns_saves_memory_and_resumes(mindalle_folder, pairs, tmp_path, optimizer, rate):
    more = ("--optimizer", optimizer, "--learning-rate", rate, "--epochs", "4", "--lr-scheduler", "constant")
    start = ("--pretrained-checkpoint", mindalle_folder)
    losses = [event["loss"] for event in run(pairs, tmp_path / "whole", *more, *start) if event["event"] == "train"]
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
        *((f"--config minDALLE_tiny {flag}", f"{flag.split()[0]}: --architecture mindalle has its own")
          for flag in ("--norm rms", "--activation swiglu", "--ff-mult 6", "--qk-norm", "--rotary-2d")),
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


MODERN = dict(qk_norm=True, rotary_2d=True, value_residual=True, shift_tokens=True, attn_dropout=0.1, ff_dropout=0.1)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [*ARCHITECTURES.values(), MODERN], ids=[*ARCHITECTURES, "modern"])
def test_the_estimate_of_activations_is_what_autograd_keeps(options, half):
    model = DalleConfig(
        num_text_tokens=50, num_image_tokens=60, text_seq_len=12, grid=6, dim=64, depth=3, heads=4, dim_head=16,
        **options,
    )
    config = args.parse(["--config", "unit_test", "--batch-size", "4", "--gradient-accumulation", "1"])
    network, kept = DalleModel(model), {}
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
    assert 0.75 < training_memory(model, config, "bf16" if half else "fp32").activations / held < 1.35


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
    refused("no captions", learn_char_vocabulary, ["", " "], 40)
    shipped = learn_char_vocabulary([record.caption for record in demo_records("train")], 1024)
    assert [(ROOT / "bpe" / "demo_char" / name).read_bytes() for name in files] == list(shipped)
