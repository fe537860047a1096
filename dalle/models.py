"""minDALL-E's Python API, on this project's models.

from dalle.models import Dalle
model = Dalle.from_pretrained("minDALL-E/1.3B").to("cuda:0")      # or a folder, a checkpoint file, "demo"
images = model.sampling("a painting of a tree on the ocean", num_candidates=16)   # (16, 3, 256, 256) in [0, 1]
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from dalle.completion import Picture, completion_codes
from dalle.loading import Loaded, load
from sampling import Graphs, Sampler, SamplingOptions, Share, SoFar, Windows, first_sampled
from utils.downloads import progress_bar
from utils.errors import UserError
from utils.files import PathLike
from utils.options import as_arguments

Progress = Callable[[int, int], None]
"""Called with (codes sampled so far, codes to sample)."""

Preview = Callable[[int, SoFar], None]
"""Called with the number of a batch's first candidate, and what gives the codes of the batch so far."""


class Candidates(NamedTuple):
    """Images generated for one prompt, on the model's device."""

    images: Tensor
    """(N, 3, S, S) in [0, 1]"""
    codes: Tensor
    """(N, codes of an image)"""
    log_likelihood: Tensor
    """(N,) nats, of the sampled codes, by the model without temperature, top-k and top-p."""

    def best(self, num: int) -> Candidates:
        """The `num` likeliest candidates, the likeliest first."""
        order = torch.argsort(self.log_likelihood, descending=True)[:num]
        return Candidates(self.images[order], self.codes[order], self.log_likelihood[order])


