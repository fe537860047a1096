"""Parameters of requests, declared as flags are, and errors in the form of OpenAI's API."""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from dalle.generation import clean
from sampling import SamplingFlags
from utils.errors import UsageError, UserError, nearest
from utils.options import REQUIRED, Options, again, as_arguments, option, options_of

MAX_PROMPT = 32000
"""Characters of a prompt, as in OpenAI's API."""

FORMATS = ("png", "jpeg", "webp")
QUALITY, BACKGROUND = "auto", "opaque"
"""What events say of these parameters."""

SAMPLING = ("temperature", "top_k", "top_p", "cond_scale")
"""Parameters that are flags of generate.py, too."""

#: Parameters of OpenAI's API that a model here has no use for, and the values that ask for nothing special.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quality": ("auto",), "background": ("auto", "opaque"), "moderation": ("auto", "low"), "input_fidelity": ("low",),
    "style": (), "complexity": (), "frame_count": (), "frame_duration_ms": (), "svg": (), "markup": (),
}  # fmt: skip


class ApiError(Exception):
    """An error as the client gets it."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, retry: int = 0
    ) -> None:
        """retry: seconds after which the client may try again; 0: not said."""
        super().__init__(message)
        self.param, self.code, self.status, self.retry = param, code, status, retry

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _prompt(text: str) -> str:
    if len(text) > MAX_PROMPT:
        return f"at most {MAX_PROMPT} characters"
    return "" if clean(text) and "\0" not in text else "a text"


@dataclass(frozen=True)
class ImageRequest(Options, title="parameters"):
    """The parameters of /v1/images/generations; /v1/images/edits has the files image and mask in addition."""

    prompt: str = option(REQUIRED, "what the images show; the model reads only its first tokens", check=_prompt)
    model: str | None = option(None, "id of the model", none="the one that is served")
    n: int = option(1, "images to return", ge=1)
    size: str = option("auto", "auto, or the size of the model's images, such as 64x64")
    response_format: str = option("b64_json", "pictures as base64, or as URLs that expire", choices=("b64_json", "url"))
    output_format: str = option("png", "file format; a PNG holds prompt, seed and options as text", choices=FORMATS)
    output_compression: int | None = option(None, "quality of jpeg and webp in percent", ge=0, le=100,
                                            none="95, and without loss")
    stream: bool = option(False, "send events: partial pictures, and each picture when it is complete")
    partial_images: int = option(0, "partial pictures of each image; fewer if it is complete sooner", ge=0, le=3,
                                 needs="stream")
    user: str | None = option(None, "accepted and ignored; so is safety_identifier")
    safety_identifier: str | None = option(None, "as user")
    seed: int | None = option(None, "image i of a seed is the same as with generate.py --seed", ge=0, le=2**63 - 1,
                              none="random; the answer says which")
    first_image: int = option(0, "number i of the first image: to get one of several again, by itself", ge=0, le=10**9)
    temperature: float = again(SamplingFlags, "temperature")
    top_k: float = again(SamplingFlags, "top_k")
    top_p: float = again(SamplingFlags, "top_p")
    cond_scale: float = again(SamplingFlags, "cond_scale")
    num_candidates: int | None = option(None, "images to sample, of which the best n are returned", ge=1, none="n")
    rank: str | None = option(None, "order of the images", choices=("none", "likelihood", "clip"),
                              none="none; with num_candidates above n clip where the server has it, else likelihood")

    def check(self) -> None:
        """Raise UsageError for parameters that contradict each other."""
        if self.sampled < self.n:
            raise UsageError(f"--num-candidates must be at least --n {self.n}, got {self.num_candidates}")
        if self.rank == "none" and self.sampled > self.n:
            raise UsageError("--rank none: with --num-candidates above --n there must be an order")
        if self.partial_images and self.sampled > self.n:
            raise UsageError("--partial-images: with --num-candidates above --n it is not known which images stay")
        if self.stream and self.response_format == "url":
            raise UsageError("--response-format url: events have their pictures as b64_json")
        if self.output_compression is not None and self.output_format == "png":
            raise UsageError("--output-compression needs --output-format jpeg or webp")

    @property
    def sampled(self) -> int:
        """How many images are sampled."""
        return self.n if self.num_candidates is None else self.num_candidates


SPECS = {spec.name: spec for spec in options_of(ImageRequest)}


def read_request(given: Mapping[str, Any], defaults: Mapping[str, Any], is_text: bool = False) -> ImageRequest:
    """Check parameters and fill in defaults. is_text: they are fields of a form. Raises ApiError naming one."""
    values = dict(defaults)
    for name, value in given.items():
        if value is None:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                known = " or ".join(map(repr, NEUTRAL[name]))
                way_out = f"only {known} is accepted" if known else "leave it out"
                raise ApiError(f"{name} is not supported by this server: {way_out}", name, "unsupported_parameter")
        elif name not in SPECS:
            near = nearest(name, SPECS)
            raise ApiError(f"Unknown parameter: '{name[:80]}'.{near}", name[:80], "unknown_parameter")
        else:
            with _named(name):
                values[name] = SPECS[name].checked(value, where=name, is_text=is_text)
    if not values.get("prompt"):
        raise ApiError("prompt is missing: give a text", "prompt", "missing_required_parameter")
    with _named(None), as_arguments():
        return ImageRequest(**dict(values, prompt=clean(values["prompt"])))


@contextlib.contextmanager
def _named(name: str | None) -> Iterator[None]:
    """Within the context, UserErrors become ApiErrors of a parameter; None: of the first word of the message."""
    try:
        yield
    except UserError as error:
        raise ApiError(str(error), name or str(error).split()[0].rstrip(":"), "invalid_value") from error


def about_format(request: ImageRequest, size: str) -> dict[str, Any]:
    """The fields that answers and events share."""
    return {"background": BACKGROUND, "output_format": request.output_format, "size": size}


def usage(text_tokens: int, image_tokens: int, sampled: int) -> dict[str, Any]:
    """Tokens of a request: of its prompt, of the picture that is kept, and those that were sampled."""
    return {
        "input_tokens": text_tokens + image_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": image_tokens},
        "output_tokens": sampled,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": sampled},
        "total_tokens": text_tokens + image_tokens + sampled,
    }


def event(kind: str, request: ImageRequest, size: str, **fields: Any) -> dict[str, Any]:
    """An event of a stream: `kind` is its type."""
    common = dict(about_format(request, size), quality=QUALITY, created_at=int(time.time()))
    return {"type": kind, **common, **fields}


def sampling_of(request: ImageRequest) -> dict[str, Any]:
    """The options of sampling by their flags' names, as pictures and history hold them."""
    return {name: getattr(request, name) for name in SAMPLING}
