"""Native sampling: it computes what PyTorch does, whatever the sizes, and is skipped where it cannot."""
from __future__ import annotations

import copy

import pytest
import torch
from models_for_tests import (
    ALL,
    OPTIONS,
    TEXT,
    choice_for,
    decode,
    needs_guesses,
    needs_kernels,
    primed,
    random_codes,
    random_model,
    sample,
)

import ops
from models.positions import Positions
from models.quantization import Int8Linear
from ops import build, noise, rows
from ops.rows import Packed, read_all
from sampling import SamplingOptions, Shared, decoders, sample_codes
from sampling.decoders import Decoder
from sampling.native import NativeDecoder, best_decoder

pytestmark = needs_kernels

#: What OPTIONS leave out: widths of vectors and more, whole and odd ones.
WIDE = {
    "wide heads": {"dim_head": 64, "heads": 3, "dim": 40, "attn_types": ("full", "axial_col"), "sandwich_norm": True},
    "odd": {"dim_head": 21, "heads": 3, "dim": 37, "activation": "quick_gelu", "out_bias": False, "ff_bias": False},
    "odd, modern": {"dim_head": 21, "heads": 3, "dim": 37, "activation": "relu2", "norm": "rms", "qk_norm": True},
    "long": {"dim_head": 40, "dim": 200, "attn_types": ("conv_like", "axial_row"), "shift_tokens": True},
}


@pytest.fixture
def threads(threads, monkeypatch):
    """Set how many threads there are. However little there is to do, all of them take part."""
    monkeypatch.setattr(rows, "_GRAIN", 1)
    return threads


def random_floats(**options):
    return random_model(**options).float()


def steps(model, codes, images, first=0, expected=NativeDecoder):
    """Logits after the prompt or the first codes, and after each further one, fed one after the other."""
    decoder = best_decoder(model, len(codes) // images, images)[0]
    assert type(decoder) is expected
    return decode(decoder, TEXT[: len(codes) // images], codes, first)


def packed(layer):
    return Packed(layer.weight.detach(), layer.bias, getattr(layer, "scale", None))


# ---- matmuls


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("depth, outputs", [(1, 1), (7, 5), (24, 40), (65, 32), (130, 33), (600, 97)])
def test_matmuls_of_all_sizes(kind, depth, outputs, threads, unit_of_rows):
    torch.manual_seed(1)
    threads(1 + outputs % 5)
    for bias in (True, False):
        layer = torch.nn.Linear(depth, outputs, bias=bias)
        if kind == "int8":
            layer = Int8Linear(torch.randn(outputs, depth), layer.bias)
        matmul = packed(layer.bfloat16() if kind == "bfloat16" else layer)
        layer.float()
        floats = packed(layer)
        for count in [1, 7, 17] if unit_of_rows == "emulated" else [*range(1, 14), 16, 17, 25, 37, 48]:
            x = torch.randn(count, depth)
            found = matmul(x)
            torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-4 if kind == "int8" else 1e-5)
            assert kind == "int8" or unit_of_rows != "none" or torch.equal(found, floats(x))
            assert torch.equal(found[:1], matmul(x[:1]))  # to the bit, however many rows there are


@needs_guesses
@torch.no_grad()
@pytest.mark.parametrize("depth, outputs", [(1, 1), (7, 5), (65, 32), (130, 33), (600, 97), (64, 320)])
def test_rough_matmuls_round_inputs_to_bytes(depth, outputs, threads):
    torch.manual_seed(1)
    threads(1 + outputs % 5)
    layer = Int8Linear(torch.randn(outputs, depth), torch.randn(outputs))
    matmul = Packed.rough(layer.weight, layer.bias, layer.scale)
    for count in range(1, 6):
        x = torch.randn(count, depth)
        x[0] *= 10
        step = x.abs().amax(dim=1, keepdim=True) / 127
        torch.testing.assert_close(matmul(x), layer((x / step).round() * step), rtol=1e-4, atol=1e-3)
    assert (matmul(torch.zeros(1, depth)) == layer.bias).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_what_is_not_a_number_stays_in_its_row_and_its_column(kind, unit_of_rows):
    layer = torch.nn.Linear(50, 40).bfloat16().float()
    x = torch.ones(14, 50)
    x[5, 20] = float("nan")
    x[6, 21] = float("inf")
    if kind == "int8":
        layer = Int8Linear(layer.weight, layer.bias)
        layer.weight[:, 21] = layer.weight[:, 21].abs().clamp(min=1)  # one product is infinite, and none is 0 * inf
        expected = layer(x)
        assert expected[6].isinf().all()
    else:
        layer.weight[7, 3] = float("inf")
        x[9, 3] = 0
        expected = layer(x)
        assert expected[9, 7].isnan() and expected[0, 7].isinf() and expected[6, 1].isinf()
    assert expected[5].isnan().all()
    matmul = packed(layer.bfloat16() if kind == "bfloat16" else layer)
    torch.testing.assert_close(matmul(x), expected, equal_nan=True)


# ---- the step


@torch.no_grad()
@pytest.mark.parametrize("images, first, count", [(1, 13, 1), (3, 0, 1), (7, 25, 2)])
@pytest.mark.parametrize("options", [*OPTIONS.values(), *WIDE.values()], ids=[*OPTIONS, *WIDE])
def test_steps_give_the_logits_of_the_whole_pass(options, images, first, count, threads):
    """In double precision: kernels may be little further from it than the floats of PyTorch's whole pass."""
    threads(count)
    exact = random_model(**options)
    model = copy.deepcopy(exact).float()
    codes, text = random_codes(2 * images), TEXT.repeat_interleave(images, 0)
    expected = exact(text, codes)[1][:, first:].transpose(0, 1)
    usual = (model(text, codes)[1][:, first:].transpose(0, 1) - expected).abs().max()
    found = steps(model, codes, images, first)
    assert usual < 1e-3 and (found - expected).abs().max() < 3 * usual + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("activation", ["geglu", "gelu", "swiglu"])
def test_int8_steps_give_what_pytorch_gives(activation, threads, unit_of_rows):
    threads(2)
    model = random_floats(activation=activation)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child.weight, child.bias))
    assert sum(type(module) is Int8Linear for module in model.modules()) > 3
    found = steps(model, random_codes(3), 3)
    threads(1)
    with ops.use("reference"):
        expected = steps(model, random_codes(3), 3, expected=Decoder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [*OPTIONS.values(), *WIDE.values()], ids=[*OPTIONS, *WIDE])
