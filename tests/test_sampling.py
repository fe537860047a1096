"""Sampling: cached logits are those of the whole pass, filters keep their promises, samples follow the
distribution."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import refused
from models_for_tests import (
    ALL,
    EDGES,
    GREEDY,
    OPTIONS,
    TEXT,
    TINY,
    check_edge,
    choice_for,
    conditional_logits,
    decode,
    likelihood,
    needs_kernels,
    noise_of,
    on_device,
    primed,
    random_codes,
    random_model,
    take_row,
)

import ops
from models.config import DalleConfig
from models.positions import Positions, next_code
from ops import noise, rows
from ops.build import pointer
from ops.sampling_ops import keep_top_k, keep_top_p
from sampling import SamplingOptions, complete_text, sample_codes, top_k_count
from sampling.canvas import guided
from sampling.decoders import Decoder
from sampling.loop import Shared
from sampling.native import best_decoder, refusal
from utils.splitmix import GOLDEN, splitmix64

# ---- the cache


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 3], ids=["joined", "shared"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cached_logits_are_those_of_the_whole_pass(options, images):
    """Two prompts with one or three images each, first codes and then one after the other; nothing follows the last."""
    model = random_model(**options)
    codes = random_codes(2 * images)
    expected = model(TEXT.repeat_interleave(images, 0), codes)[1].transpose(0, 1)
    for first, step in ((0, next_code), (0, on_device), (1, next_code), (4, on_device), (18, next_code),
                        (25, on_device), (35, next_code)):  # fmt: skip
        count = min(35, first + 7) if first else 35  # all that the first codes left is read within a row
        decoder = Decoder(model, 2, images)
        assert (decoder.cache.layers[0].joint is not None) == (images == 1)
        found = decode(decoder, TEXT, codes, first, step, count)
        torch.testing.assert_close(found, expected[first : count + 1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "on the device", "of each image", "natively"])
@pytest.mark.parametrize("images", [1, 3], ids=["joined", "shared"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_of_codes_at_any_positions(options, images, kind):
    """Windows of codes, at positions the host or only the device knows, or at other ones in each image; natively, the
    latter one code after the other."""
    model = random_model(**options)
    codes = random_codes(2 * images)
    expected = model(TEXT.repeat_interleave(images, 0), codes)[1]
    decoders, chunks = [Decoder(model, 2, images)], [(0, 5), (5, 1), (6, 5), (11, 1), (12, 17)]
    ahead = torch.zeros(1, dtype=torch.long)
    if kind in ("of each image", "natively"):
        ahead = torch.arange(2 * images)
        if kind == "natively":
            if refusal(model.float(), 2) is not None:
                pytest.skip("no native kernels")
            chunks = [(i, 1) for i in range(30)]
        decoders = [best_decoder(model, 2, images)[0] for _ in range(2 * images)]
    for row, decoder in enumerate(decoders):
        decoder.prompt(TEXT)
        if row:
            decoder.feed(codes[:, :row], Positions(row, 0))
            take_row(decoders[0], decoder, row)
    for first, width in chunks:
        index = ahead[:, None] + first + torch.arange(width)  # (1 or B, width)
        at = Positions(width, first) if kind == "window" else Positions.of(index, 36)
        every = index.expand(2 * images, -1)
        logits = decoders[0].logits(decoders[0].feed(codes.gather(1, every), at))
        wanted = expected.gather(1, (every + 1)[..., None].expand(-1, -1, 20))
        tolerance = 1e-4 if kind == "natively" else 1e-9
        torch.testing.assert_close(logits.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 5], ids=["transposed", "as they are", "packed"])
@torch.no_grad()
def test_weights_in_another_layout_give_the_same_matmuls(rows):
    torch.manual_seed(3)
    for layer in (torch.nn.Linear(24, 40), torch.nn.Linear(24, 8, bias=False)):
        matrix = ops.Matrix(layer.weight, layer.bias)
        copied, half = (ops.for_few_rows(matrix, rows, dtype) for dtype in (torch.float32, torch.bfloat16))
        for x in (torch.randn(rows, 1, 24), torch.randn(rows, 3, 24)):
            torch.testing.assert_close(ops.linear(x, copied), layer(x))
        assert ops.linear(x, half).dtype == torch.bfloat16
        torch.testing.assert_close(ops.linear(x, half).float(), layer(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decoding_leaves_no_trace(dtype):
    model = random_model().to(dtype)
    before = torch.backends.mkldnn.set_flags(True)[0]
    decoder = Decoder(model, 1, 1)
    copied = not isinstance(decoder.operands.image_head, ops.Matrix)
    assert copied == (dtype == torch.float32)
    with pytest.raises(KeyError, match="stop"), decoder:
        raise KeyError("stop")
    assert torch.backends.mkldnn.set_flags(before)[0]


@pytest.mark.parametrize("kind", ["native", "PyTorch"])
def test_copies_of_weights_serve_later_batches(kind, monkeypatch):
    model = random_model().float()
    if kind == "PyTorch":
        monkeypatch.setattr("sampling.native.MOST_ROWS", 0)
    elif refusal(model, 1) is not None:
        pytest.skip("no native kernels")
    shared = Shared("off")
    copies = shared.copies
    first = sample_codes(model, TEXT[0], [1, 2], shared=shared)
    kept, layout = dict(copies.weights), copies.layout
    again = sample_codes(model, TEXT[1], [3, 4], shared=shared)
    assert kept and copies.weights == kept and copies.layout == layout
    assert torch.equal(first.codes, sample_codes(model, TEXT[0], [1, 2]).codes)
    assert torch.equal(again.codes, sample_codes(model, TEXT[1], [3, 4]).codes)
    alone = sample_codes(model, TEXT[1], [3], shared=shared)  # another number of rows
    assert torch.equal(alone.codes[0], again.codes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_in_training_mode_drops_nothing_when_it_samples(dtype):
    model = random_model(attn_dropout=0.3, ff_dropout=0.3).to(dtype)
    expected = sample_codes(model, TEXT, [1, 2])
    found = sample_codes(model.train(), TEXT, [1, 2])
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.log_likelihood, expected.log_likelihood)


# ---- what a decoder does not know


def _other(field):
    """A value of a model option that is not its default."""
    values = {
        "num_text_tokens": 13, "num_image_tokens": 21, "text_seq_len": 6, "grid": 5, "dim": 20, "depth": 3, "heads": 3,
        "dim_head": 10, "attn_types": ("conv_like", "axial_row"), "loss_img_weight": 2.0, "attn_dropout": 0.1,
        "ff_dropout": 0.1, "ff_mult": 3, "activation": "quick_gelu", "image_positions": "learned",
        "shared_attn_ids": (0,), "shared_ff_ids": (0,), "init_std": 0.3, "norm": "rms", "label_smoothing": 0.1,
    }  # fmt: skip
    return values.get(field.name, not field.default)


@pytest.mark.parametrize("field", dataclasses.fields(DalleConfig), ids=lambda field: field.name)
def test_every_model_option_is_known_to_a_decoder_or_refused_by_name(field):
    """The native decoder samples what the model's own forward pass does, or says which option it does not know."""
    model = random_model(**{field.name: _other(field)}).float()
    assert getattr(model.config, field.name) != getattr(TINY, field.name)
    text = TEXT[:, : model.config.text_seq_len]
    text = torch.nn.functional.pad(text, (0, model.config.text_seq_len - text.shape[1]))
    options = SamplingOptions(top_k=9, cond_scale=1.5)
    refused = refusal(model, 2)
    assert refused is None or field.name in refused or "compiled" in refused or "DALLE_KERNELS" in refused
    found = sample_codes(model, text, [1, 2], options)
    with ops.use("reference"):
        expected = sample_codes(model, text, [1, 2], options)
    assert torch.equal(found.codes, expected.codes)


