"""The DALL-E: its loss by hand, its heads in parts, its options, and the frozen VQGAN in front of it."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import randomised
from torch import nn

from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.soft_codes import SoftCodes
from models.transformer import layer_scale_init
from utils.errors import UserError

TINY = DalleConfig(
    num_text_tokens=9, num_image_tokens=7, text_seq_len=4, grid=2, dim=16, depth=2, heads=2, dim_head=8,
    attn_types=("full", "axial_row"),
)  # fmt: skip
TEXT = torch.tensor([[3, 8, 0, 0], [1, 5, 7, 2], [0, 0, 0, 0]])
CODES = torch.tensor([[4, 0, 6, 1], [1, 2, 5, 3], [0, 0, 6, 6]])


def random_model(**options):
    return randomised(DalleModel(dataclasses.replace(TINY, **options)), seed=7)


def test_each_pad_has_its_positions_id_and_bos_comes_first():
    assert (TINY.text_len, TINY.image_seq_len, TINY.seq_len, TINY.text_table_size) == (5, 4, 8, 13)
    assert random_model().text_part(TEXT).tolist() == [[0, 3, 8, 11, 12], [0, 1, 5, 7, 2], [0, 9, 10, 11, 12]]
    bare = random_model(bos=False, unique_pads=False)
    assert (bare.config.text_len, bare.config.seq_len, bare.config.text_table_size) == (4, 7, 9)
    assert torch.equal(bare.text_part(TEXT), TEXT)


@pytest.mark.parametrize("options", [{}, {"bos": False, "unique_pads": False}, {"loss_img_weight": 0.5}], ids=str)
def test_loss_by_hand(options):
    model = random_model(**options)
    config = model.config
    text_logits, image_logits = model(TEXT, CODES)
    assert text_logits.shape == (3, config.text_len - 1, config.text_table_size) and image_logits.shape == (3, 4, 7)
    losses = model.loss(text_logits, image_logits, TEXT, CODES)

    def nats(row, target):
        row = row.tolist()
        return math.log(sum(math.exp(value) for value in row)) - row[target]

    text_sum = image_sum = 0.0
    for sample in range(3):
        targets = TEXT[sample].tolist()
        if config.unique_pads:
            targets = [token or 9 + position for position, token in enumerate(targets)]
        targets = targets if config.bos else targets[1:]  # without <bos> nothing predicts the first token
        assert len(targets) == text_logits.shape[1]
        text_sum += sum(nats(text_logits[sample, i], target) for i, target in enumerate(targets))
        image_sum += sum(nats(image_logits[sample, i], code) for i, code in enumerate(CODES[sample].tolist()))
    text_mean, image_mean, weight = text_sum / (3 * text_logits.shape[1]), image_sum / 12, config.loss_img_weight
    total = (text_mean + weight * image_mean) / (weight + 1)
    assert [loss.item() for loss in losses] == pytest.approx([total, text_mean, image_mean], rel=1e-5)


def test_heads_in_parts_equal_one_masked_head():
    model = random_model().double()
    losses = model.loss(*model(TEXT, CODES), TEXT, CODES)
    gradients = torch.autograd.grad(losses.total, list(model.parameters()))

    x = torch.cat([model.embed_text(model.text_part(TEXT)), model.embed_codes(CODES[:, :-1])], dim=1)
    hidden = model.hidden(model.transformer(x))
    weight = torch.cat([model.text_head.weight, model.image_head.weight])
    logits = F.linear(hidden, weight, torch.cat([model.text_head.bias, model.image_head.bias]))  # (B, L, V + T + C)
    is_text_position = torch.arange(TINY.seq_len)[:, None] < TINY.text_seq_len
    is_text_id = torch.arange(len(weight)) < TINY.text_table_size
    logits = logits.masked_fill(is_text_position != is_text_id, torch.finfo(logits.dtype).min)
    targets = torch.cat([model.text_part(TEXT)[:, 1:], CODES + TINY.text_table_size], dim=1)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    text, image = nats[:, : TINY.text_seq_len].mean(), nats[:, TINY.text_seq_len :].mean()
    total = (text + TINY.loss_img_weight * image) / (TINY.loss_img_weight + 1)

    for actual, expected in zip(losses, (total, text, image)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    for actual, expected in zip(gradients, torch.autograd.grad(total, list(model.parameters()))):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_loss_of_half_precision_logits_is_taken_in_single():
    model = random_model()
    text_logits, image_logits = (logits * 20 for logits in model(TEXT, CODES))
    exact = model.loss(text_logits.bfloat16().float(), image_logits.bfloat16().float(), TEXT, CODES)
    losses = model.loss(text_logits.bfloat16(), image_logits.bfloat16(), TEXT, CODES)
    assert losses.total.dtype == torch.float32 and torch.equal(losses.total, exact.total)


@pytest.mark.parametrize("text_seq_len, bos", [(4, True), (1, False)])
def test_z_loss_and_label_smoothing_are_in_the_total_in_training_alone(text_seq_len, bos):
    model = random_model(text_seq_len=text_seq_len, bos=bos, z_loss=0.1, label_smoothing=0.2).train()
    text = TEXT[:, :text_seq_len]
    logits = model(text, CODES)
    losses, plain = model.loss(*logits, text, CODES), model.eval().loss(*logits, text, CODES)
    smoothed = torch.nn.functional.cross_entropy(logits[1].flatten(0, 1), CODES.flatten(), label_smoothing=0.2)
    squares = [part.exp().sum(-1).log().square() for part in logits]
    expected = smoothed + 0.1 * squares[1].mean()
    if text_seq_len > 1:
        expected = (plain.text + 0.1 * squares[0].mean() + 7 * expected) / 8
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6) and losses[1:] == plain[1:]


def test_soft_codes_are_drawn_from_the_nearest_and_spread_over_them():
    """Held to a definition over all codes, whose tails beyond the 16 nearest are next to nothing here."""
    torch.manual_seed(0)
    codebook = torch.randn(40, 3) * torch.linspace(1, 3, 40)[:, None]
    squares = (codebook[:, None] - codebook).square().sum(-1)
    unit = squares.masked_fill(torch.eye(40, dtype=torch.bool), torch.inf).amin(1).mean()
    expected = (-squares / (0.5 * unit)).softmax(-1)
    soft, codes = SoftCodes(codebook, 0.5), torch.arange(40).view(2, 20)
    logits = torch.randn(2, 20, 40)
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected)
    assert soft.cross_entropy(logits.log_softmax(-1), codes).item() == pytest.approx(cross_entropy.item(), rel=1e-3)
    drawn = torch.stack([soft.sample(codes) for _ in range(4000)]).view(4000, 40)
    shares = torch.nn.functional.one_hot(drawn, 40).float().mean(0)  # of each code, the codes in its place
    assert (shares - expected).abs().max() < 0.04 and 0.2 < expected.diagonal().mean() < 0.9
    assert torch.equal(SoftCodes(codebook, 1e-60).sample(codes), codes)
    same = SoftCodes(torch.ones(5, 3), 1.0)  # a codebook that has collapsed
    loss = same.cross_entropy(logits[..., :5].log_softmax(-1), codes % 5)
    assert same.sample(codes % 5).amax() < 5 and torch.isfinite(loss)


def test_soft_codes_are_for_training_alone():
    soft = SoftCodes(torch.randn(TINY.num_image_tokens, 3), 2.0)
    model = TextToImage(random_model(), soft=soft)
    torch.manual_seed(1)
    learned, measured = model.train()(TEXT, CODES), model.eval()(TEXT, CODES)
    assert measured == TextToImage(model.dalle).eval()(TEXT, CODES)
    torch.manual_seed(1)
    image_loss = soft.cross_entropy(model.dalle(TEXT, soft.sample(CODES))[1].log_softmax(-1), CODES)
    assert learned.total.item() == pytest.approx((learned.text + 7 * image_loss).item() / 8, rel=1e-5)


def test_layer_scale_starts_where_its_paper_says_and_the_rest_normally():
    assert [layer_scale_init(layer) for layer in (0, 17, 18, 23, 24, 60)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6, 1e-6]
    model = DalleModel(dataclasses.replace(TINY, depth=19))
    scales = [model.transformer.layers[layer].attention.scale.detach() for layer in (17, 18)]
    assert [float(scale.mean()) for scale in scales] == pytest.approx([0.1, 1e-5])
    torch.manual_seed(0)
    model = DalleModel(dataclasses.replace(TINY, dim=64, init_std=0.02, image_positions="learned", qkv_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name and "scale" not in name:
            assert 0.015 < parameter.std().item() < 0.025, name


def test_codes_start_from_the_codebook():
    """As large as they were, and alike where the codebook's are."""
    torch.manual_seed(0)
    model = DalleModel(dataclasses.replace(TINY, dim=64, num_image_tokens=13, init_std=0.1))
    codebook = torch.randn(13, 6)
    codebook[3] = codebook[7]
    before = [table.std().item() for table in (model.image_emb.weight, model.image_head.weight)]
    model.start_from(codebook)
    for table, std in zip((model.image_emb.weight, model.image_head.weight), before):
        assert torch.equal(table[3], table[7]) and table.std().item() == pytest.approx(std, rel=1e-3)
        likeness = torch.corrcoef(table)[0, 1:], torch.corrcoef((codebook - codebook.mean(0)) / codebook.std(0))[0, 1:]
        assert torch.corrcoef(torch.stack(likeness))[0, 1] > 0.8


