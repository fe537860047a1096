"""RMSNorm, QK norm, 2-D rotary positions and the activations, beyond the published models."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import run

import args
import checkpoints
import ops
from models.config import DalleConfig
from models.dalle import DalleModel
from models.patterns import rotary_2d_angles
from models.positions import Positions
from sampling.cache import Cache
from utils.errors import UsageError, UserError

SMALL = DalleConfig(
    num_text_tokens=11, num_image_tokens=13, text_seq_len=4, grid=4, dim=24, depth=5, heads=3, dim_head=8,
    attn_types=("full", "axial_row", "axial_col", "conv_like", "conv_causal"), layer_scale=False,
)  # fmt: skip
OPTIONS = {
    "rms": {"norm": "rms"}, "rms, sandwich": {"norm": "rms", "sandwich_norm": True}, "qk": {"qk_norm": True},
    "rotary": {"rotary_2d": True, "image_positions": "none", "text_positions": False},
    "swiglu": {"activation": "swiglu"}, "relu2": {"activation": "relu2", "ff_mult": 6},
    "all": {"norm": "rms", "qk_norm": True, "rotary_2d": True, "activation": "swiglu", "shift_tokens": True},
}  # fmt: skip


def model_of(**options):
    torch.manual_seed(0)
    return DalleModel(dataclasses.replace(SMALL, **options)).double().eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cached_chunks_equal_the_whole_pass(options):
    """Also positions of each image's own; and the fused ops equal the references, gradients too."""
    model = model_of(**options)
    text, codes = torch.randint(1, 11, (2, 4)), torch.randint(13, (2, 16))
    _, whole = model(text, codes)
    cache = Cache(model.config, 2, 1, torch.device("cpu"), torch.float64)
    ids = model.text_part(text)
    with torch.no_grad():
        found = [model.read(ids, Positions(ids.shape[1], 0, text=True), cache)[:, -1:]]
        for start, count in ((0, 1), (1, 3), (4, 11)):
            index = torch.arange(start, start + count).expand(2, -1)
            at = Positions.of(index, 16) if start == 1 else Positions(count, start)
            found.append(model.read(codes[:, start : start + count], at, cache))
    logits = ops.linear(torch.cat(found, dim=1), model.operands().image_head)
    assert torch.allclose(logits, whole, atol=1e-12)
    gradients = []
    for kind in ("native", "reference"):
        with ops.use(kind):
            model.zero_grad()
            sum(part.square().mean() for part in model(text, codes)).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients))


def test_rotary_scores_depend_on_distances_alone():
    """For two codes on rows and columns, for two text tokens on their distance."""
    angles, grid = rotary_2d_angles(3, 5, 8).double(), 5
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned = [ops.rotate(x.expand(28, 8), angles) for x in (query, key)]
    scores = turned[0] @ turned[1].T
    codes = scores[3:, 3:].view(grid, grid, grid, grid)
    assert torch.allclose(codes[1:, 1:, 1:, 1:], codes[:-1, :-1, :-1, :-1])
    assert not torch.allclose(codes[1, 2, 1, 1], codes[1, 2, 1, 2])
    assert torch.allclose(scores[0, 1], scores[1, 2]) and not torch.allclose(scores[0, 1], scores[1, 0])


def test_definitions_of_norms_and_activations():
    x, scale = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    assert torch.allclose(ops.normalise(x, ops.Norm(scale, None, 1e-6)), expected)
    assert torch.allclose(ops.activation("relu2")(x), x.clamp(min=0) ** 2)
    assert torch.allclose(ops.activation("swiglu")(x), x[:, :4] * x[:, 4:] / (1 + (-x[:, 4:]).exp()))
    qkv = torch.randn(2, 3, 3 * 2 * 4, dtype=torch.float64)
    own = ops.prepare_heads(qkv, 2, torch.full((2, 4), 3.0, dtype=torch.float64), None).view(2, 3, 3, 2, 4)
    assert torch.allclose(own[:, :, :2].pow(2).mean(-1), torch.full((2, 3, 2, 2), 9.0, dtype=torch.float64), atol=1e-4)
    assert torch.equal(own[:, :, 2], qkv.view(2, 3, 3, 2, 4)[:, :, 2])


def test_training_saves_and_resumes_such_a_model(folder, tmp_path):
    words = "--norm rms --qk-norm --rotary-2d --activation swiglu --sandwich-norm".split()
    run(folder, tmp_path, *words, "--max-steps", "2")
    checkpoint = checkpoints.read_dalle(checkpoints.newest_checkpoint(tmp_path / "ckpt"))
    config = DalleConfig.from_dict(checkpoint.config)
    assert (config.norm, config.qk_norm, config.rotary_2d, config.activation) == ("rms", True, True, "swiglu")
    events = run(folder, tmp_path, *words, "--max-steps", "4", "--resume")
    assert max(event["step"] for event in events) == 4


WRONG = [
    ({"activation": "tanh"}, "known: geglu, swiglu"), ({"norm": "batch"}, "known: layer, rms"),
    ({"rotary_2d": True, "rotary": True}, "excludes rotary"), ({"rotary_2d": True, "dim_head": 6}, "divisible by 4"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **options)


def test_mindalle_has_its_own_blocks():
    for words in (["--norm", "rms"], ["--activation", "swiglu"], ["--ff-mult", "6"], ["--qk-norm"], ["--rotary-2d"]):
        with pytest.raises(UsageError, match=f"{words[0]}: --architecture mindalle has its own"):
            args.parse(["--config", "minDALLE_tiny", *words])
