"""Captions in, pictures out: which random numbers an image gets, batches over prompts and images, priming, decoding.

    for batch in Sampler(loaded).images(text, num_images=8, batch_size=4, seed=42, options=SamplingOptions(top_k=64)):
        batch.pixels        # (B, 3, S, S) uint8

The command line, evaluation, the Python API and the notebook all sample here.

Letters: B images, T text tokens, N codes of an image, G side of the code grid, S image height and width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
from collections import Counter, deque
from typing import Callable, Iterable, Iterator, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from models.dalle import DalleModel
from models.vqgan import VQGAN, image_codes
from sampling.canvas import SoFar
from sampling.decoders import Copies
from sampling.graphs import Graphs
from sampling.loop import Sampled, Shared, complete_text, sample_codes
from sampling.options import DEFAULT_OPTIONS, SamplingOptions
from sampling.windows import Windows
from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.threads import share_cores

logger = logging.getLogger(__name__)

PRIME_FRACTION = 0.4375
"""Share of the rows that a priming image gives where nothing else is said: 14 of 32, as OpenAI primed its DALL-E."""

COMPLETION_INDEX = -1
"""The "image" whose random numbers complete a caption."""

_LIKELY = 16
"""Images to try at the same time on a CPU where no batch size is given. On CUDA all: too many are noticed."""


class Model(Protocol):
    """What samples: a DALL-E and its VQGAN on one device, in eval mode."""

    @property
    def dalle(self) -> DalleModel: ...

    @property
    def vqgan(self) -> VQGAN: ...

    @property
    def device(self) -> torch.device: ...


class Share(NamedTuple):
    """What a batch samples: images of prompts, the images of a prompt next to each other."""

    prompts: tuple[int, ...]
    """The prompt of each image."""
    images: tuple[int, ...]
    """The number of each image among those of its prompt."""

    @classmethod
    def of(cls, numbers: Iterable[int], num_images: int) -> Share:
        """The images of these numbers: num_images * prompt + image."""
        places = [divmod(number, num_images) for number in numbers]
        return cls(tuple(prompt for prompt, _ in places), tuple(image for _, image in places))

    @property
    def num_images(self) -> int:
        """Images in the batch, of all its prompts."""
        return len(self.prompts)

    def to_read(self) -> tuple[int, ...]:
        """The prompts to read: each once where all have as many images, else one for each image."""
        counts = Counter(self.prompts)
        return tuple(counts) if len(set(counts.values())) == 1 else self.prompts

    def split(self, size: int) -> Iterator[Share]:
        """Parts of at most so many images."""
        for start in range(0, self.num_images, size):
            yield Share(self.prompts[start : start + size], self.images[start : start + size])


class Batch(NamedTuple):
    """Images sampled together, those of one prompt next to each other, on the CPU (floats: on the model's device)."""

    share: Share
    seeds: list[int]
    codes: Tensor
    """(B, N)"""
    log_likelihood: Tensor
    """(B,) nats, of the codes that were sampled."""
    pixels: Tensor
    """(B, 3, S, S) uint8, or floats in [0, 1]."""


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a run with --seed `seed`; below 2**48, so that any JSON reader keeps it exact.

    A hash, so that runs with neighbouring seeds have no image in common. It does not depend on the prompt: the same
    random numbers behind different prompts make them comparable.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode("ascii")).digest()[:6], "big")


def all_shares(num_prompts: int, num_images: int, batch_size: int) -> Iterator[Share]:
    """All images of all prompts, in order, in full batches."""
    total = num_prompts * num_images
    for start in range(0, total, batch_size):
        yield Share.of(range(start, min(start + batch_size, total)), num_images)


def _split(shares: Iterable[Share], size: int) -> Iterator[Share]:
    return (part for share in shares for part in share.split(size))


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> uint8, rounded; nothing is stretched, what lies outside is clamped."""
    return (pixels * 255.0 + 0.5).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def decode(model: Model, codes: Tensor) -> Tensor:
    """Codes (B, N) -> pictures (B, 3, S, S) uint8 on the CPU."""
    return to_uint8(model.vqgan.decode_by_parts(codes.to(model.device))).cpu()


def encode(model: Model, images: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) uint8 -> codes (B, N) on the CPU, those that training makes of them."""
    return image_codes(model.vqgan, images.to(model.device)).cpu()


def prime_rows(grid: int) -> int:
    """The rows of codes a priming image gives by default, at least one."""
    return max(1, int(PRIME_FRACTION * grid))


def given_codes(model: Model, image: Tensor, rows: int) -> Tensor:
    """Keep the upper `rows` rows of codes of an image (3, S, S) uint8. Returns (N,), -1 where the model samples."""
    codes = encode(model, image[None])[0]
    kept = rows * model.dalle.config.grid
    return torch.cat([codes[:kept], torch.full_like(codes[kept:], -1)])