def test_a_model_option_that_came_later_is_refused_by_name(monkeypatch, caplog):
    model = random_model(sandwich_norm=True).float()
    monkeypatch.setattr("sampling.native._KNOWN", frozenset(vars(TINY)) - {"sandwich_norm"})
    assert refusal(model, 1) == "the native decoder does not know the model option sandwich_norm"
    assert "sandwich_norm" not in str(refusal(random_model().float(), 1))  # as it is by default: nothing to know
    with caplog.at_level("INFO"):
        for _ in range(2):
            sample_codes(model, TEXT[0], [1])
    assert caplog.text.count("does not know the model option sandwich_norm") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "PyTorch"])
def test_every_sampling_option_counts_with_every_decoder(dtype):
    other = {"top_k": 3, "top_p": 0.4, "temperature": 3.0, "cond_scale": 4.0}
    assert set(other) == set(SamplingOptions._fields)
    model = random_model().to(dtype)
    plain = sample_codes(model, TEXT[0], [1, 2])
    for name, value in other.items():
        found = sample_codes(model, TEXT[0], [1, 2], SamplingOptions(**{name: value}))
        assert not torch.equal(found.codes, plain.codes), name
        logits = conditional_logits(model, TEXT[0], found.codes, value if name == "cond_scale" else 1.0)
        scores = likelihood(logits, found.codes)
        torch.testing.assert_close(found.log_likelihood, scores, rtol=1e-4, atol=1e-2, check_dtype=False)  # unfiltered


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_options_of_each_row(kind):
    """Rows with options of their own get what they get alone."""
    torch.manual_seed(2)
    logits, keys, positions = torch.randn(7, 50) * 3, noise.keys(range(7)), torch.arange(7) * 9
    each = ({}, {"temperature": 0}, {"top_k": 3}, {"top_k": 50}, {"top_p": 0.3}, {"top_k": 1},
            {"temperature": 2.0, "top_k": 9, "top_p": 0.9})  # fmt: skip
    parts = [choice_for(SamplingOptions(**options), 1) for options in each]
    together = ops.Choice(*(torch.cat(column) if isinstance(column[0], torch.Tensor) else max(column)
                            for column in zip(*parts)))  # fmt: skip
    with ops.use(kind):
        tokens, scores = ops.sample(logits, keys, positions, together)
        for row, choice in enumerate(parts):
            own = slice(row, row + 1)
            token, score = ops.sample(logits[own], keys[own], positions[own], choice)
            assert token == tokens[row] and score == scores[row]


