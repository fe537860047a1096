"""Windows of guessed codes: the same images in fewer passes, whatever model, width, noise and codes are given."""
from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
from helpers import in_threads
from models_for_tests import OPTIONS, TEXT, needs_guesses, needs_kernels, primed, random_model

from dalle.loading import load
from sampling import SamplingOptions, Shared, Windows, image_seed, native, sample_codes
from utils.errors import UserError

#: What is sampled beside the plain case: seeds, captions, options, given codes.
CASES = {
    "one image": ([3], TEXT[0], SamplingOptions(), None),
    "greedy": ([3], TEXT[0], SamplingOptions(temperature=0), None),
    "guided": ([4, 5, 6], TEXT[0], SamplingOptions(top_k=9, temperature=0.7, cond_scale=2.5), None),
    "several captions": ([1, 2, 3, 4, 5, 6], TEXT, SamplingOptions(top_p=0.9), None),
    "primed": ([1, 2, 3], TEXT[0], SamplingOptions(), primed(slice(13, None))),
    "completed": ([1, 2, 3, 4], TEXT, SamplingOptions(cond_scale=1.5), primed(slice(0, 3), slice(7, 20), [22, 35])),
}


def sampled(model, case, parallel):
    """Codes and log-likelihoods, and the windows that gave them."""
    seeds, text, options, given = CASES[case]
    shared = Shared(parallel)
    return sample_codes(model, text, seeds, options, given, shared=shared), shared.windows


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_native_windows_give_the_same_bits(options, case):
    model = random_model(**options).float()
    expected, alone = sampled(model, case, "off")
    for parallel in (3, 64):
        found, windows = sampled(model, case, parallel)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.log_likelihood, expected.log_likelihood)
        assert windows.codes == alone.codes == alone.passes and windows.passes <= alone.passes
        assert windows.codes_per_pass > 1 or case == "greedy"


@pytest.mark.parametrize("case, parallel", [("one image", 64), ("guided", 3), ("completed", 8)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_windows_of_pytorch_give_the_same_codes(options, case, parallel):
    """In double precision, where rounding, which depends on the width, changes no code."""
    model = random_model(**options)
    expected, _ = sampled(model, case, "off")
    found, windows = sampled(model, case, parallel)
    assert torch.equal(found.codes, expected.codes) and windows.codes_per_pass > 1
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "count, by_pytorch",
    [(12, False), *(pytest.param(200, by_pytorch, marks=pytest.mark.slow) for by_pytorch in (False, True))],
    ids=["12 captions", "200 captions", "200 captions by PyTorch"],
)
@needs_kernels
def test_the_demo_model_samples_the_same_images_in_fewer_passes(count, by_pytorch, monkeypatch):
    """Captions, seeds and settings in turn, alone and two at once. PyTorch's logits may decide a tie differently."""
    if by_pytorch:
        monkeypatch.setattr(native, "refusal", lambda model, rows: "by PyTorch")
    loaded = load("demo")
    captions = ["red apple", "pizza", "octopus", "flag: Italy", "wolf", "rainbow", "grinning cat", "snowman", "guitar"]
    settings = [
        SamplingOptions(top_k=top_k, top_p=top_p, temperature=temperature)
        for top_k, top_p, temperature in itertools.product((10, None, 64), (None, 0.9), (1.0, 0.7, 1.3))
    ]
    codes = passes = ties = 0
    for number in range(count):
        text = loaded.tokenizer.tokenize(captions[number % len(captions)], loaded.config.text_seq_len)[0]
        seeds, options = [image_seed(7, number + i) for i in range(1 + number % 2)], settings[number % len(settings)]
        expected = sample_codes(loaded.dalle, text, seeds, options, shared=Shared("off"))
        shared = Shared((8, 16, "auto")[number % 3])
        found = sample_codes(loaded.dalle, text, seeds, options, shared=shared)
        if by_pytorch:
            ties += int((found.codes != expected.codes).any(dim=1).sum())
        else:
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.log_likelihood, expected.log_likelihood)
        codes, passes = codes + shared.windows.codes, passes + shared.windows.passes
    assert codes / passes > 1.5 and ties <= count // 100


