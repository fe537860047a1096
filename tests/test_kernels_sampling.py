"""Kernels for drawing: they compute what PyTorch does, whatever the sizes, and are left out where they cannot."""

import copy

import pytest
import torch
from test_sampling import OPTIONS, TEXT, random_codes, random_model

from models import native_rows as rows
from models import sampling as sampling_module
from models import stepping as stepping_module
from models.cache import JoinedCache
from models.native_rows import Packed, RowStepper, read_all
from models.quantization import Int8Linear
from models.sampling import SamplingOptions, draw, draw_and_score, draw_codes, first_codes, prefill
from models.stepping import Stepper, stepping
from ops import build

KERNELS = pytest.mark.skipif(rows._library() is None, reason="there is no C compiler, or DALLE_KERNELS=off")
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
        rows._library.cache_clear()

    yield forget
    forget()


def random_floats(**options):
    return random_model(**options).float()


def steps(model, codes, images, first=0):
    """Logits after each code, fed one after the other, and what fed them."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # what comes before is PyTorch's: on some CPUs its last bits depend on the threads
    hidden, caches = prefill(model, TEXT[: len(codes) // images], images)
    if first:
        first_codes(model, codes[:, :first], caches)
    torch.set_num_threads(count)
    with stepping(model, len(codes)) as step:
        return torch.stack([step.logits(step(codes[:, i], i, caches)) for i in range(first, 35)]), step


# ---- products


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("depth, outputs", [(1, 1), (7, 5), (24, 40), (65, 32), (130, 33), (200, 97)])
def test_products_of_all_sizes(depth, outputs, threads):
    torch.manual_seed(1)
    threads(1 + outputs % 2)
    for bias in (True, False):
        layer = torch.nn.Linear(depth, outputs, bias=bias)
        product = Packed(layer)
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
        product = Packed(layer)
        for count in [*range(1, 14), 16, 25, 37]:
            x = torch.randn(count, depth)
            torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-4)
            assert torch.equal(product(x)[:1], product(x[:1]))


@KERNELS
@torch.no_grad()
@pytest.mark.parametrize("activation", ["geglu", "gelu"])
def test_int8_steps_give_what_pytorch_gives(activation, monkeypatch, threads):
    threads(2)
    model = random_floats(activation=activation)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child.weight, child.bias))
    codes = random_codes(3)
    found, step = steps(model, codes, 3)
    assert type(step) is RowStepper and sum(packed.scale is not None for packed in step._packed.values()) > 3
    monkeypatch.setattr(stepping_module, "row_stepper", lambda model, rows: None)
    expected, step = steps(model, codes, 3)
    assert type(step) is Stepper
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
    torch.testing.assert_close(Packed(layer)(x), expected, equal_nan=True)


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
    assert type(step) is RowStepper and usual < 1e-3
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
        with stepping(random_floats(), 1) as small, stepping(random_floats(dim=200), 1) as large:
            assert small.struct.threads == 1 and large.struct.threads == 2
    finally:
        torch.set_num_threads(before)


@KERNELS
@pytest.mark.parametrize("options", [OPTIONS["all patterns"], OPTIONS["mindalle"]], ids=["all patterns", "mindalle"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_images_are_drawn(options, count, monkeypatch):
    model = random_floats(**options)
    drawing = SamplingOptions(top_k=9, top_p=0.9, temperature=1.2, cond_scale=1.5)
    given = random_codes(1)[0]
    given[4:] = -1
    found = draw_codes(model, TEXT, range(2 * count), drawing, given)
    monkeypatch.setattr(stepping_module, "row_stepper", lambda *_: None)
    monkeypatch.setattr(sampling_module, "draw_rows", lambda *_: None)
    expected = draw_codes(model, TEXT, range(2 * count), drawing, given)
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
    model = random_floats()
    caches = prefill(model, TEXT, 1)[1]
    assert type(caches[0]) is JoinedCache
    with stepping(model, 2) as step:
        for wrong in (20, -1):
            with pytest.raises(IndexError, match="not in the table of 20"):
                step(torch.tensor([1, wrong]), 0, caches)
        assert step(torch.tensor([1, 19]), 0, caches).shape == (2, 16)
    with stepping(model, 3) as step, pytest.raises(ValueError, match="2 x 1 images, for 3 rows"):
        step(torch.tensor([1, 2, 3]), 0, caches)


@KERNELS
@torch.no_grad()
def test_caches_one_after_the_other():
    """A stepper may be given other caches than before: it must not go on in the old ones."""
    model = random_floats(**OPTIONS["all patterns"])
    codes = random_codes(3)
    expected = [steps(model, codes[:1], 1)[0], steps(model, codes[1:2], 1)[0]]
    both = [prefill(model, TEXT[:1], 1)[1] for _ in range(2)]
    with stepping(model, 1) as step:
        for i in range(35):
            for index, caches in enumerate(both):
                logits = step.logits(step(codes[index : index + 1, i], i, caches))
                assert torch.equal(logits, expected[index][i])


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
    token, score = draw_and_score(logits, uniform, options)
    expected = draw(logits, uniform, options)
    assert (token != expected).sum() <= 1  # a number that falls between two tokens up to rounding
    torch.testing.assert_close(score, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    assert len(token.unique()) > min(size - 1, 5)


@KERNELS
def test_tokens_that_were_filtered_away_are_never_drawn():
    logits = torch.full((2, 1000), 0.1)
    logits[:, 400:600] = torch.linspace(1, 3, 200)
    for options in (SamplingOptions(top_k=200), SamplingOptions(top_k=900, top_p=0.5)):  # 800 ties with the 900th
        lowest, highest = draw_and_score(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), options)[
            0
        ].tolist()
        assert (lowest, highest) == (400, 599) if options.top_p is None else 400 < lowest < highest == 599
    equal = draw_and_score(torch.zeros(2, 8), torch.tensor([0.0, 0.999]), SamplingOptions(top_p=0.5))[0]
    assert equal.tolist() == [0, 3]


@KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_drawn_from_as_pytorch_does(value):
    logits = torch.randn(3, 50)
    logits[1, 30] = value
    for options in (SamplingOptions(), SamplingOptions(top_k=5), SamplingOptions(temperature=0)):
        uniform = torch.tensor([0.3, 0.6, 0.9])
        token, score = draw_and_score(logits, uniform, options)
        assert torch.equal(token, draw(logits, uniform, options))
        assert score.isnan().tolist() == [False, True, False]


# ---- where kernels are left out


class Doubling(torch.nn.Linear):
    """A layer of another kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def fed_by(model):
    with torch.no_grad(), stepping(model, 2) as step:
        return type(step)