# ---- what is sampled


@pytest.mark.parametrize("cond_scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_codes_are_the_likeliest_of_the_whole_pass(options, cond_scale):
    model = random_model(**options)
    found = sample_codes(model, TEXT[0], [1, 2], SamplingOptions(temperature=0, cond_scale=cond_scale))
    logits = conditional_logits(model, TEXT[0], found.codes, cond_scale)
    assert torch.equal(found.codes, logits.argmax(-1))
    assert torch.equal(found.codes[0], found.codes[1]) and len(found.codes.unique()) > 1
    torch.testing.assert_close(found.log_likelihood.double(), likelihood(logits, found.codes), rtol=1e-5, atol=1e-3)


def test_an_image_depends_on_its_seed_alone():
    """Not on the batch, not on the global generator, which stays as it was."""
    model = random_model(attn_types=("full", "axial_row"))
    options = SamplingOptions(top_k=10, temperature=1.3, cond_scale=1.5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    together = sample_codes(model, TEXT[0], [11, 12, 13, 14], options)
    assert torch.equal(torch.rand(3), expected)
    for index, seed in enumerate((11, 12, 13, 14)):
        assert torch.equal(sample_codes(model, TEXT[0], [seed], options).codes[0], together.codes[index])
    assert len({tuple(codes) for codes in together.codes.tolist()}) == 4
    backwards = sample_codes(model, TEXT[0], [14, 13, 12, 11], options)
    assert torch.equal(backwards.codes.flip(0), together.codes)


@pytest.mark.parametrize("options", [
    {"attn_types": ("full", "conv_like"), "shift_tokens": True}, ALL, dict(ALL, shift_tokens=True, rotary=True),
], ids=["conv_like, shift", "all", "shift and rotary"])
@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@pytest.mark.parametrize("kept", [None, primed(slice(12, None))], ids=["", "kept"])
def test_several_captions_in_one_batch_are_sampled_like_each_alone(options, cond_scale, kept):
    model, sampling = random_model(**options), SamplingOptions(top_k=8, cond_scale=cond_scale)
    together = sample_codes(model, TEXT, [1, 2, 3, 4, 5, 6], sampling, kept)
    for index, seeds in enumerate(([1, 2, 3], [4, 5, 6])):
        alone = sample_codes(model, TEXT[index], seeds, sampling, kept)
        assert torch.equal(together.codes[3 * index : 3 * index + 3], alone.codes)
        torch.testing.assert_close(together.log_likelihood[3 * index : 3 * index + 3], alone.log_likelihood)
    for seeds in ([], [1, 2, 3]):
        with pytest.raises(ValueError, match=f"{len(seeds)} seeds cannot be shared equally by 2 captions"):
            sample_codes(model, TEXT, seeds)


def test_noise_is_a_stream_of_splitmix64_for_each_seed():
    """Number p * C + c after the hashed seed belongs to code c of position p."""
    keys, found = [splitmix64(seed) for seed in (7, 8, 2**63 - 1)], noise_of([7, 8, 2**63 - 1], 5, 20)
    for row, key in enumerate(keys):
        numbers = [splitmix64(key + place * GOLDEN) >> 33 for place in range(100)]
        assert torch.equal(found[row].flatten(), noise.gumbel_of(torch.tensor(numbers)))


#: Where something in the noise changes: ends, powers of two, and the numbers beside them.
NUMBERS = torch.tensor(sorted({max(0, min(2**31 - 1, 2**bit + by)) for bit in range(32) for by in range(-8, 9)}))


@needs_kernels
def test_noise_has_the_same_bits_in_c():
    numbers = torch.cat([NUMBERS, torch.randint(2**31, (2**18 - len(NUMBERS),))])
    integers, found = numbers.int(), torch.empty(len(numbers))
    rows.functions().gumbel(pointer(integers), len(numbers), pointer(found))
    assert torch.equal(found, noise.gumbel_of(numbers))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_noise_has_the_same_bits_on_a_gpu():
    numbers = torch.cat([NUMBERS, torch.randint(2**31, (2**18,))])
    assert torch.equal(noise.gumbel_of(numbers.cuda()).cpu(), noise.gumbel_of(numbers))


def test_noise_is_that_of_the_gumbel_distribution():
    v = (NUMBERS.double() + 0.5) / 2**31
    exact, found = -torch.log(-torch.log1p(-v)), noise.gumbel_of(NUMBERS).double()
    known = v < 1 - 2.0**-16  # in the lower tail floats are coarse: no code with such noise is chosen
    torch.testing.assert_close(found[known], exact[known], rtol=1e-3, atol=1e-4)
    assert found.isfinite().all() and found.min() > -3 and found.max() > 22


def test_guidance_goes_from_the_unconditional_logits_through_the_conditional():
    both = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 4.0], [0.0, 4.0]])[:, None]
    scales = torch.tensor([3.0, 0.0])[:, None, None]  # one for each image
    assert guided(both, scales)[:, 0].tolist() == [[3.0, -2.0], [0.0, 4.0]]
    model = random_model()
    nothing = sample_codes(model, torch.zeros(5, dtype=torch.long), [4], SamplingOptions())
    assert torch.equal(sample_codes(model, TEXT[0], [4], SamplingOptions(cond_scale=0.0)).codes, nothing.codes)


