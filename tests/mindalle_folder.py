"""A tiny model in minDALL-E's published layout: weights from a formula, so that they are the same everywhere."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

WIDTH, LAYERS, HEADS, TEXT_LEN, GRID, CODES = 16, 2, 4, 8, 4, 24
STAGE1 = {
    "double_z": False, "z_channels": 32, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "pdrop": 0.0,
}
STAGE2 = {
    "embed_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_dense_layers": LAYERS, "ctx_len_img": GRID * GRID,
    "ctx_len_txt": TEXT_LEN, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True,
    "attn_bias": True, "gelu_use_approx": False,
}
CAPTIONS = [
    "A painting of a monkey with sunglasses in the frame", "The cat's CAFÉ, on the beach!",
    "two cats on a red sofa; the other cat is on the floor", "un château à l'île, 中文 text", "a painting of the sea",
]
#: A small character BPE that was learned from CAPTIONS: a vocabulary and its merges.
TOKENIZER = Path(__file__).parent / "assets" / "mindalle_tokenizer"
TOKENS = len(json.loads((TOKENIZER / "bpe-16k-vocab.json").read_text(encoding="utf-8")))


def wave(name, shape):
    """Weights without a random number generator: a sine over the elements whose phase the name gives."""
    size = math.prod(shape)
    phase = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 1009
    values = torch.sin(torch.arange(size, dtype=torch.float64) * (1.7 + phase / 911) + phase)
    if len(shape) == 1:
        scale, centre = 0.1, 1.0 if "norm" in name or ".ln" in name or name.startswith("ln") else 0.0
        centre = centre if name.endswith("weight") else 0.0
    else:
        scale, centre = 1.5 / math.sqrt(max(math.prod(shape[1:]), 1)), 0.0
        scale = 1.0 if "emb" in name else scale * (4 if name.startswith("head") else 1)
    return (centre + scale * values).float().reshape(shape)


def stage2_shapes(texts, codes=CODES, width=WIDTH, layers=LAYERS, text_len=TEXT_LEN, image_len=GRID * GRID):
    """Names and shapes of the transformer's weights."""
    shapes = {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    for part, rows, length in (("txt", texts, text_len), ("img", codes, image_len)):
        shapes[f"tok_emb_{part}.weight"] = shapes[f"head_{part}.weight"] = (rows, width)
        shapes[f"pos_emb_{part}.weight"] = (length, width)
    square = ("attn.key", "attn.query", "attn.value", "attn.proj")
    sizes = {"ln1": (width,), "ln2": (width,), **dict.fromkeys(square, (width, width))}
    sizes.update({"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)})
    for layer in range(layers):
        for name, size in sizes.items():
            stem = f"blocks.{layer}.{name}."
            shapes[stem + "weight"], shapes[stem + "bias"] = size, size[:1]
    return shapes


def reference_blocks(w, x, heads, layers=LAYERS, quick=False):
    """minDALL-E's forward pass over its own names, after the embeddings: (B, N, D) -> (B, N, D)."""

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)

    for layer in range(layers):
        block = f"blocks.{layer}."
        parts = (linear(norm(x, block + "ln1"), block + "attn." + name) for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        hidden = linear(norm(x, block + "ln2"), block + "mlp.0")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden), block + "mlp.2")
    return norm(x, "ln_f")


def start_weights(classes):
    """What transfer learning makes anew, from the formula: the head, and one start vector or one for each class."""
    return wave("head.weight", (CODES, WIDTH)), wave("sos.weight", (max(classes, 1), WIDTH))


class FormulaClip(torch.nn.Module):
    """Stands in for OpenAI's CLIP: features that a formula makes of pixels and letters."""

    def encode_image(self, pixels):
        """(N, 3, H, W) -> (N, 8)."""
        return pixels.flatten(1) @ wave("clip.image", (pixels[0].numel(), 8))

    def encode_text(self, tokens):
        """(N, 77) -> (N, 8)."""
        return tokens.float() @ wave("clip.text", (tokens.shape[1], 8))


def clip_tokenize(texts):
    """What the package `clip` calls tokenize, with letters for tokens. One text or several -> (N, 77)."""
    texts = [texts] if isinstance(texts, str) else texts
    return torch.tensor([[ord(c) for c in text[:77]] + [0] * (77 - len(text)) for text in texts])


def clip_preprocess(picture):
    """PIL picture -> (3, H, W) in [0, 1]."""
    flat = torch.tensor(list(picture.tobytes()), dtype=torch.float32)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def clip_images():
    """Twelve images (N, H, W, 3), floats in [0, 1]."""
    return (wave("images", (12, 8 * 8 * 3)) * 4).sin().abs().reshape(12, 8, 8, 3).numpy()


def stage1_shapes():
    """Names and shapes of the VQGAN's weights (taming-transformers' names)."""
    from models.vqgan import VQGAN, VqganConfig
    network = {
        key: tuple(v) if isinstance(v, list) else v for key, v in STAGE1.items() if key not in ("double_z", "pdrop")
    }
    with torch.device("meta"):
        vqgan = VQGAN(VqganConfig(num_codes=CODES, embed_dim=32, **network))
    return {name: tuple(tensor.shape) for name, tensor in vqgan.state_dict().items()}


def make_folder(folder):
    """Write the model and return its folder."""
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    texts = TOKENS + 3  # the published table need not be full
    config = {
        "dataset": {"context_length": TEXT_LEN},
        "stage1": {"type": "vqgan", "embed_dim": 32, "n_embed": CODES, "hparams": STAGE1},
        "stage2": {"type": "transformer1d", "vocab_size_txt": texts, "vocab_size_img": CODES, "hparams": STAGE2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, shapes in (("stage1_last.ckpt", stage1_shapes()), ("stage2_last.ckpt", stage2_shapes(texts))):
        torch.save({"state_dict": {key: wave(key, shape) for key, shape in shapes.items()}}, folder / name)
    return folder