@KERNELS
def test_only_floats_on_a_cpu_are_for_kernels(monkeypatch):
    model = random_floats()
    assert fed_by(model) is RowStepper
    assert fed_by(copy.deepcopy(model).bfloat16()) is Stepper and fed_by(random_model()) is Stepper
    with torch.autocast("cpu", torch.bfloat16):
        assert fed_by(model) is Stepper
    other = copy.deepcopy(model)
    layer = other.transformer.layers[1].feed_forward.fn
    layer.up = Doubling(layer.up.in_features, layer.up.out_features, bias=False)
    assert fed_by(other) is Stepper
    with torch.no_grad(), stepping(model, 97) as step:
        assert type(step) is Stepper
    monkeypatch.setattr(stepping_module, "_MAX_BYTES", 1000)
    assert fed_by(model) is Stepper


@torch.no_grad()
@pytest.mark.parametrize("name, value", [("DALLE_KERNELS", "off"), ("PATH", "/nonexistent")])
def test_without_kernels_pytorch_computes_the_same(name, value, fresh, monkeypatch):
    model, codes = random_floats(), random_codes(2)
    before = steps(model, codes, 1)[0]
    fresh()
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("CC", raising=False)
    found, step = steps(model, codes, 1)
    assert type(step) is Stepper
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("count", [1, 100, 12345, 300_000])
def test_all_is_read(count):
    x = torch.randint(-9, 9, (count,)).float()
    assert read_all(x) == x.double().sum().item()
    assert read_all(x.double()) is None and read_all(x.expand(2, -1).t()) is None
