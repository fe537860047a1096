"""The VQGAN: published names and shapes, the arithmetic, and what its files may and may not hold."""
from __future__ import annotations

import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import refused, tiny_vqgan
from safetensors.torch import save_file

from checkpoints.vqgan import PUBLISHED, default_vqgan, load_vqgan
from models.vqgan import VQGAN, VqganConfig
from models.vqgan_codebook import CodebookUpkeep
from models.vqgan_layers import Downsample, ResidualBlock, SpatialAttention, Upsample, fold_patches
from utils.errors import UserError
from utils.files import sha256_file

TINY = tiny_vqgan(resolution=32, ch_mult=(1, 2), attn_resolutions=(16,))
TINY_GUMBEL = tiny_vqgan(resolution=32, ch_mult=(1, 1, 2), variant="gumbel")


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = VQGAN(config).eval()
    with torch.no_grad():  # codes far apart, so that rounding decides nothing
        model.quantize.codebook.normal_()
    return model


def meta_state(config):
    """Names and shapes alone. Drawing random weights that nobody sees would cost seconds, also on the meta device."""
    nothing = {name: lambda tensor, *_, **__: tensor for name in ("uniform_", "normal_", "kaiming_uniform_")}
    with mock.patch.multiple(torch.nn.init, **nothing), torch.device("meta"):
        return VQGAN(config).state_dict()


F16_SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.0.block.0.norm1.weight": (128,),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.4.block.0.conv1.weight": (512, 256, 3, 3), "encoder.down.4.attn.1.proj_out.bias": (512,),
    "encoder.mid.block_1.conv2.weight": (512, 512, 3, 3), "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.norm_out.weight": (512,), "encoder.conv_out.weight": (256, 512, 3, 3),
    "decoder.conv_in.weight": (512, 256, 3, 3), "decoder.up.4.attn.2.norm.weight": (512,),
    "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3), "decoder.up.0.block.2.conv2.bias": (128,),
    "decoder.norm_out.bias": (128,), "decoder.conv_out.weight": (3, 128, 3, 3), "post_quant_conv.bias": (256,),
    "quantize.embedding.weight": (1024, 256), "quant_conv.weight": (256, 256, 1, 1),
    "encoder.down.4.downsample.conv.weight": None, "decoder.up.0.upsample.conv.weight": None,
    "encoder.down.3.attn.0.q.weight": None,
}
GUMBEL_SHAPES = {
    "quantize.proj.weight": (8192, 256, 1, 1), "quantize.proj.bias": (8192,), "quantize.embed.weight": (8192, 256),
    "quantize.embedding.weight": None,
}


@pytest.mark.parametrize("name, grid, sizes, shapes", [
    ("f16-1024", (16, 16), (343, 72141699), F16_SHAPES), ("f16-16384", (16, 16), (343, 76073859), {}),
    ("gumbel-f8-8192", (8, 32), None, GUMBEL_SHAPES),
])
def test_published_names_and_shapes(name, grid, sizes, shapes):
    config = PUBLISHED[name].config
    state = {key: tuple(value.shape) for key, value in meta_state(config).items()}
    assert (config.downsampling, config.grid) == grid
    assert sizes in (None, (len(state), sum(torch.Size(shape).numel() for shape in state.values())))
    assert {key: state.get(key) for key in shapes} == shapes


def test_codes_are_the_nearest_entries_in_row_order_and_decoding_reads_them():
    model = tiny()
    pixels = torch.rand(2, 3, 32, 32)
    z = model.features(pixels)  # (2, D, g, g)
    vectors = z.permute(0, 2, 3, 1).reshape(2, -1, z.shape[1])
    distances = (vectors[:, :, None] - model.quantize.codebook).pow(2).sum(dim=-1)
    assert torch.equal(model.encode(pixels), distances.argmin(dim=-1))
    codes = torch.randint(16, (1, 256))
    z = model.quantize.codebook[codes[0]].t().reshape(1, 8, 16, 16)
    assert torch.equal(model.decode(codes), ((model.decoder(model.post_quant_conv(z)) + 1) / 2).clamp(0, 1))
    refused("square", model.decode, codes[:, :255], kind=ValueError)


def test_gumbel_codes_are_the_largest_logits_without_noise():
    model = tiny(TINY_GUMBEL)
    pixels = torch.rand(1, 3, 32, 32)
    z = model.features(pixels)[0]  # (D, g, g)
    logits = torch.einsum("kd,dhw->hwk", model.quantize.proj.weight[:, :, 0, 0], z) + model.quantize.proj.bias
    for _ in range(2):
        assert torch.equal(model.encode(pixels)[0], logits.argmax(dim=-1).flatten())