def test_bfloat16_weights_are_as_exact_as_their_floats(options, threads, unit_of_rows):
    threads(2)
    model = random_floats(**options).bfloat16()
    found = steps(model, random_codes(2), 2, first=13)
    expected = steps(model.float(), random_codes(2), 2, first=13)
    if unit_of_rows == "none":
        assert torch.equal(found, expected)
    # The unit adds in another order, and float32's rounding alone moves logits of "long" by 7e-5 from double's.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_neither_other_images_nor_threads_change_a_bit(threads):
    model, codes = random_floats(**ALL), random_codes(17)
    together = steps(model, codes, 17)
    assert torch.equal(steps(model, codes, 17), together)
    assert torch.equal(steps(model, codes[4:7], 3, first=30), together[30:, 4:7])
    assert torch.equal(steps(model, codes[5:6], 1), together[:, 5:6])  # whose keys lie elsewhere
    threads(2)
    assert torch.equal(steps(model, codes, 17), together)


@torch.no_grad()
def test_a_small_model_is_left_to_one_thread(threads, monkeypatch):
    """Threads that wait for each other cost more than they give, the more so where other programs run."""
    monkeypatch.undo()  # the fixture's grain
    threads(2)
    small, large = (NativeDecoder(random_floats(**wide), 1, 1) for wide in ({}, {"dim": 200}))
    assert small.struct.threads == 1 and large.struct.threads == 2


@pytest.mark.parametrize("name", ["all patterns", "mindalle"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_images_are_sampled(name, count):
    model, given = random_floats(**OPTIONS[name]), primed(slice(4, None))
    options = SamplingOptions(top_k=9, top_p=0.9, temperature=1.2, cond_scale=1.5)
    found = sample_codes(model, TEXT, range(2 * count), options, given)
    with ops.use("reference"):
        expected = sample_codes(model, TEXT, range(2 * count), options, given)
    assert torch.equal(found.codes, expected.codes) and len(found.codes.unique()) > 5
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"activation": "relu2"}, {"activation": "swiglu", "norm": "rms"}], ids=str)
def test_a_broken_weight_is_not_hidden(options, value):
    model = random_floats(**options)
    model.image_emb.weight[3, 2] = value
    codes = random_codes(4).clamp(min=4)
    codes[2, 30] = 3
    found = steps(model, codes, 4)[1:].isnan().all(-1)  # (35, 4)
    assert found[30:, 2].all() and found.sum() == 5


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    decoder = NativeDecoder(random_floats(), 2, 1)
    decoder.prompt(TEXT)
    for codes, position, message in (
        ([[1], [20]], 0, "a code is not in the table"),
        ([[1], [-1]], 0, "a code is not in the table"),
        ([[1], [2]], 36, "a position is not in the table"),
        ([[1], [2]], -1, "a position is not in the table"),
        ([[1], [2], [3]], 0, r"codes \(3, 1\) for 2 rows"),
    ):
        with pytest.raises((IndexError, ValueError), match=message):
            decoder.feed(torch.tensor(codes), Positions(1, position))
    assert decoder.feed(torch.tensor([[1], [19]]), Positions(1, 0)).shape == (2, 1, 16)