def test_image_positions_and_tied_tables():
    axial = random_model().image_pos_emb
    for position in range(4):
        row, column = divmod(position, 2)
        assert torch.equal(axial.table()[position], axial.rows[row, 0] + axial.columns[0, column])
    assert random_model(image_positions="learned").image_pos_emb.table().shape == (4, 16)
    bare = random_model(image_positions="none", text_positions=False)
    assert bare.image_pos_emb is None and bare.text_pos_emb is None
    assert torch.equal(bare.embed_codes(CODES), bare.image_emb(CODES))
    tied = random_model(tie_embeddings=True)
    tied.load_state_dict(random_model(tie_embeddings=True).state_dict())
    assert tied.text_emb.weight is tied.text_head.weight and tied.image_emb.weight is tied.image_head.weight


def test_layers_with_one_id_are_one_layer():
    layers = random_model(depth=4, attn_types=("full",), shared_attn_ids=(5, 6), shared_ff_ids=(0,)).transformer.layers
    assert layers[0].attention.fn is layers[2].attention.fn and layers[1].attention.fn is layers[3].attention.fn
    assert layers[0].attention.fn is not layers[1].attention.fn
    assert len({id(layer.feed_forward.fn) for layer in layers}) == 1
    assert len({id(layer.attention.norm) for layer in layers}) == 4  # norms and scales stay apart
    with pytest.raises(UserError, match=r"share attention 0 \(shared_attn_ids\) have different patterns"):
        dataclasses.replace(TINY, shared_attn_ids=(0,))