class Sampler:
    """Samples images with one model, in batches that fit, decoded while the next batch is sampled where that helps."""

    def __init__(
        self,
        model: Model,
        graphs: Graphs | None = None,
        floats: bool = False,
        half: bool = False,
        parallel: str | int | Windows = "auto",
    ) -> None:
        """graphs: CUDA graphs of this model to use, if any. floats: pixels as floats in [0, 1], on the model's device.

        half: compute the transformer in float16 on CUDA, unless its weights are in another type than float32.
        parallel: see `Shared`.
        """
        keep_freed_memory()
        share_cores()
        self.model, self.graphs = model, graphs
        self.half = half and model.device.type == "cuda" and model.dalle.text_emb.weight.dtype == torch.float32
        self.shared = Shared(parallel)
        self._pictures = _Pictures(model, floats)

    @property
    def windows(self) -> Windows:
        """What the windows of guessed codes brought so far."""
        return self.shared.windows

    def images(  # noqa: PLR0913 - the rest by name
        self,
        text: Tensor,
        num_images: int,
        batch_size: int | None = 4,
        seed: int = 0,
        options: SamplingOptions = DEFAULT_OPTIONS,
        given: Tensor | None = None,
        on_token: Callable[[Share, SoFar], None] | None = None,
        numbers: Sequence[int] | None = None,
        shares: Iterable[Share] | None = None,
    ) -> Iterator[Batch]:
        """Sample num_images images of each caption, text (prompts, T) token ids.

        Image i gets the random numbers of `image_seed(seed, i)`, whatever the batch size and the other captions.
        batch_size: images at the same time; None: as many as fit, which is found out. given (N,): codes to keep (see
        `given_codes`). on_token is called after each code of a batch, with what gives its codes so far; a batch that
        did not fit begins again.
        numbers: of the captions; those with different ones get other random numbers.
        shares: the batches to sample; None: all images, in full batches. They are asked for one by one.
        Raises UserError where there is not enough memory.
        """
        size = batch_size or (num_images if self.model.device.type == "cuda" else min(num_images, _LIKELY))
        todo = iter(all_shares(len(text), num_images, size) if shares is None else shares)
        decoding: deque[Callable[[], Batch]] = deque()
        self.shared.copies = Copies()  # weights may have changed
        while (share := next(todo, None)) is not None:
            firsts = [0 if numbers is None else numbers[prompt] * num_images for prompt in share.prompts]
            seeds = [image_seed(seed, first + image) for first, image in zip(firsts, share.images)]
            told = None if on_token is None else functools.partial(on_token, share)
            pictures = self._start(share, text[list(share.to_read())], seeds, options, given, told)
            if pictures is None:
                if batch_size is not None or share.num_images == 1:
                    count = f"{share.num_images} image{'s' if share.num_images > 1 else ''}"
                    raise UserError(f"not enough memory for a batch of {count}: lower --batch-size")
                size = (share.num_images + 1) // 2
                logger.info("not enough memory for %d images at the same time: trying %d", share.num_images, size)
                todo = _split(itertools.chain([share], todo), size)
                continue
            decoding.append(pictures)
            if len(decoding) > self._pictures.ahead:
                yield _checked(decoding.popleft()())
        while decoding:
            yield _checked(decoding.popleft()())

    def _start(
        self,
        share: Share,
        prompts: Tensor,
        seeds: list[int],
        options: SamplingOptions,
        given: Tensor | None,
        on_token: Callable[[SoFar], None] | None,
    ) -> Callable[[], Batch] | None:
        """Sample a batch and return what waits for its pictures, or None where it does not fit into memory."""
        try:
            with torch.autocast("cuda", torch.float16) if self.half else contextlib.nullcontext():
                model, shared = self.model.dalle, self.shared
                found = sample_codes(model, prompts, seeds, options, given, on_token, self.graphs, shared)
            return self._pictures.start(share, seeds, found)
        except RuntimeError as error:  # CUDA's is a RuntimeError of its own class, the CPU's a plain one
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        # Not in the handler, which keeps the failed batch's memory alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _checked(batch: Batch) -> Batch:
    warn_of_broken_logits(batch.log_likelihood)
    return batch


def warn_of_broken_logits(log_likelihood: Tensor) -> None:
    """Say how many images, by their log-likelihoods (B,), come from logits that were infinite or not a number."""
    broken = int((~log_likelihood.isfinite()).sum())
    if broken:
        logger.warning(
            "the model's logits are not finite for %d of %d images, which show nothing of their captions: its weights "
            "are damaged, or overflow in half precision",
            broken,
            len(log_likelihood),
        )


def _room_on_host(like: Tensor) -> Tensor:
    """Memory of this size that a GPU copies to while the host does something else."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class _Pictures:
    """Decodes what was sampled. A GPU does so on a stream of its own, beside what it is asked for next."""

    def __init__(self, model: Model, floats: bool) -> None:
        self.model, self.floats = model, floats
        # One for all batches: what a stream has freed is its own to use again.
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" and not floats else None
        self.ahead = 0 if self.stream is None else 1
        """Batches that are sampled before one is handed on."""

    @torch.no_grad()
    def _decode(self, sampled: Sampled) -> tuple[Tensor, Tensor, Tensor]:
        pixels = self.model.vqgan.decode_by_parts(sampled.codes)
        return sampled.codes, sampled.log_likelihood, pixels if self.floats else to_uint8(pixels)

    def start(self, share: Share, seeds: list[int], sampled: Sampled) -> Callable[[], Batch]:
        """Begin, and return what waits for the pictures."""
        if self.stream is None:
            found = self._decode(sampled)
            return lambda: Batch(share, seeds, *(found if self.floats else (tensor.cpu() for tensor in found)))
        self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(self.stream):
            on_host = [_room_on_host(tensor).copy_(tensor, non_blocking=True) for tensor in self._decode(sampled)]
            done = torch.cuda.Event()
            done.record(self.stream)
        for tensor in sampled:
            tensor.record_stream(self.stream)

        def wait() -> Batch:
            done.synchronize()
            return Batch(share, seeds, *on_host)

        return wait


def complete_caption(model: Model, ids: Sequence[int], seed: int, options: SamplingOptions) -> list[int]:
    """Let the model go on with a caption's token ids. Returns them and what it added, at most T."""
    return complete_text(model.dalle, ids, image_seed(seed, COMPLETION_INDEX), options)
