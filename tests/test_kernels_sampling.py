"""Kernels for drawing: they compute what PyTorch does, whatever the sizes, and are left out where they cannot."""
from __future__ import annotations

import copy

import pytest
import torch
from test_sampling import OPTIONS, TEXT, choice_for, decode, random_codes, random_model, sample

import ops
from models.positions import Positions
from models.quantization import Int8Linear
from ops import build, rows
from ops.rows import Packed, read_all
from sampling import SamplingOptions, decoders, sample_codes
from sampling.decoders import Decoder
from sampling.native import NativeDecoder, best_decoder

KERNELS = pytest.mark.skipif(rows.functions() is None, reason="there is no C compiler, or DALLE_KERNELS=off")
#: What the configurations of test_sampling.py leave out: widths of vectors and more, whole and odd ones.
WIDE = {
    "wide heads": {"dim_head": 64, "heads": 3, "dim": 40, "attn_types": ("full", "axial_col"), "sandwich_norm": True},
    "odd": {"dim_head": 21, "heads": 3, "dim": 37, "activation": "quick_gelu", "out_bias": False, "ff_bias": False},
    "long": {"dim_head": 40, "dim": 200, "attn_types": ("conv_like", "axial_row"), "shift_tokens": True},
}


@pytest.fixture
def threads(monkeypatch):
    """Set how many threads there are. However little there is to do, all of them take part."""
    before = torch.get_num_threads()
    monkeypatch.setattr(rows, "_GRAIN", 1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh():
    """What begins as a program does that has not asked for kernels yet, when called."""

    def forget():
        build.library.cache_clear()
        rows.functions.cache_clear()

    yield forget
    forget()


def random_floats(**options):
    return random_model(**options).float()


def steps(model, codes, images, first=0):
    """Logits after each code, fed one after the other, and what fed them."""
    count = torch.get_num_threads()
    decoder = best_decoder(model, len(codes) // images, images)[0]
    prompt = decoder.prompt

    def alone(text):  # what comes before is PyTorch's: on some CPUs its last bits depend on the threads
        torch.set_num_threads(1)
        hidden = prompt(text)
        if not first:
            torch.set_num_threads(count)
        return hidden

    feed = decoder.feed

    def fed(own, positions):
        hidden = feed(own, positions)
        torch.set_num_threads(count)
        return hidden

    decoder.prompt, decoder.feed = alone, fed
    return decode(decoder, TEXT[: len(codes) // images], codes, first)[1:], decoder


def packed(layer):
    return Packed(layer.weight.detach(), layer.bias, getattr(layer, "scale", None))


# ---- products


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("depth, outputs", [(1, 1), (7, 5), (24, 40), (65, 32), (130, 33), (200, 97)])
def test_products_of_all_sizes(depth, outputs, threads):
    torch.manual_seed(1)
    threads(1 + outputs % 2)
    for bias in (True, False):
        layer = torch.nn.Linear(depth, outputs, bias=bias)
        product = packed(layer)
        for count in [*range(1, 14), 16, 25, 37, 48]:
            x = torch.randn(count, depth)
            torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(product(x)[:1], product(x[:1]))  # to the bit, however many rows there are


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("depth, outputs", [(1, 1), (7, 5), (65, 40), (130, 33), (600, 97)])
def test_int8_products_of_all_sizes(depth, outputs, threads):
    torch.manual_seed(1)
    threads(1 + outputs % 2)
    for bias in (torch.randn(outputs), None):
        layer = Int8Linear(torch.randn(outputs, depth), bias)
        product = packed(layer)
        for count in [*range(1, 14), 16, 25, 37]:
            x = torch.randn(count, depth)
            torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-4)
            assert torch.equal(product(x)[:1], product(x[:1]))


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("activation", ["geglu", "gelu"])
def test_int8_steps_give_what_pytorch_gives(activation, threads):
    threads(2)
    model = random_floats(activation=activation)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child.weight, child.bias))
    codes = random_codes(3)
    found, step = steps(model, codes, 3)
    assert type(step) is NativeDecoder and sum(own.scale is not None for own in step.copies.weights.values()) > 3
    with ops.use("reference"):
        expected, step = steps(model, codes, 3)
    assert type(step) is Decoder
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@KERNELS
@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_row_and_its_column():
    layer = torch.nn.Linear(50, 40)
    layer.weight[7, 3] = float("inf")
    x = torch.ones(14, 50)
    x[5, 20] = float("nan")
    x[9, 3] = 0
    expected = layer(x)
    assert expected[5].isnan().all() and expected[9, 7].isnan() and expected[0, 7].isinf()
    torch.testing.assert_close(packed(layer)(x), expected, equal_nan=True)


# ---- the step


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("images, first, count", [(1, 13, 1), (3, 0, 1), (7, 25, 2)])
@pytest.mark.parametrize("options", [*OPTIONS.values(), *WIDE.values()], ids=[*OPTIONS, *WIDE])
def test_steps_give_the_logits_of_the_whole_pass(options, images, first, count, threads):
    """In double precision: kernels may be little further from it than the floats of PyTorch's whole pass."""
    threads(count)
    exact, model = random_model(**options), random_floats(**options)
    codes, text = random_codes(2 * images), TEXT.repeat_interleave(images, 0)
    expected = exact(text, codes)[1][:, first + 1 :].transpose(0, 1)
    usual = (model(text, codes)[1][:, first + 1 :].transpose(0, 1) - expected).abs().max()
    found, step = steps(model, codes, images, first)
    assert type(step) is NativeDecoder and usual < 1e-3
    assert (found - expected).abs().max() < 3 * usual + 1e-6


@KERNELS
@torch.no_grad()
def test_neither_other_images_nor_threads_change_a_bit(threads):
    model = random_floats(**OPTIONS["all patterns"])
    codes = random_codes(17)
    together = steps(model, codes, 17)[0]
    assert torch.equal(steps(model, codes, 17)[0], together)
    assert torch.equal(steps(model, codes[4:7], 3)[0], together[:, 4:7])
    assert torch.equal(steps(model, codes[5:6], 1)[0], together[:, 5:6])  # whose keys lie elsewhere
    threads(2)
    assert torch.equal(steps(model, codes, 17)[0], together)


@KERNELS
@torch.no_grad()
def test_a_small_model_is_left_to_one_thread():
    """Threads that wait for each other cost more than they give, the more so where other programs run."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        small, large = (NativeDecoder(random_floats(**wide), 1, 1) for wide in ({}, {"dim": 200}))
        assert small.struct.threads == 1 and large.struct.threads == 2
    finally:
        torch.set_num_threads(before)


@KERNELS
@pytest.mark.parametrize("options", [OPTIONS["all patterns"], OPTIONS["mindalle"]], ids=["all patterns", "mindalle"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_images_are_sampled(options, count):
    model = random_floats(**options)
    drawing = SamplingOptions(top_k=9, top_p=0.9, temperature=1.2, cond_scale=1.5)
    given = random_codes(1)[0]
    given[4:] = -1
    found = sample_codes(model, TEXT, range(2 * count), drawing, given)
    with ops.use("reference"):
        expected = sample_codes(model, TEXT, range(2 * count), drawing, given)
    assert torch.equal(found.codes, expected.codes) and len(found.codes.unique()) > 5
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-3)


@KERNELS
@torch.no_grad()
def test_a_broken_weight_is_not_hidden():
    model = random_floats(activation="geglu", attn_types=("full",))
    model.image_emb.weight[3, 2] = float("nan")
    codes = random_codes(4).clamp(min=4)
    codes[2, 30] = 3
    found = steps(model, codes, 4)[0].isnan().all(-1)  # (35, 4)
    assert found[30:, 2].all() and found.sum() == 5


@KERNELS
@torch.no_grad()
def test_what_does_not_fit_is_refused():
    decoder = NativeDecoder(random_floats(), 2, 1)
    decoder.prompt(TEXT)
    for wrong in (20, -1):
        with pytest.raises(IndexError, match="a code is not in the table"):
            decoder.feed(torch.tensor([[1], [wrong]]), Positions(1, 0))
    for wrong in (36, -1):
        with pytest.raises(IndexError, match="a position is not in the table"):
            decoder.feed(torch.tensor([[1], [2]]), Positions(1, wrong))
    assert decoder.feed(torch.tensor([[1], [19]]), Positions(1, 0)).shape == (2, 1, 16)
    with pytest.raises(ValueError, match=r"codes \(3, 1\) for 2 rows"):
        decoder.feed(torch.tensor([[1], [2], [3]]), Positions(1, 0))


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_image_at_its_own_position(options):
    """One image is five codes ahead of the other: each gets what it gets alone."""
    model = random_floats(**options)
    codes = random_codes(2)
    alone = [decode(NativeDecoder(model, 1, 1), TEXT[i : i + 1], codes[i : i + 1])[1:, 0] for i in range(2)]
    decoder, other = NativeDecoder(model, 2, 1), NativeDecoder(model, 2, 1)
    for both in (decoder, other):
        both.prompt(TEXT)
    for i in range(5):
        other.feed(codes[:, i : i + 1], Positions(1, i))
    for layer, theirs in zip(decoder.cache.layers, other.cache.layers):
        layer.codes[:, 1] = theirs.codes[:, 1]
        for own, shown in zip(layer.shown, theirs.shown):
            own[1] = shown[1]
    for i in range(30):
        at = torch.tensor([[i], [i + 5]])
        logits = decoder.logits(decoder.feed(codes.gather(1, at), Positions.of(at, 36))[:, 0])
        torch.testing.assert_close(logits, torch.stack([alone[0][i], alone[1][i + 5]]), rtol=1e-5, atol=1e-5)


# ---- drawing


@KERNELS
@pytest.mark.parametrize("size", [1, 8, 21, 1000])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0),
        SamplingOptions(top_k=1),
        SamplingOptions(top_k=7, temperature=0.7),
        SamplingOptions(top_p=0.8),
        SamplingOptions(top_k=50, top_p=0.95, temperature=1.5),
    ],
    ids=str,
)
def test_kernels_draw_the_tokens_that_pytorch_draws(options, size, threads):
    torch.manual_seed(2)
    threads(1 + size % 2)
    logits = (torch.randn(size, 3000) * 3).t()[::3]  # neither next to each other nor in order
    if size > 8:
        logits[:, 5] = float("-inf")
        logits[:, 6] = logits[:, 7] = 2.5  # a tie
    uniform = torch.rand(1000, 2, dtype=torch.float64)[:, 1]
    options = options._replace(top_k=options.top_k and min(options.top_k, size))
    token, score = ops.sample(logits, uniform, choice_for(options, len(logits)))
    expected = sample(logits, uniform, options)
    assert (token != expected).sum() <= 1  # a number that falls between two tokens up to rounding
    torch.testing.assert_close(score, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    assert len(token.unique()) > min(size - 1, 5)


@KERNELS
def test_tokens_that_were_filtered_away_are_never_drawn():
    logits = torch.full((2, 1000), 0.1)
    logits[:, 400:600] = torch.linspace(1, 3, 200)
    for options in (SamplingOptions(top_k=200), SamplingOptions(top_k=900, top_p=0.5)):  # 800 ties with the 900th
        uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
        lowest, highest = ops.sample(logits, uniform, choice_for(options, 2))[0].tolist()
        assert (lowest, highest) == (400, 599) if options.top_p is None else 400 < lowest < highest == 599
    equal = ops.sample(torch.zeros(2, 8), torch.tensor([0.0, 0.999]), choice_for(SamplingOptions(top_p=0.5), 2))[0]
    assert equal.tolist() == [0, 3]


@KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_drawn_from_as_pytorch_does(value):
    logits = torch.randn(3, 50)
    logits[1, 30] = value
    for options in (SamplingOptions(), SamplingOptions(top_k=5), SamplingOptions(temperature=0)):
        uniform = torch.tensor([0.3, 0.6, 0.9])
        token, score = ops.sample(logits, uniform, choice_for(options, 3))
        assert torch.equal(token, sample(logits, uniform, options))
        assert score.isnan().tolist() == [False, True, False]


# ---- where kernels are left out


class Doubling(torch.nn.Linear):
    """A layer of another kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def fed_by(model, count=2):
    decoder, refused = best_decoder(model, 1, count)
    assert (type(decoder) is Decoder) == (refused is not None)
    return type(decoder)


@KERNELS
def test_only_floats_on_a_cpu_are_for_kernels(monkeypatch):
    model = random_floats()
    assert fed_by(model) is NativeDecoder
    assert fed_by(copy.deepcopy(model).bfloat16()) is Decoder and fed_by(random_model()) is Decoder
    with torch.autocast("cpu", torch.bfloat16):
        assert fed_by(model) is Decoder
    other = copy.deepcopy(model)
    layer = other.transformer.layers[1].feed_forward.fn
    layer.up = Doubling(layer.up.in_features, layer.up.out_features, bias=False)
    assert fed_by(other) is Decoder
    assert fed_by(model, 97) is Decoder
    monkeypatch.setattr(decoders, "MAX_BYTES", 1000)
    assert fed_by(model) is Decoder


@torch.no_grad()
@pytest.mark.parametrize("name, value", [("DALLE_KERNELS", "off"), ("PATH", "/nonexistent")])
def test_without_kernels_pytorch_computes_the_same(name, value, fresh, monkeypatch):
    model, codes = random_floats(), random_codes(2)
    before = steps(model, codes, 1)[0]
    fresh()
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("CC", raising=False)
    found, step = steps(model, codes, 1)
    assert type(step) is Decoder
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("count", [1, 100, 12345, 300_000])
def test_all_is_read(count):
    x = torch.randint(-9, 9, (count,)).float()
    assert read_all(x) == x.double().sum().item()
    assert read_all(x.double()) is None and read_all(x.expand(2, -1).t()) is None