def test_dropout_acts_in_training_only():
    model = random_model(attn_dropout=0.5, ff_dropout=0.5)
    assert torch.equal(model(TEXT, CODES)[1], random_model()(TEXT, CODES)[1])
    model.train()
    assert not torch.equal(model(TEXT, CODES)[1], model(TEXT, CODES)[1])


def test_values_are_mixed_with_the_first_layers():
    model, plain = random_model(depth=3, value_residual=True), random_model(depth=3)
    layers = model.transformer.layers
    mixes = [layer.attention.fn.value_mix for layer in layers]
    assert mixes[0] is None and [mix.shape for mix in mixes[1:]] == [(1,), (1,)]
    plain.load_state_dict(model.state_dict(), strict=False)
    inner = TINY.heads * TINY.dim_head
    with torch.no_grad():
        expected = plain(TEXT, CODES)[1]
        for mix in mixes[1:]:
            mix.zero_()
        torch.testing.assert_close(model(TEXT, CODES)[1], expected)
        mixes[2].fill_(1)  # all values are the first layer's: the last layer's own do not count
        of_first = model(TEXT, CODES)[1]
        layers[2].attention.fn.qkv.weight[2 * inner :].normal_()
        torch.testing.assert_close(model(TEXT, CODES)[1], of_first)
        assert not torch.allclose(of_first, expected)
        x, last = torch.randn(2, TINY.seq_len, TINY.dim), layers[2]
        values = layers[0](x, model.transformer.context(0))[1]
        torch.testing.assert_close(values, layers[0].attention.fn.qkv(layers[0].attention.norm(x))[..., 2 * inner :])
        mixes[2].fill_(0.25)
        mixed = last(x, model.transformer.context(2), values=values)[0]
        own = last.attention.fn.qkv(last.attention.norm(x))[..., 2 * inner :]
        mixes[2].fill_(1)
        torch.testing.assert_close(last(x, model.transformer.context(2), values=0.75 * own + 0.25 * values)[0], mixed)