# ---- sampling from logits


@pytest.mark.parametrize("size", [1, 8, 21, 1000])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0}, {"top_k": 1}, {"top_k": 7, "temperature": 0.7}, {"top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "temperature": 1.5},
], ids=str)
def test_the_tokens_are_those_of_pytorch(options, size, threads):
    torch.manual_seed(2)
    threads(1 + size % 2)
    logits = (torch.randn(size, 3000) * 3).t()[::3]  # neither next to each other nor in order
    if size > 8:
        logits[:, 5] = float("-inf")
        logits[:, 6] = logits[:, 7] = 2.5  # a tie
    keys = noise.keys(range(2000)).view(1000, 2)[:, 1]
    options = SamplingOptions(**options)
    options = options._replace(top_k=options.top_k and min(options.top_k, size))
    token, score = ops.sample(logits, keys, torch.zeros_like(keys), choice_for(options, len(logits)))
    expected = sample(logits, keys, options)
    assert (token != expected).sum() <= (options.top_p is not None)  # probabilities are equal up to rounding alone
    torch.testing.assert_close(score, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    assert len(token.unique()) > min(size - 1, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0}], ids=str)
def test_broken_logits_give_the_tokens_of_pytorch(value, options):
    logits, keys, options = torch.randn(3, 50), noise.keys(range(3)), SamplingOptions(**options)
    logits[1, 30] = value
    token, score = ops.sample(logits, keys, torch.zeros_like(keys), choice_for(options, 3))
    assert torch.equal(token, sample(logits, keys, options))
    assert score.isnan().tolist() == [False, True, False]


# ---- where PyTorch decodes


class Doubling(torch.nn.Linear):
    """A layer of another kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_only_floats_on_a_cpu_are_decoded_natively(monkeypatch):
    def fed_by(model, count=2):
        decoder, refused = best_decoder(model, 1, count)
        assert (type(decoder) is Decoder) == (refused is not None)
        return type(decoder)

    model = random_floats()
    assert fed_by(model) is NativeDecoder
    assert fed_by(copy.deepcopy(model).bfloat16()) is NativeDecoder and fed_by(random_model()) is Decoder
    with torch.autocast("cpu", torch.bfloat16):
        assert fed_by(model) is Decoder
    assert fed_by(copy.deepcopy(model).half()) is Decoder
    other = copy.deepcopy(model)
    layer = other.transformer.layers[1].feed_forward.fn
    layer.up = Doubling(layer.up.in_features, layer.up.out_features, bias=False)
    assert fed_by(other) is Decoder
    assert fed_by(model, 97) is Decoder
    monkeypatch.setattr(decoders, "MAX_BYTES", 1000)
    assert fed_by(model) is Decoder


@torch.no_grad()
@pytest.mark.parametrize("name, value", [("DALLE_KERNELS", "off"), ("PATH", "/nonexistent")])
def test_without_kernels_pytorch_computes_the_same(name, value, request, monkeypatch):
    def forget():
        build.library.cache_clear()
        rows.functions.cache_clear()

    model, codes = random_floats(), random_codes(2)
    before = decode(best_decoder(model, 2, 1)[0], TEXT, codes)
    request.addfinalizer(forget)
    forget()
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("CC", raising=False)
    found = steps(model, codes, 1, expected=Decoder)
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 100, 12345, 300_000])
def test_all_is_read(count):
    x = torch.randint(-9, 9, (count,)).float()
    assert read_all(x) == x.double().sum().item()
    assert read_all(x.double()) is None and read_all(x.expand(2, -1).t()) is None


@pytest.mark.parametrize("name", ["all patterns", "rotary and shift"])
def test_the_next_batch_takes_the_decoder_of_the_last(name):
    model, shared, seen = random_floats(**OPTIONS[name]), Shared(4), set()
    for caption in (0, 1, 0):
        found = sample_codes(model, TEXT[caption], [caption], shared=shared)
        seen.add(id(shared.copies.idle))
        assert torch.equal(found.codes, sample_codes(model, TEXT[caption], [caption]).codes)
        assert shared.copies.idle.copies is not shared.copies  # no cycle
    assert len(seen) == 1
    sample_codes(model, TEXT, [0, 1], shared=shared)
    assert id(shared.copies.idle) not in seen