@needs_guesses
@pytest.mark.parametrize(
    "options, dtype",
    [({}, "float32"), ({"top_k": 10, "cond_scale": 2.0}, "float32"), ({}, "int8")],
    ids=["", "guided", "int8"],
)
def test_guesses_are_nearly_always_right(options, dtype):
    """With int8 weights there are no guesses: one would read as many bytes as a pass."""
    loaded, shared = load("demo", dtype=dtype), Shared(8)
    text = loaded.tokenizer.tokenize(["red apple", "wolf"], loaded.config.text_seq_len)
    sample_codes(loaded.dalle, text, [1, 2], SamplingOptions(**options), shared=shared)
    assert (shared.windows.codes_per_pass > 5) == (dtype == "float32")


# ---- the width of a window


def simulate(windows, rows, cost, accept, passes=200, most_rows=96):
    """Passes that take cost(rows) seconds and give accept(width) codes. Returns codes per second."""
    codes = seconds = 0.0
    for _ in range(passes):
        width = windows.width(rows, most_rows)
        assert width >= 1 and rows * width <= max(most_rows, rows)
        count = accept(width)
        windows.note(rows * width, width, [count] * rows, cost(rows * width))
        codes, seconds = codes + count, seconds + cost(rows * width)
    return codes / seconds


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("slope", [0.01, 0.1, 1.0])
def test_the_width_follows_what_windows_bring_and_cost(rows, right, slope):
    """Close to the best fixed width, and never much slower than a code per pass."""
    chance = torch.Generator().manual_seed(1)

    def accept(width):
        wrong = (torch.rand(width, generator=chance) >= right).nonzero()
        return min(width, 1 + int(wrong[0, 0]) if len(wrong) else width)

    def cost(rows):
        return 1 + slope * rows

    found = simulate(Windows(), rows, cost, accept, passes=600)
    fixed = [simulate(Windows(width), rows, cost, accept) for width in (1, 2, 4, 8, 16, 32) if rows * width <= 96]
    assert found > 0.97 * fixed[0] and found > 0.6 * max(fixed)


@pytest.mark.parametrize("guessing, widest", [(0.3, 64), (5.0, 1)])
def test_the_width_follows_what_guesses_cost(guessing, widest):
    windows, chosen = Windows(), []
    for _ in range(400):
        chosen.append(windows.width(1, 96))
        windows.note(chosen[-1], chosen[-1], [chosen[-1]], 1 + 0.2 * chosen[-1], guessing * (chosen[-1] - 1))
    assert sorted(chosen[200:])[100] == widest


def test_guesses_are_tried_again_after_the_machine_was_busy():
    """The first guesses after passes without them are slow: their weights are not in the cache."""
    windows, chosen = Windows(), [1]
    for number in range(3000):
        slow = 20 if 200 < number < 600 else 1
        chosen.append(windows.width(1, 96))
        guess = slow * (5.0 if chosen[-2] == 1 else 0.5)
        seconds = slow * (1 + 0.1 * chosen[-1])
        windows.note(chosen[-1], chosen[-1], [chosen[-1]], seconds, guess * (chosen[-1] - 1))
        if number == 599:  # by chance none is wide while others run
            windows._choice, windows._guess = ((1, 96), 1), {1: 100.0}
    assert sorted(chosen[-500:])[250] > 2


def test_without_timing_the_width_follows_from_the_configuration():
    assert [Windows().fixed(rows, on_gpu=True) for rows in (1, 4, 8, 16, 32, 100)] == [8, 8, 4, 2, 1, 1]
    assert [Windows().fixed(rows, on_gpu=False) for rows in (1, 2, 4, 100)] == [4, 2, 1, 1]
    assert Windows("off").fixed(1, True) == 1 and Windows(12).fixed(100, False) == 12
    windows = Windows(12)
    assert windows.width(8, 96) == 12 == windows.about["window"]
    assert windows.width(9, 96) == 10 and windows.about["window"] is None
    assert Windows("off").width(1, 96) == 1 and Windows("12").width(1, 96) == 12 and Windows(12).width(32, 96) == 3


def test_threads_may_share_windows():
    """Requests to one `Dalle` from several threads do."""
    def count(windows):
        for rows in range(90, 10, -1):
            windows.note(rows, 1, [1], 1e-3)
            windows.width(1, 96)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            in_threads(*[functools.partial(count, Windows())] * 4)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("value", ["on", "0", "65", 0, 65, -1, True, 2.5, None, ""])
def test_what_is_no_width_is_refused(value):
    with pytest.raises(UserError, match="parallel must be auto, off or a number of codes from 1 to 64, got "):
        Windows(value)