def test_attention_and_residual_blocks_equal_their_formulas():
    torch.manual_seed(1)
    block = SpatialAttention(8, TINY)
    x = torch.randn(2, 8, 3, 5)
    h = F.group_norm(x, 4, eps=1e-6)
    q, k, v = (F.conv2d(h, getattr(block, n).weight, getattr(block, n).bias).reshape(2, 8, 15) for n in "qkv")
    out = torch.empty_like(v)
    for b in range(2):
        for i in range(15):
            weights = torch.softmax((k[b] * q[b][:, i : i + 1]).sum(dim=0) * 8**-0.5, dim=0)
            out[b, :, i] = (v[b] * weights).sum(dim=1)
    expected = x + F.conv2d(out.reshape(2, 8, 3, 5), block.proj_out.weight, block.proj_out.bias)
    assert torch.allclose(block(x), expected, atol=1e-5)
    torch.manual_seed(2)
    block = ResidualBlock(8, 16, TINY)
    x = torch.randn(1, 8, 6, 6)

    def swish(t):
        return t * torch.sigmoid(t)

    h = F.conv2d(swish(F.group_norm(x, 4, eps=1e-6)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv2d(swish(F.group_norm(h, 4, eps=1e-6)), block.conv2.weight, block.conv2.bias, padding=1)
    expected = F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias) + h
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_downsampling_pads_below_and_right_only_and_upsampling_repeats_before_it_convolves():
    down, up = Downsample(1), Upsample(1)
    with torch.no_grad():
        for parameter in (*down.parameters(), *up.parameters()):
            parameter.zero_()
        down.conv.weight.fill_(1.0)
        up.conv.weight[0, 0, 1, 1] = 1.0
    # Windows start at rows and columns 0 and 2; the last ones hang over the edge by one zero.
    assert down(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist() == [
        0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11, 8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15,
    ]
    assert up(torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


def test_patches_are_folded_as_by_pixel_unshuffle_and_keep_the_grid_contract():
    x, config = torch.randn(2, 3, 8, 12), replace(TINY, attn_resolutions=(), patch_size=4)
    assert torch.equal(fold_patches(x, 4), F.pixel_unshuffle(x, 4))
    model = tiny(config)
    assert (config.downsampling, model.grid) == (8, 4)
    assert model.decode(model.encode(torch.rand(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_straight_through_gradient():
    model = tiny().train()
    z = model.features(torch.rand(2, 3, 32, 32)).detach().requires_grad_()
    quantised, loss, codes = model.quantize(z)
    entries = model.quantize.codebook[codes].transpose(1, 2).reshape(z.shape)
    assert torch.allclose(quantised, entries, atol=1e-6)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((quantised * upstream).sum(), z)
    assert torch.equal(gradient, upstream)
    # Codebook loss moves entries (weight 1), commitment moves features (weight 0.25).
    to_features, to_entries = torch.autograd.grad(model.quantize(z)[1], [z, model.quantize.codebook])
    assert torch.allclose(to_features, 0.25 * 2 * (z - entries).detach() / z.numel(), atol=1e-7)
    assert to_entries.abs().sum().item() > 0
    assert loss.item() == pytest.approx(1.25 * (z - entries).pow(2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_GUMBEL])
def test_encode_and_decode_shapes_and_a_training_pass_reaches_every_parameter(config):
    model = tiny(config)
    codes = model.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, config.grid**2) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < config.num_codes
    pixels = model.decode(codes).detach()
    assert pixels.shape == (2, 3, 32, 32) and 0.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0
    assert (model.grid, model.num_codes, model.image_size) == (config.grid, 16, 32)
    output = model.train()(torch.rand(2, 3, 32, 32))
    (output.reconstruction.pow(2).mean() + output.codebook_loss).backward()
    # A constant added to every key changes no softmax: that bias has a gradient of zero, but it has one.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert output.codes.shape == (2, config.grid**2)


def write(folder, model, document=None, suffix=".ckpt"):
    weights, config = folder / ("w" + suffix), folder / "c.yaml"
    if suffix == ".safetensors":
        save_file(model.state_dict(), str(weights))
    else:
        torch.save({"state_dict": model.state_dict()} if document is None else document, str(weights))
    model.config.to_yaml(config)
    return weights, config


@pytest.mark.parametrize("config", [TINY, TINY_GUMBEL])
def test_round_trip(tmp_path, config):
    model, pixels, codes = tiny(config), torch.rand(2, 3, 32, 32), torch.randint(16, (2, config.grid**2))
    for suffix in (".ckpt", ".safetensors"):
        weights, yaml_path = write(tmp_path, model, suffix=suffix)
        loaded = load_vqgan(weights, yaml_path)
        assert torch.equal(loaded.encode(pixels), model.encode(pixels))
        assert torch.allclose(loaded.decode(codes), model.decode(codes), atol=1e-5)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.identity == sha256_file(weights)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def averages(weights, prefix=""):
    """What latent diffusion's LitEma keeps of weights."""
    copies = {name.replace(".", ""): value for name, value in weights.items()}
    return prefixed(dict(copies, decay=torch.tensor(0.9), num_updates=torch.tensor(3)), prefix + "model_ema.")


def changed(weights, by):
    return {name: value + by for name, value in weights.items()}


LOSSES = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
ABOVE = {"model.diffusion_model.out.weight": torch.zeros(2), "model_ema.diffusion_modeloutweight": torch.zeros(2)}
BROUGHT = {
    "losses": lambda own: {**own, **LOSSES}, "data parallel": lambda own: prefixed({**own, **LOSSES}, "module."),
    "compiled": lambda own: prefixed(own, "_orig_mod."),
    "latent diffusion": lambda own: {**prefixed({**own, **LOSSES}, "first_stage_model."), **ABOVE},
    "minDALL-E": lambda own: {**prefixed(own, "stage1."), "stage2.ln_f.bias": torch.zeros(2)},
    "averages": lambda own: {**changed(own, 1), **averages(own), **LOSSES},
    "averages of the first stage": lambda own: {
        **prefixed(changed(own, 1), "first_stage_model."), **averages(own, "first_stage_model."), **ABOVE,
    },
    "incomplete averages": lambda own: {**own, "model_ema.quant_convbias": torch.zeros(8)},
    "half precision": lambda own: {name: value.half() for name, value in own.items()},
}


@pytest.mark.parametrize("brought", BROUGHT)
def test_weights_are_found_in_what_users_bring(brought, tmp_path, caplog):
    caplog.set_level("INFO")
    model = tiny().half().float()
    weights, config = write(tmp_path, model, {"state_dict": BROUGHT[brought](model.state_dict()), "epoch": 3})
    loaded = load_vqgan(weights, config)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert [record.levelname for record in caplog.records if "model_ema" in record.getMessage()] == {
        "averages": ["INFO"], "averages of the first stage": ["INFO"], "incomplete averages": ["WARNING"],
    }.get(brought, [])


def test_target_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    document, path = TINY.to_dict(), tmp_path / "c.yaml"
    document["model"]["target"] = "evil_module.VQModel"
    path.write_text(yaml.safe_dump(document))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert VqganConfig.from_yaml(path) == TINY and "evil_module" not in sys.modules
    path.write_text("model: !!python/object/apply:os.mkdir ['{}']\n".format(tmp_path / "trap"))
    refused("not valid YAML", VqganConfig.from_yaml, path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("config", [*list(p.config for p in PUBLISHED.values()), TINY, TINY_GUMBEL])
def test_configuration_round_trip(tmp_path, config):
    config.to_yaml(tmp_path / "c.yaml")
    assert VqganConfig.from_yaml(tmp_path / "c.yaml") == config


DDCONFIG = """{double_z: false, z_channels: 256, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
          ch_mult: [1, 1, 2, 2, 4], num_res_blocks: 2, attn_resolutions: [16], dropout: 0.0%s}"""
LDM_YAML = f"""
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    timesteps: 1000
    first_stage_config:
      target: ldm.models.autoencoder.VQModelInterface
      params:
        embed_dim: 256
        n_embed: 1024
        ddconfig: {DDCONFIG % ", attn_type: vanilla"}
        lossconfig: {{target: torch.nn.Identity}}
    cond_stage_config: __is_unconditional__
"""
TAMING_YAML = f"""
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 1024
    ddconfig: {DDCONFIG % ""}
    lossconfig: {{target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator, params: {{disc_start: 0}}}}
"""


@pytest.mark.parametrize("text", [TAMING_YAML, TAMING_YAML.replace("VQModel", "VQModelInterface"), LDM_YAML])
def test_published_yaml_is_read(text):
    assert VqganConfig.from_dict(yaml.safe_load(text)) == PUBLISHED["f16-1024"].config


@pytest.mark.parametrize("section, change, words", [
    ("model", {"target": "some.AutoencoderKL"}, "model.target 'some.AutoencoderKL' ends in none of VQModel, "),
    ("model", {"params": None}, "params"), ("params", {"n_embed": None}, "n_embed"),
    ("params", {"remap": "map.npy"}, "model.params.remap renumbers the codes"),
    ("params", {"first_stage_config": {"target": "x.AutoencoderKL"}}, "params.first_stage_config.target 'x.Auto"),
    ("ddconfig", {"ch_mult": None}, "ch_mult"), ("ddconfig", {"ch_mult": 3}, "ch_mult"),
    ("ddconfig", {"ch": "wide"}, "ch must be"), ("ddconfig", {"resolution": 33}, "resolution 33"),
    ("ddconfig", {"num_groups": 3}, "num_groups"), ("ddconfig", {"double_z": True}, "double_z"),
    ("ddconfig", {"attn_type": "linear"}, "ddconfig.attn_type can only be vanilla, not 'linear'"),
    ("ddconfig", {"tanh_out": True}, "ddconfig.tanh_out can only be False, not True"),
    ("ddconfig", {"in_channels": 1, "out_ch": 1}, "in_channels 1, out_ch 1: only models of colour images"),
    ("ddconfig", {"out_ch": 4}, "in_channels 3, out_ch 4: only models of colour images"),
    ("ddconfig", {"in_channels": 3.0}, "in_channels must be a positive whole number"),
])
def test_bad_configurations_are_named(section, change, words):
    document = TINY.to_dict()
    params = document["model"]["params"]
    {"model": document["model"], "params": params, "ddconfig": params["ddconfig"]}[section].update(change)
    assert "c.yaml" in refused(words, VqganConfig.from_dict, document, "c.yaml")


def test_files_that_do_not_fit_are_named(tmp_path):
    model = tiny()
    state = model.state_dict()
    missing = {name: value for name, value in state.items() if name != "quant_conv.bias"}
    for document, words in (
        (missing, "'quant_conv.bias' is missing"), (dict(state, extra=torch.zeros(1)), "'extra' is unexpected"),
        (dict(missing, **{"quant_conv.bias": torch.zeros(9)}), "'quant_conv.bias' has shape"),
        ({"epoch": 1}, "no named tensors"), ([1, 2], "no named tensors"),
    ):
        weights, config = write(tmp_path, model, document)
        assert str(weights) in refused(words, load_vqgan, weights, config)
    for name in ("broken.ckpt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not a file")
        refused("broken", load_vqgan, tmp_path / name, config)
    absent = tmp_path / "absent.ckpt"
    refused("--vqgan-model-path: checkpoint .*absent.ckpt does not exist", load_vqgan, absent, config)
    refused("cannot be read", load_vqgan, weights, tmp_path / "absent.yaml")


def test_failed_download_says_what_to_fetch(tmp_path, monkeypatch):
    def download(url, path, **_):
        raise UserError(f"cannot download {url}: no route to host; fetch it by hand and save it as {path}")

    monkeypatch.setattr("utils.downloads.download", download)
    published = PUBLISHED["f16-1024"]
    weights, config = tmp_path / published.weights_name, tmp_path / published.config_name
    assert refused("", default_vqgan, tmp_path) == (
        f"cannot download {published.config_url}: no route to host; fetch it by hand and save it as {config}, likewise "
        f"{published.weights_url} as {weights}; or give --vqgan-model-path and --vqgan-config-path"
    )
    for path in (config, weights):
        path.write_bytes(b"x")
    assert default_vqgan(tmp_path) == (weights, config)
    refused("f16-1024", default_vqgan, tmp_path, "f16-1025")


def test_codebook_averages_follow_their_features():
    model = tiny()
    upkeep = CodebookUpkeep(model, decay=0.5)
    centres = torch.randn(4, 8) * 5
    features = centres.repeat(8, 1)
    upkeep.initialise(features)
    for _ in range(30):
        upkeep.update(features, torch.cdist(features, model.quantize.codebook).argmin(dim=1))
    used = torch.unique(torch.cdist(features, model.quantize.codebook).argmin(dim=1))
    assert torch.cdist(centres, model.quantize.codebook[used]).min(dim=1).values.max() < 1e-3
    model = tiny()
    upkeep = CodebookUpkeep(model, decay=None, usage_decay=0.5)
    features = torch.randn(64, 8)
    for _ in range(10):
        upkeep.update(features, torch.zeros(64, dtype=torch.long))
    before = model.quantize.codebook.detach().clone()
    moved = upkeep.revive(features)
    assert sorted(moved.tolist()) == list(range(1, 16)) and torch.equal(model.quantize.codebook[0], before[0])
    assert (model.quantize.codebook[moved][:, None] == features[None]).all(dim=-1).any(dim=1).all()
    assert len(upkeep.revive(features)) == 0
    refused("variant vq", CodebookUpkeep, tiny(TINY_GUMBEL), kind=ValueError)


def test_what_is_computed_in_place_or_transposed_is_the_same():
    block = ResidualBlock(32, 32, VqganConfig(resolution=32))
    x = torch.randn(1, 32, 4, 4)
    before, with_gradient = x.clone(), block(x).detach()
    with torch.no_grad():
        assert torch.equal(block(x), with_gradient)
    assert torch.equal(x, before)
    upsample = Upsample(5).double()
    x, results = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True), []
    for doubled in (upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))):
        results.append((doubled, *torch.autograd.grad(doubled.square().sum(), (x, *upsample.parameters()))))
    for own, plain in zip(*results):
        torch.testing.assert_close(own, plain)
