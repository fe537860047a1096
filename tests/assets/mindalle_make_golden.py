"""Make mindalle_golden.json: what the published minDALL-E code computes with the tiny model of mindalle_folder.py.

    PYTHONPATH=. python tests/assets/mindalle_make_golden.py FOLDER_OF_MINDALLE_SOURCES

Needs that code (commit e548007), einops and tokenizers. What else its package imports at its top is stood in for: the
modules used here do not need it.
"""
from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path

import torch
import yaml

ASSETS = Path(__file__).resolve().parent
sys.path[:0] = [str(ASSETS.parent), str(ASSETS.parent.parent)]
import mindalle_folder as tiny  # noqa: E402


class Options(dict):
    """Attribute access to a dictionary, which is all that is used of OmegaConf."""

    __getattr__ = dict.__getitem__


def published(sources, name):
    """Import a module of the published package without what the package's __init__ imports."""
    for package in ("dalle", "dalle.models", "dalle.utils", "dalle.models.stage1", "dalle.models.stage2"):
        module = types.ModuleType(package)
        module.__path__ = [str(Path(sources, *package.split(".")))]
        sys.modules[package] = module
    sys.modules.setdefault("omegaconf", types.SimpleNamespace(OmegaConf=dict))
    return importlib.import_module(name)


def numbers(tensor):
    return [round(value, 6) for value in tensor.flatten().tolist()]


def image_gpt(transformer, sampling, folder, hparams, classes):
    """Logits and greedy codes of the image-only model, loaded from the folder as for transfer learning."""
    model = transformer.iGPT(tiny.CODES, classes > 0, Options(hparams, n_classes=classes)).eval()
    model.from_ckpt(str(folder / "stage2_last.ckpt"), strict=False)
    head, start = tiny.start_weights(classes)
    model.head.weight.copy_(head)
    (model.sos.weight if classes else model.sos[0]).copy_(start)
    labels = torch.arange(classes) if classes else None
    codes = (torch.arange(max(classes, 1) * tiny.GRID**2) * 5 % tiny.CODES).view(-1, tiny.GRID**2)
    sos = model.sos(labels)[:, None] if classes else model.sos
    greedy = sampling.sampling_igpt(model, sos, top_k=1, is_tqdm=False, use_fp16=False, max_seq_len=tiny.GRID**2)
    return {"logits": numbers(model(codes, labels)[-1]), "greedy": greedy.tolist()}


@torch.no_grad()
def main():
    folder = tiny.make_folder(Path(tempfile.mkdtemp()) / "tiny")
    for name in [name for name in sys.modules if name.split(".")[0] == "dalle"]:
        del sys.modules[name]
    transformer = published(sys.argv[1], "dalle.models.stage2.transformer")
    vqgan = importlib.import_module("dalle.models.stage1.vqgan")
    sampling = importlib.import_module("dalle.utils.sampling")
    tokenizers = importlib.import_module("dalle.models.tokenizer")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    stage1 = vqgan.VQGAN(tiny.CODES, 32, Options(config["stage1"]["hparams"])).eval()
    stage1.from_ckpt(str(folder / "stage1_last.ckpt"))
    options = config["stage2"]
    stage2 = transformer.Transformer1d(options["vocab_size_txt"], tiny.CODES, Options(options["hparams"])).eval()
    stage2.from_ckpt(str(folder / "stage2_last.ckpt"))
    tokenizer = tokenizers.build_tokenizer(str(folder / "tokenizer"), context_length=tiny.TEXT_LEN, lowercase=True)
    ids = [tokenizer.encode(caption).ids for caption in tiny.CAPTIONS]
    text = torch.tensor(ids)
    codes = (torch.arange(len(ids) * tiny.GRID**2) * 7 % tiny.CODES).view(len(ids), -1)
    positions = sampling.get_positional_encoding
    logits_img, logits_txt = stage2(codes, text, positions(codes), positions(text))
    greedy = sampling.sampling(stage2, text, top_k=1, is_tqdm=False, use_fp16=False, max_seq_len=tiny.GRID**2)
    pixels = torch.clamp(stage1.decode_code(greedy[:2].view(2, tiny.GRID, tiny.GRID)) * 0.5 + 0.5, 0, 1)
    images = torch.sin(torch.arange(2 * 3 * 16 * 16) * 0.11).view(2, 3, 16, 16)
    row = torch.tensor([[0.5, 2.0, 2.0, -1.0, 2.0, 3.0, 0.0, 3.0]])
    probabilities = torch.softmax(row, -1)
    sys.modules["clip"] = types.SimpleNamespace(tokenize=tiny.clip_tokenize)
    utils = importlib.import_module("dalle.utils.utils")
    clip = (tiny.clip_images(), tiny.FormulaClip(), tiny.clip_preprocess, "cpu")
    golden = {
        "image_gpt": {str(classes): image_gpt(transformer, sampling, folder, options["hparams"], classes)
                      for classes in (0, 2)},
        "clip_ranks": [utils.clip_score(caption, *clip).tolist() for caption in tiny.CAPTIONS[:3]],
        "ids": ids,
        "logits_txt_0": numbers(logits_txt[0]),
        "logits_img_1": numbers(logits_img[1]),
        "greedy": greedy.tolist(),
        "pixels_0": numbers(pixels[0]),
        "codes_of_images": stage1.get_codes(images).tolist(),
        "row": row.tolist(),
        "top_k": {k: numbers(torch.softmax(sampling.cutoff_topk_logits(row, k), -1)) for k in (1, 2, 3, 4, 6, 8)},
        "top_p": {p: numbers(sampling.cutoff_topp_probs(probabilities, p)) for p in (0.01, 0.3, 0.5, 0.8, 0.95, 1.0)},
    }
    (ASSETS / "mindalle_golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