class Dalle(nn.Module):
    """A model to sample from: `stage1` is the VQGAN, `stage2` the DALL-E, `tokenizer` its vocabulary."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.stage1, self.stage2, self.tokenizer = loaded.vqgan, loaded.dalle, loaded.tokenizer
        self._checkpoint = loaded.checkpoint
        self._graphs = Graphs(loaded.dalle)
        self._windows: dict[str, Windows] = {}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        bpe_path: PathLike | None = None,
        vqgan_model_path: PathLike | None = None,
        vqgan_config_path: PathLike | None = None,
        dtype: str = "float32",
    ) -> Dalle:
        """Load "minDALL-E/1.3B" (downloaded once, 5 GB), a folder in its layout, "demo", or any supported checkpoint.

        Vocabulary and VQGAN are given or found as in `dalle.loading.load`. dtype: "float32", "bfloat16" (half the
        memory) or "int8" (a quarter), of the transformer's weights. Raises UserError when something is missing.
        """
        with as_arguments(dalle_path="path"):
            return cls(load(path, bpe_path, vqgan_model_path, vqgan_config_path, dtype=dtype))

    @property
    def loaded(self) -> Loaded:
        """The parts, as used by the rest of `dalle`."""
        return Loaded(self.stage2, self.stage1, self.tokenizer, self._checkpoint)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.loaded.device

    @property
    def image_size(self) -> int:
        """Height and width of its images in pixels."""
        return self.loaded.image_size

    def sampling(
        self,
        prompt: str,
        top_k: int | None = 256,
        top_p: float | None = None,
        softmax_temperature: float = 1.0,
        num_candidates: int = 96,
        device: str | torch.device | None = None,
        use_fp16: bool = True,
        **options: Any,
    ) -> Tensor:
        """Generate images for a prompt: floats (num_candidates, 3, S, S) in [0, 1]. See `generate` for all options."""
        choice = (top_k, top_p, softmax_temperature)
        return self.generate(prompt, *choice, num_candidates, device, use_fp16, **options).images

    @torch.no_grad()
    def generate(  # noqa: PLR0913 - minDALL-E's positions, then ours by name
        self,
        prompt: str,
        top_k: int | None = 256,
        top_p: float | None = None,
        softmax_temperature: float = 1.0,
        num_candidates: int = 96,
        device: str | torch.device | None = None,
        use_fp16: bool = True,
        seed: int | None = None,
        cond_scale: float = 1.0,
        batch_size: int | None = None,
        progress: bool | Progress = True,
        image: Picture | None = None,
        mask: Any = None,
        parallel: str | int = "auto",
        preview: Preview | None = None,
    ) -> Candidates:
        """Generate candidates for a prompt, which is truncated to the model's text length.

        top_k: likeliest codes to sample from, including ties (None: all); top_p: of these, the likeliest up to and
        including the one that crosses this probability (None: all). softmax_temperature: 0 is greedy.
        device: moves the model there first. use_fp16: half precision in the transformer, on CUDA only, unless the
        weights are bfloat16.
        seed: candidate i depends only on it and i, whatever the batch size (up to rounding above 96, without
        native kernels and on a GPU); None: from torch's generator (`set_seed`).
        cond_scale: classifier-free guidance, for models trained with it (1: none).
        batch_size: candidates sampled at the same time; None: as many as fit. progress: a bar, none, or a function.
        image, mask: keep this picture where the mask is black, and generate where it is white (see dalle.completion).
        parallel: codes of an image that a pass guesses ahead: "auto", "off" or up to 64; the same images in less time.
        preview: called after each code. `sampling.decode_partial` makes pictures of what it is given.

        Raises UserError for invalid values.
        """
        _check_request(num_candidates, batch_size, prompt)
        sampling = SamplingOptions(top_k, top_p, softmax_temperature, cond_scale)
        sampling.check(temperature="softmax_temperature")
        if device is not None:
            self.to(device)
        config = self.stage2.config
        if (image is None) != (mask is None):
            raise UserError("image and mask belong together: the mask says which part of the image to generate")
        with as_arguments():
            given = None if image is None else completion_codes(self.loaded, image, mask)
        text = self.tokenizer.tokenize(prompt, config.text_seq_len, truncate=True)[0]
        if top_k is not None:
            sampling = sampling._replace(top_k=min(int(top_k), config.num_image_tokens))
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()))
        windows = self._windows.setdefault(str(parallel), Windows(parallel))
        sampler = Sampler(self.loaded, self._graphs, floats=True, half=use_fp16, parallel=windows)
        steps = config.image_seq_len - (0 if given is None else first_sampled(given.tolist()))
        with _Counter(progress, num_candidates, steps, preview) as counter:
            batches = sampler.images(text[None], num_candidates, batch_size, seed, sampling, given, counter.step)
            _, _, codes, likelihoods, images = zip(*batches)
        return Candidates(torch.cat(images), torch.cat(codes), torch.cat(likelihoods))


def _check_request(num_candidates: int, batch_size: int | None, prompt: str) -> None:
    problems: list[str] = []
    if not isinstance(prompt, str):
        problems.append(f"prompt must be a text, not {type(prompt).__name__!r}")
    if not isinstance(num_candidates, int) or num_candidates < 1:
        problems.append(f"num_candidates must be a whole number of at least 1, not {num_candidates!r}")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        problems.append(f"batch_size must be a whole number of at least 1, or None: as many as fit, not {batch_size!r}")
    if problems:
        raise UserError(problems[0])


class _Counter:
    """Counts codes over batches, for a progress bar or function; a retried batch is counted again from its start."""

    def __init__(self, progress: bool | Progress, num_images: int, steps: int, preview: Preview | None) -> None:
        self._preview = preview
        self._report = progress if callable(progress) else None
        self._total, self._steps = num_images * steps, steps
        self._bar = progress_bar(self._total, "sampling", "token", progress is True)
        self._done = self._shown = 0
        self._share: Share | None = None

    def __enter__(self) -> _Counter:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def step(self, share: Share, so_far: SoFar) -> None:
        """Count one sampled code of each image of a batch."""
        if self._preview is not None:
            self._preview(share.images[0], so_far)
        if share is not self._share:
            self._share, self._done = share, share.images[0] * self._steps
        self._done += share.num_images
        if self._done > self._shown:
            self._bar.update(self._done - self._shown)
            self._shown = self._done
            if self._report is not None:
                self._report(self._shown, self._total)