# ---- filters and samples


def test_top_k_keeps_ties_with_the_last():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 4.0, 5.0]])
    kept = torch.isfinite(keep_top_k(logits, torch.tensor([[1], [1]]), 3))
    assert kept.tolist() == [[False, True, True, True, False], [True, True, True, False, True]]
    assert torch.equal(keep_top_k(logits, torch.tensor([[4], [4]]), 5), logits)
    assert torch.equal(keep_top_k(logits, torch.tensor([[1], [1]]), 3)[kept], logits[kept])


@pytest.mark.parametrize("p, expected", [
    (0.5, [0, 1, 0, 0]),  # exactly reached by the first
    (0.51, [0, 2 / 3, 1 / 3, 0]),
    (0.75, [0, 2 / 3, 1 / 3, 0]),
    (0.01, [0, 1, 0, 0]),  # never empty
    (1e-300, [0, 1, 0, 0]),
    (1.0, [0.125, 0.5, 0.25, 0.125]),
])
def test_top_p_keeps_the_token_that_crosses(p, expected):
    found = keep_top_p(torch.tensor([[0.125, 0.5, 0.25, 0.125]]), torch.tensor([p]))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


def test_top_k_as_fraction_or_count():
    assert top_k_count(0.99, 1024) == 10 and top_k_count(0.9, 8192) == 819  # max(int((1 - t) * n), 1)
    assert top_k_count(0.999, 100) == 1 and top_k_count(1, 100) == 1
    assert top_k_count(256, 1024) == 256 and top_k_count(4096, 1024) == 1024
    assert top_k_count(0, 1024) is None


