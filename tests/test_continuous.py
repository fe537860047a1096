"""Continuous batching: whatever shares a pass, each image is the one that is sampled alone."""
from __future__ import annotations

import random

import pytest
import torch
from models_for_tests import ALL, OPTIONS, TEXT, needs_kernels, primed, random_model

from sampling import SamplingOptions, Shared, sample_codes
from sampling.continuous import Continuous, Image
from utils.errors import UserError

#: Requests of every kind: options, codes that are kept.
KINDS = [
    (SamplingOptions(), None), (SamplingOptions(temperature=0), None),
    (SamplingOptions(top_k=9, temperature=0.7, cond_scale=2.5), None),
    (SamplingOptions(top_p=0.9), primed(slice(13, None))),
    (SamplingOptions(cond_scale=1.5, top_k=3), primed(slice(0, 3), slice(7, 20), [22, 35])),
    (SamplingOptions(cond_scale=0.0), primed(35)), (SamplingOptions(temperature=1.3), primed()),
    (SamplingOptions(cond_scale=3.0, top_p=0.5), primed(slice(5, 36))),
]


def images_of(count):
    return [Image(TEXT[number % 2], 100 + number, *KINDS[number % len(KINDS)]) for number in range(count)]


def run(continuous, images, chance):
    """Let images join at random moments; returns what each has become, and the most that ran at once."""
    waiting, numbers, found, most = list(enumerate(images)), {}, {}, 0
    while waiting or continuous.running:
        while waiting and continuous.fits(waiting[0][1]) and chance.random() < 0.6:
            place, image = waiting.pop(0)
            numbers[continuous.start(image)] = place
        most = max(most, len(continuous.running))
        for number in continuous.advance():
            found[numbers.pop(number)] = continuous.finish(number)
    return [found[place] for place in range(len(images))], most


def alone(model, image, parallel="off"):
    sampled = sample_codes(model, image.text, [image.seed], image.options, image.given, shared=Shared(parallel))
    return sampled.codes[0], sampled.log_likelihood[0]


@pytest.mark.parametrize("name, native, parallel", [
    *(pytest.param(name, True, parallel, marks=needs_kernels) for name in OPTIONS for parallel in ("auto", 5)),
    *((name, False, "auto") for name in ("all patterns", "rotary and shift", "stable sandwich tied")),
])
def test_images_that_join_and_leave_have_the_bits_of_images_alone(name, native, parallel):
    """By PyTorch in double precision, where rounding, which depends on the batch, changes no code."""
    model, images = random_model(**OPTIONS[name]), images_of(16 if native else 12)
    continuous = Continuous(model.float() if native else model, 5, parallel)
    assert (continuous.refused is None) == native
    found, most = run(continuous, images, random.Random(1))
    tolerance = {"rtol": 0, "atol": 0} if native else {"rtol": 1e-6, "atol": 1e-5}
    for image, sampled in zip(images, found):
        codes, log_likelihood = alone(model, image)
        assert torch.equal(sampled.codes, codes)
        torch.testing.assert_close(sampled.log_likelihood, log_likelihood, **tolerance)
    assert most > 1 and continuous.rows_of_passes > continuous.passes
    assert continuous.fits(images[2]) and not continuous.running


@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_kernels), "pytorch"])
def test_an_image_that_is_ended_frees_its_slots(kind):
    """An image in the middle is ended; the next takes its slots, and its neighbours do not notice."""
    model, images = random_model(**ALL), images_of(4)
    model = model.float() if kind == "native" else model
    continuous = Continuous(model, 4)
    first, ended = continuous.start(images[0]), continuous.start(images[2])
    assert continuous.fits(images[0]) and not continuous.fits(images[2])
    continuous.advance()
    so_far = continuous.codes(ended)
    assert so_far.shape == (36,) and so_far[0] >= 0 and so_far[35] < 0
    continuous.finish(ended)
    later, done = continuous.start(images[2]), set()
    while len(done) < 2:
        done |= set(continuous.advance())
    for number, image in ((first, images[0]), (later, images[2])):
        assert torch.equal(continuous.finish(number).codes, alone(model, image)[0])


def test_kept_codes_are_certain_from_the_start():
    continuous = Continuous(random_model(), 1)
    number = continuous.start(Image(TEXT[0], 1, given=primed()))
    assert continuous.advance() == [number] and continuous.passes == 0
    assert torch.equal(continuous.finish(number).codes, primed())


def test_bad_options_are_refused_and_take_no_slot():
    continuous = Continuous(random_model(), 2)
    with pytest.raises(UserError, match="temperature must be"):
        continuous.start(Image(TEXT[0], 1, SamplingOptions(temperature=-1.0)))
    with pytest.raises(UserError, match="slots must be at least 1, got 0"):
        Continuous(random_model(), 0)
    assert continuous.fits(images_of(3)[2])
