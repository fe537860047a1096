"""Captions in, pictures out: which random numbers an image gets, batches over prompts and images, priming, decoding.

Letters: B images, T text tokens, N codes of an image, G side of the code grid, S image height and width.
"""

import contextlib
import functools
import hashlib
import logging
from collections import deque
from typing import Callable, Deque, Iterator, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from dalle.loading import Loaded
from models.graphs import Graphs
from models.sampling import Drawn, SamplingOptions, complete_text, draw_codes
from models.vqgan import image_codes
from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.threads import share_cores

logger = logging.getLogger(__name__)

PRIME_FRACTION = 0.4375
"""Share of the rows that a priming image gives where nothing else is said: 14 of 32, as OpenAI primed its DALL-E."""

COMPLETION_INDEX = -1
"""The "image" whose random numbers complete a caption."""


PLAIN = SamplingOptions()
"""All codes, drawn with the probabilities the model gives them."""


class Share(NamedTuple):
    """What one batch draws: images first_image up to end_image of each of the prompts first_prompt up to end_prompt."""

    first_prompt: int
    end_prompt: int
    first_image: int
    end_image: int

    @property
    def num_images(self) -> int:
        """Images in the batch, of all its prompts."""
        return (self.end_prompt - self.first_prompt) * (self.end_image - self.first_image)


class Batch(NamedTuple):
    """Images drawn together, those of one prompt next to each other, on the CPU."""

    share: Share
    seeds: List[int]
    codes: Tensor
    """(B, N)"""
    log_likelihood: Tensor
    """(B,) nats, of the codes that were drawn."""
    pixels: Tensor
    """(B, 3, S, S) uint8"""


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a run with --seed `seed`; below 2**48, so that any JSON reader keeps it exact.

    A hash, so that runs with neighbouring seeds have no image in common. It does not depend on the prompt: the same
    random numbers behind different prompts make them comparable.
    """
    return int.from_bytes(hashlib.sha256("{}/{}".format(seed, index).encode("ascii")).digest()[:6], "big")


def shares(num_prompts: int, num_images: int, batch_size: int) -> Iterator[Share]:
    """Split num_images of each prompt into batches of at most batch_size; several prompts share one where they fit."""
    together = max(1, batch_size // num_images)
    for prompt in range(0, num_prompts, together):
        for image in range(0, num_images, batch_size):
            yield Share(prompt, min(prompt + together, num_prompts), image, min(image + batch_size, num_images))


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> uint8, rounded; nothing is stretched, what lies outside is clamped."""
    return (pixels * 255.0 + 0.5).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def decode(loaded: Loaded, codes: Tensor) -> Tensor:
    """Codes (B, N) -> pictures (B, 3, S, S) uint8 on the CPU."""
    return to_uint8(loaded.vqgan.decode_by_parts(codes.to(loaded.device))).cpu()


def encode(loaded: Loaded, images: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) uint8 -> codes (B, N) on the CPU, those that training makes of them."""
    return image_codes(loaded.vqgan, images.to(loaded.device)).cpu()


def prime_rows(grid: int) -> int:
    """The rows of codes a priming image gives by default, at least one."""
    return max(1, int(PRIME_FRACTION * grid))


def given_codes(loaded: Loaded, image: Tensor, rows: int) -> Tensor:
    """Keep the upper `rows` rows of codes of an image (3, S, S) uint8. Returns (N,), -1 where the model shall draw."""
    codes = encode(loaded, image[None])[0]
    kept = rows * loaded.config.grid
    return torch.cat([codes[:kept], torch.full_like(codes[kept:], -1)])


def draw_images(
    loaded: Loaded,
    text: Tensor,
    num_images: int,
    batch_size: int = 4,
    seed: int = 0,
    options: SamplingOptions = PLAIN,
    given: Optional[Tensor] = None,
    on_token: Optional[Callable[[Share], None]] = None,
    cuda_graphs: bool = True,
) -> Iterator[Batch]:
    """Draw num_images images of each caption, text (prompts, T) token ids, in batches of at most batch_size.

    Image i gets the random numbers of `image_seed(seed, i)`, whatever the batch size and the other captions. given
    (N,): codes to keep (see `given_codes`). on_token is called after each code of a batch. cuda_graphs: whether a GPU
    may replay recorded steps (see models/graphs.py). There a batch is decoded, and handed on, while the next is drawn.
    """
    keep_freed_memory()
    share_cores()
    graphs = Graphs(loaded.dalle) if cuda_graphs else None
    decoder = _Decoder(loaded)
    decoding: Deque[Callable[[], Batch]] = deque()
    for share in shares(len(text), num_images, batch_size):
        own = [image_seed(seed, index) for index in range(share.first_image, share.end_image)]
        seeds = own * (share.end_prompt - share.first_prompt)
        with _memory_errors():
            drawn = draw_codes(
                loaded.dalle,
                text[share.first_prompt : share.end_prompt],
                seeds,
                options,
                given,
                None if on_token is None else functools.partial(on_token, share),
                graphs,
            )
            decoding.append(decoder.start(share, seeds, drawn))
        if len(decoding) > decoder.ahead:
            yield _checked(decoding.popleft()())
    while decoding:
        yield _checked(decoding.popleft()())


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


class _Decoder:
    """Decodes what was drawn. A GPU does so on a stream of its own, beside what it is asked for next."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        # One for all batches: what a stream has freed is its own to use again.
        self.stream = torch.cuda.Stream(loaded.device) if loaded.device.type == "cuda" else None
        self.ahead = 0 if self.stream is None else 1
        """Batches that are drawn before one is handed on."""

    def start(self, share: Share, seeds: List[int], drawn: Drawn) -> Callable[[], Batch]:
        """Begin, and return what waits for the pictures."""
        if self.stream is None:
            pixels = decode(self.loaded, drawn.codes)
            return lambda: Batch(share, seeds, drawn.codes.cpu(), drawn.log_likelihood.cpu(), pixels)
        self.stream.wait_stream(torch.cuda.current_stream(self.loaded.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            pixels = to_uint8(self.loaded.vqgan.decode_by_parts(drawn.codes))
            found = (drawn.codes, drawn.log_likelihood, pixels)
            on_host = [_room_on_host(tensor).copy_(tensor, non_blocking=True) for tensor in found]
            done = torch.cuda.Event()
            done.record(self.stream)
        for tensor in drawn:
            tensor.record_stream(self.stream)

        def wait() -> Batch:
            done.synchronize()
            return Batch(share, seeds, *on_host)

        return wait


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # CUDA's is a RuntimeError of its own class, the CPU's a plain one
        if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError("not enough memory for a batch of this size: lower --batch_size") from error
        raise


def complete_caption(loaded: Loaded, ids: Sequence[int], seed: int, options: SamplingOptions) -> List[int]:
    """Let the model go on with a caption's token ids. Returns them and what it added, at most T."""
    return complete_text(loaded.dalle, ids, image_seed(seed, COMPLETION_INDEX), options)
