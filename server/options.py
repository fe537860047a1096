"""The flags of serve.py."""
from __future__ import annotations

import os
from dataclasses import dataclass

from dalle.generation import clean
from dalle.loading import DEMO, DEMO_PROMPTS
from dalle.outputs import ResultOptions
from sampling import SamplingFlags
from utils.errors import UsageError
from utils.flags import DeviceOptions, ModelOptions, PartsOptions
from utils.options import Command, Options, again, option
from utils.prompt_lists import read_prompts

API_KEY_VARIABLE = "MINI_DALLE_API_KEY"
_MOST_EXAMPLES = 100


@dataclass(frozen=True)
class NetworkOptions(Options, title="network"):
    """Where to listen, and to whom."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all, so that other machines can connect")
    port: int = option(8000, "port to listen on; 0: a free one", ge=0, le=65535)
    api_key: str | None = option(None, "key that requests below /v1 must bring as a bearer token; better in the "
                                 f"environment variable {API_KEY_VARIABLE}, which other users cannot see",
                                 metavar="KEY", none="none is needed")


@dataclass(frozen=True)
class ServedOptions(Options, title="sampling"):
    """What requests get that do not say."""

    top_k: float = again(SamplingFlags, "top_k")
    top_p: float = again(SamplingFlags, "top_p")
    temperature: float = again(SamplingFlags, "temperature")
    cond_scale: float = again(SamplingFlags, "cond_scale")
    parallel: str = again(SamplingFlags, "parallel")
    dtype: str = again(ResultOptions, "dtype")
    clip_path: str | None = again(ResultOptions, "clip_path", help="CLIP model to rank images by: folder or name of a "
                                  "CLIP model of transformers")
    examples: str | None = option(None, "file of prompts for the page to offer, one a line or a list", path=True,
                                  none="those of the demo model")
    slots: int = option(32, "images sampled in the same passes; one with guidance takes two", ge=1, le=4096)
    threads: int = again(DeviceOptions, "threads")


@dataclass(frozen=True)
class LimitOptions(Options, title="limits"):
    """What requests may ask for."""

    max_images: int = option(64, "images that one request may sample", ge=1, le=65536)
    max_queue: int = option(256, "images that may wait for a slot; requests beyond are refused for now (429)", ge=1)
    max_body: int = option(16, "megabytes of a request", ge=1, le=4096)
    max_pixels: int = option(16, "megapixels of an uploaded picture", ge=1, le=1024)
    request_timeout: float = option(300.0, "seconds until an unfinished request is given up", gt=0, le=86400)
    stop_timeout: float = option(30.0, "seconds that running requests have after SIGTERM or Ctrl-C", ge=0, le=86400)
    url_ttl: float = option(3600.0, "seconds for which pictures are kept that are asked for by URL", gt=0, le=10**7)
    url_megabytes: int = option(256, "megabytes of such pictures; the oldest go first", ge=1)


@dataclass(frozen=True)
class ServeOptions(ModelOptions, PartsOptions, ServedOptions, NetworkOptions, LimitOptions):
    """The flags of serve.py."""

    model_name: str | None = option(None, "the model's id in the API", metavar="ID", none="from --dalle-path")

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.cond_scale != 1 and self.slots < 2:
            raise UsageError("--slots 1 with --cond-scale: an image with guidance takes two")
        if not self.host.strip():
            raise UsageError("--host: give an address, such as 127.0.0.1")

    def prompts(self) -> list[str]:
        """Prompts to try. Raises UserError."""
        if self.examples is None:
            return list(DEMO_PROMPTS) if self.dalle_path == DEMO else []
        prompts = [clean(prompt.text) for prompt in read_prompts(self.examples, flag="--examples")]
        return [prompt for prompt in prompts if prompt][:_MOST_EXAMPLES]

    @property
    def key(self) -> str | None:
        """The API key, if one is needed."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None


COMMAND = Command("serve.py", "Serve a model with the OpenAI images API, and a page in the browser.", ServeOptions)
