"""Equal weights, equal results: the DALL-E against the published `dalle-pytorch` 1.6.6, in double precision.

Our model is always the one that `read_dalle` makes of a checkpoint which the peer would have written, so that reader
and model are checked together. The peer's package is a test requirement, installed without its own requirements: what
it only imports (VQGANs, downloads) is replaced by empty modules while these tests run.
"""
from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest
import torch

from benchmarks.contestants import import_peer
from checkpoints import read_dalle
from checkpoints.formats import from_dalle_pytorch
from models.config import DalleConfig
from models.dalle import DalleModel
from sampling import SamplingOptions, sample_codes
from sampling.canvas import guided
from utils.errors import UserError

VOCABULARY, TEXT_LEN, CODES = 19, 5, 11

#: What the peer's trainer stores in `hparams`, at its defaults.
TRAINER = {
    "reversible": False, "loss_img_weight": 7, "attn_types": ("full",), "ff_dropout": 0.0, "attn_dropout": 0.0,
    "stable": False, "shift_tokens": False, "rotary_emb": False, "shared_attn_ids": None, "shared_ff_ids": None,
    "share_input_output_emb": False,
}  # fmt: skip
ALL_PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
FOUR = {"attn_types": ALL_PATTERNS, "depth": 4}
OPTIONS = {
    **{pattern: {"attn_types": (pattern,)} for pattern in ALL_PATTERNS},
    "all patterns": dict(FOUR, depth=5), "image weight": {"loss_img_weight": 2},
    "sandwich norm": dict(FOUR, sandwich_norm=True), "rotary": dict(FOUR, rotary_emb=True),
    "shift": {"shift_tokens": True}, "rotary and shift": dict(FOUR, rotary_emb=True, shift_tokens=True),
    "stable": dict(FOUR, stable=True),
    "shared layers": {"depth": 4, "shared_attn_ids": ("0", "1"), "shared_ff_ids": ("0", "0", "1", "0")},
    "shared embeddings": {"share_input_output_emb": True},
    "everything": {
        "attn_types": ALL_PATTERNS, "depth": 8, "stable": True, "sandwich_norm": True, "rotary_emb": True,
        "shift_tokens": True, "share_input_output_emb": True, "shared_attn_ids": ("0", "1", "2", "3"),
        "shared_ff_ids": ("5", "6"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def peer_package(clean_modules):
    if importlib.util.find_spec("dalle_pytorch") is None:
        pytest.skip("dalle-pytorch, a test requirement, is not installed")
    if metadata.version("dalle-pytorch") != "1.6.6":
        pytest.skip("dalle-pytorch is {}, not 1.6.6".format(metadata.version("dalle-pytorch")))
    return import_peer()


def build(package, grid=4, depth=2, **options):
    """A peer with random weights everywhere (biases, norms and scales too), and its trainer's hparams."""
    torch.manual_seed(11)
    vae = package.DiscreteVAE(image_size=4 * grid, num_layers=2, num_tokens=CODES, codebook_dim=2, hidden_dim=2)
    shape = {"num_text_tokens": VOCABULARY, "text_seq_len": TEXT_LEN, "dim": 16, "heads": 3, "dim_head": 12}
    shape["depth"] = depth
    peer = package.DALLE(vae=vae, **shape, **dict(TRAINER, **options)).double().eval()
    for name, parameter in peer.named_parameters():
        std = 1.0 if "emb" in name or "scale" in name else 0.5
        if name.startswith("to_logits") and name.endswith("bias"):
            std = 0.03  # strong biases at the end would make one code the likeliest everywhere
        if not name.startswith("vae."):
            torch.nn.init.normal_(parameter, std=std)
    # The trainer does not store sandwich_norm: only the weights tell.
    stored = {name: value for name, value in options.items() if name != "sandwich_norm"}
    return peer, dict(shape, **dict(TRAINER, **stored))


def through_checkpoint(peer, hparams, folder):
    """Our model, read from the file the peer's trainer would have written."""
    document = {
        "hparams": hparams, "vae_params": None, "epoch": 3, "version": "1.6.6", "vae_class_name": "VQGanVAE",
        "weights": peer.state_dict(), "opt_state": {}, "scheduler_state": None,
    }  # fmt: skip
    torch.save(document, folder / "dalle.pt")
    checkpoint = read_dalle(folder / "dalle.pt")
    assert checkpoint.format == "dalle-pytorch" and checkpoint.epoch == 3
    model = DalleModel(DalleConfig.from_dict(checkpoint.config)).double().eval()
    model.load_state_dict(checkpoint.weights)
    return model


def batch(grid=4, size=3):
    """Captions of different lengths, one of them empty, and random codes."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(1, VOCABULARY, (size, TEXT_LEN), generator=generator)
    text[0, 3:] = 0
    text[1, :] = 0
    return text, torch.randint(CODES, (size, grid * grid), generator=generator)


def split(peer_logits):
    """The peer's logits over both vocabularies -> those of the text part, those of the image part."""
    rows = VOCABULARY + TEXT_LEN
    return peer_logits[:, :TEXT_LEN, :rows], peer_logits[:, TEXT_LEN:, rows:]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_losses_and_gradients(peer_package, tmp_path, options):
    grid = 8 if "conv_like" in options.get("attn_types", ()) else 4  # the 5x5 window does not cover an 8x8 grid
    peer, hparams = build(peer_package, grid=grid, **options)
    model = through_checkpoint(peer, hparams, tmp_path)
    text, codes = batch(grid)
    text_logits, image_logits = model(text, codes)
    for actual, expected in zip((text_logits, image_logits), split(peer(text, codes))):
        assert_same(actual, expected)

    loss = model.loss(text_logits, image_logits, text, codes).total
    expected_loss = peer(text, codes, return_loss=True)
    # Our losses are taken in fp32 whatever the model's precision.
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)

    loss.backward()
    expected_loss.backward()
    own = dict(model.named_parameters())
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters() if not name.startswith("vae.")}
    theirs = {name: gradient for name, gradient in theirs.items() if gradient is not None}
    expected = from_dalle_pytorch(theirs, {}, config=model.config.to_dict()).weights
    assert own.keys() <= expected.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_codes(peer_package, tmp_path, options):
    peer, hparams = build(peer_package, **options)
    model = through_checkpoint(peer, hparams, tmp_path)
    peer.vae.decode = lambda codes: codes  # hand out the codes instead of a picture
    text, _ = batch()
    expected = peer.generate_images(text, filter_thres=1.0)  # keeps one token
    drawn = sample_codes(model, text, seeds=[1, 2, 3], options=SamplingOptions(temperature=0))
    assert torch.equal(drawn.codes, expected)
    assert len(set(expected.flatten().tolist())) > 2  # not a constant picture


@torch.no_grad()
@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])
def test_guidance(peer_package, tmp_path, cond_scale):
    peer, hparams = build(peer_package, **FOUR)
    model = through_checkpoint(peer, hparams, tmp_path)
    text, codes = batch()
    conditional, null = (model(part, codes)[1] for part in (text, torch.zeros_like(text)))
    # The peer blanks the captions it is given in place, hence the copies.
    expected = split(peer.forward_with_cond_scale(text.clone(), codes, cond_scale=cond_scale))[1]
    scales = torch.full((len(text), 1, 1), cond_scale, dtype=torch.double)
    assert_same(guided(torch.cat([conditional, null]), scales), expected)

    greedy = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(codes.shape[1]):
        logits = peer.forward_with_cond_scale(text[:1].clone(), greedy, cond_scale=cond_scale)
        greedy = torch.cat([greedy, split(logits)[1][:, -1:].argmax(-1)], dim=1)
    drawn = sample_codes(model, text[0], seeds=[5], options=SamplingOptions(temperature=0, cond_scale=cond_scale))
    assert torch.equal(drawn.codes, greedy)


def test_options_an_old_file_lacks_are_seen_from_its_weights(peer_package, tmp_path):
    options = ("rotary_emb", "shift_tokens", "share_input_output_emb")
    peer, hparams = build(peer_package, **dict.fromkeys(options, True))
    for name in options:
        del hparams[name]
    config = through_checkpoint(peer, hparams, tmp_path).config
    assert config.rotary and config.shift_tokens and config.tie_embeddings
    with pytest.raises(UserError, match="'reversible'"):
        through_checkpoint(*build(peer_package, reversible=True), tmp_path)