@pytest.mark.parametrize("values, message", [
    ({"depth": 0}, "depth must be at least 1, not 0"), ({"attn_types": ()}, "attn_types names no attention pattern"),
    ({"attn_types": ("axial_rows",)}, "'axial_rows' in attn_types. Did you mean 'axial_row'"),
    ({"activation": "relu"}, "activation 'relu'"), ({"activation": "tanh"}, "known: geglu, swiglu"),
    ({"norm": "batch"}, "known: layer, rms"), ({"rotary_2d": True, "rotary": True}, "excludes rotary"),
    ({"rotary_2d": True, "dim_head": 6}, "divisible by 4"), ({"image_positions": "polar"}, "image_positions 'polar'"),
    ({"shift_tokens": True, "dim": 18}, "divisible by 4, not 18"),
    ({"dept": 3}, "unknown model option 'dept'. Did you mean 'depth'"),
    ({"heads": None}, "heads"),  # missing
])
def test_impossible_configurations_are_named(values, message):
    with pytest.raises(UserError) as caught:
        DalleConfig.from_dict({key: value for key, value in {**TINY.to_dict(), **values}.items() if value is not None})
    assert message in str(caught.value)


class Brightness(nn.Module):
    """Stands in for a VQGAN: the code of a quadrant is how bright it is. Notes whether it was run in training mode."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(6.0))
        self.dropout = nn.Dropout(0.5)

    def encode(self, pixels):
        assert pixels.dtype == torch.float32 and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
        means = F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(1)
        return (self.dropout(means) * self.gain).round().long()


def images():
    """Quadrants of one brightness each, (3, 3, 8, 8)."""
    torch.manual_seed(2)
    colours = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8).repeat(1, 3, 1, 1)
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_images_and_their_codes_train_alike():
    model = TextToImage(random_model(), Brightness()).train()
    pixels = images()
    codes = model.codes(pixels)
    assert codes.shape == (3, 4) and len(codes.unique()) > 3
    assert torch.equal(codes, (pixels[:, 0, ::4, ::4].flatten(1).float() / 255 * 6).round().long())
    losses = [model(TEXT, given) for given in (pixels, pixels.float() / 255, codes)]
    losses.append(model.dalle.loss(*model.dalle(TEXT, codes), TEXT, codes))
    assert all(torch.equal(losses[0].total, other.total) for other in losses[1:])


def test_the_vqgan_is_frozen_and_stays_in_eval_mode():
    vqgan = Brightness()
    model = TextToImage(random_model(), vqgan)
    for module in (model.train(), model.eval(), model.train(True)):
        assert module is model and not vqgan.training and not vqgan.dropout.training
    assert model.dalle.training and not vqgan.gain.requires_grad
    model(TEXT, images()).total.backward()
    assert vqgan.gain.grad is None and all(parameter.grad is not None for parameter in model.dalle.parameters())
    model = TextToImage(random_model())  # codes need no VQGAN, and images do
    assert torch.isfinite(model(TEXT, CODES).total)
    with pytest.raises(ValueError, match="no VQGAN"):
        model(TEXT, images())


@pytest.mark.parametrize("per_image", [False, True])
def test_each_image_may_have_its_own_share_of_wrong_codes(per_image):
    torch.manual_seed(0)
    model = TextToImage(DalleModel(TINY), None, 0.3, per_image)
    wrong = (model._add_code_noise(torch.full((4000, 100), 7)) != 7).float().mean(dim=1)
    assert wrong.mean().item() == pytest.approx(0.3, abs=0.02)
    assert wrong.std().item() == pytest.approx(0.6 / 12**0.5 if per_image else 0.3 / 6, abs=0.02)


def test_some_input_codes_are_those_of_a_similar_image():
    """In 0.7 of the images a share from 0 to 1; targets stay, and validation sees none of them."""
    torch.manual_seed(0)
    model = TextToImage(DalleModel(TINY), noise_similar=0.7)
    codes, similar = torch.full((4000, 100), 7), torch.full((4000, 100), 5)
    wrong = (model._add_code_noise(codes, similar) == 5).float().mean(dim=1)
    assert (wrong > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert wrong[wrong > 0].mean().item() == pytest.approx(0.5, abs=0.02)
    both = torch.stack([CODES, CODES.flip(1)], dim=1)
    assert torch.equal(model.eval()(TEXT, both).total, model(TEXT, CODES).total)
    model.train()
    assert len({model(TEXT, both).total.item() for _ in range(20)}) > 1