def expected_distribution(logits, options):
    """The options in words: the likeliest k, of these the likeliest until p is reached, in proportion."""
    weights = [math.exp(logit / options.temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[: options.top_k]
    total, kept, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if options.top_p is None or reached < options.top_p:
            kept.append(token)
        reached += weights[token] / total
    shares = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    return torch.tensor(shares, dtype=torch.float64) / sum(shares)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 4}, {"top_p": 0.8},
    {"top_k": 5, "top_p": 0.9, "temperature": 1.5},
], ids=str)
@pytest.mark.parametrize("kind", ["native", "reference"])
def test_samples_follow_the_distribution(options, kind):
    """Pearson's test on 40,000 samples; the limit is passed once in a million times by a correct sampler."""
    logits, options = torch.tensor([0.3, -1.0, 2.0, 1.5, -0.5, 0.0, 1.0, -2.0]), SamplingOptions(**options)
    count, probabilities = 40_000, expected_distribution(logits.tolist(), options)
    keys, positions = noise.keys(range(count // 100)).repeat(100), torch.arange(count) // (count // 100)
    with ops.use(kind):
        tokens = ops.sample(logits.repeat(count, 1), keys, positions, choice_for(options, count))[0]
    counts, possible = tokens.bincount(minlength=8).double(), probabilities > 0
    assert not counts[~possible].any()
    limit = {7: 42.0, 3: 31.0, 4: 34.0, 2: 28.0, 5: 37.0}[int(possible.sum()) - 1]  # 1 - 1e-6 quantiles, rounded up
    expected = count * probabilities[possible]
    assert float(((counts[possible] - expected) ** 2 / expected).sum()) < limit


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_no_token_is_sampled_that_was_filtered_away(kind):
    logits = torch.full((1000, 1000), 0.1)
    logits[:, 400:600] = torch.linspace(1, 3, 200)
    keys = noise.keys(range(1000))

    def ends(logits, **options):
        with ops.use(kind):
            tokens = ops.sample(logits, keys, torch.zeros_like(keys), choice_for(SamplingOptions(**options), 1000))[0]
        return int(tokens.min()), int(tokens.max())

    assert ends(logits, top_k=200) == (400, 599)
    lowest, highest = ends(logits, top_k=900, top_p=0.5)  # 800 ties with the 900th
    assert 400 < lowest < highest == 599
    assert ends(torch.zeros(1000, 8), top_p=0.5) == (0, 3)


@pytest.mark.parametrize("options", EDGES, ids=str)
@pytest.mark.parametrize("kind", ["native", "reference", "double", "bfloat16"])
def test_options_at_the_ends_of_their_ranges(options, kind):
    dtype = {"double": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    with ops.use("reference" if kind == "reference" else "native"):
        check_edge(random_model(**ALL).to(dtype), options)


@pytest.mark.parametrize("options, message", [
    ({"temperature": 1e-38}, "temperature must be at least 1e-06 and at most 1e+06, or 0, got 1e-38"),
    ({"temperature": 9.9e-7}, "temperature must be"),
    ({"temperature": 1.1e6}, "temperature must be"),
    ({"temperature": -1.0}, "temperature must be"),
    ({"temperature": math.nan}, "temperature must be .*, got nan"),
    ({"temperature": None}, "temperature must be .*, got None"),
    ({"cond_scale": 1e38}, "cond_scale must be at least 0 and at most 1e+06, got 1e+38"),
    ({"cond_scale": -1e-9}, "cond_scale must be"),
    ({"cond_scale": "2"}, "cond_scale must be .*, got '2'"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None for all codes, got 0.0"),
    ({"top_p": 1.5}, "top_p must be above 0"),
    ({"top_k": 0}, "top_k must be a whole number of at least 1, or None for all codes, got 0"),
    ({"top_k": 2.5}, "top_k must be a whole number"),
    ({"top_k": math.inf}, "top_k must be a whole number"),
    ({"top_k": 10**400}, "top_k must be a whole number"),
], ids=str)
def test_options_out_of_range_are_refused_by_name(options, message):
    model, options = random_model(), SamplingOptions(**options)
    for call in (lambda: sample_codes(model, TEXT[0], [1], options), lambda: complete_text(model, [4], 1, options)):
        refused(message.replace("+", r"\+"), call)


# ---- given codes


@pytest.mark.parametrize("options, cond_scale", [
    ({}, 1.0), ({}, 2.0), (dict(ALL, shift_tokens=True), 1.0),
], ids=["full", "guided", "shift"])
@pytest.mark.parametrize("hidden", [range(36), range(14, 36), range(9, 20), [0, 7, 8, 35], [35], []], ids=str)
def test_given_codes_are_kept_and_the_rest_is_sampled_from_the_model(hidden, options, cond_scale):
    model, given, steps = random_model(**options), primed(list(hidden)), []
    greedy = GREEDY._replace(cond_scale=cond_scale)
    found = sample_codes(model, TEXT[0], [1, 2], greedy, given=given, on_token=lambda so_far: steps.append(so_far()))
    kept = given >= 0
    assert torch.equal(found.codes[:, kept], given[kept].expand(2, -1))
    logits = conditional_logits(model, TEXT[0], found.codes, cond_scale)
    assert torch.equal(found.codes[:, ~kept], logits.argmax(-1)[:, ~kept])
    scores = likelihood(logits[:, ~kept], found.codes[:, ~kept])  # of the sampled codes alone
    torch.testing.assert_close(found.log_likelihood.double(), scores, rtol=1e-5, atol=1e-4)
    assert len(steps) == (36 - min(hidden) if len(hidden) else 0)
    certain = [(codes >= 0).sum() for codes in steps]
    assert all(torch.equal(codes, found.codes.where(codes >= 0, codes)) for codes in steps)
    assert certain == sorted(certain) and certain[-1:] in ([], [72])


# ---- completing the text


def greedy_text(model, ids):
    """Complete a caption with whole passes over everything so far."""
    ids = list(ids)
    while len(ids) < 5:
        text = torch.tensor([ids + [1] * (5 - len(ids))])  # what follows does not matter
        row = len(ids) - (0 if model.config.bos else 1)
        token = int(model(text, random_codes(1))[0][0, row].argmax())
        if token == 0 or token >= 12:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("name", ["all patterns", "rotary and shift", "mindalle", "shift", "rotary"])
def test_completed_text_is_the_likeliest_of_the_whole_pass(name):
    model = random_model(**OPTIONS[name])
    for ids in ([4], [1, 2], [11, 7, 3, 6]):
        completed = complete_text(model, ids, 1, GREEDY)
        assert completed == greedy_text(model, ids) and completed[: len(ids)] == ids


def test_text_ends_at_a_pad_or_when_it_is_full():
    model = random_model()
    with torch.no_grad():
        model.text_head.bias[12:] = 100.0  # every pad
    assert complete_text(model, [4], 1) == [4]
    with torch.no_grad():
        model.text_head.bias[12:] = -100.0
        model.text_head.bias[0] = -100.0  # id 0 is no word either: unknown to the decoder
    assert len(complete_text(model, [4], 1)) == 5
    assert all(0 < token < 12 for token in complete_text(model, [], 3))
    assert complete_text(model, [1, 2, 3, 4, 5, 6, 7], 1) == [1, 2, 3, 4, 5]
    assert complete_text(model, [4], 1) == complete_text(model, [4], 1)
    assert len({tuple(complete_text(model, [4], seed, SamplingOptions(temperature=3.0))) for seed in range(8)}) > 1


def test_without_bos_there_must_be_a_word_to_start_from():
    model = random_model(bos=False, unique_pads=False)
    refused("without <bos>", complete_text, model, [], 1, kind=ValueError)


def test_blocks_of_noise_hold_what_is_made_for_each_pass():
    """Positions that go on, jump, fall behind and differ between images; other images; a table too large to keep."""
    blocks = noise.Blocks(2)
    for seeds, first, count, vocabulary in (
        ([1, 2], 0, 1, 7), ([1, 2], 1, 3, 7), ([1, 2], 60, 8, 7), ([1, 2], 2, 40, 7), ([3, 2], 3, 1, 7),
        ([3, 2], 4, 1, 9), ([3, 2], 5, 1, 1 << 13),
    ):  # fmt: skip
        keys = noise.keys(seeds).repeat_interleave(count)
        positions = (torch.tensor([[first], [first + 9]]) + torch.arange(count)).flatten()
        expected = noise.gumbel(noise.stream(keys, positions, vocabulary), torch.arange(vocabulary))
        found = blocks.at(keys, positions, vocabulary)
        assert found is None if vocabulary > 9 or count > 9 else torch.equal(found, expected)
