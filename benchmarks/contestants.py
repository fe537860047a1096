"""One contestant of compare_peers.py, in a process of its own: its memory is its own, and so is what it imports.

    python -m benchmarks.contestants NAME TASK --config L16 ...

reads one JSON object a line from stdin (what to do) and answers with one on stdout (seconds it took). Every contestant
has the same shape of model with random weights, the same random captions, codes and images.
"""
from __future__ import annotations

import importlib
import json
import sys
import time
import types
from dataclasses import dataclass, replace
from typing import Any, Callable

import torch
from torch import Tensor

import args
import engines
import ops
from bpe import load_tokenizer
from dalle.loading import DEMO, DEMO_PROMPTS, load
from engines.memory import peak_bytes
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN
from sampling import Graphs, SamplingOptions, Shared, Windows, sample_codes
from training.setup import dalle_config, vqgan_config
from utils.errors import run_main
from utils.flags import DeviceOptions
from utils.memory import keep_freed_memory
from utils.options import REQUIRED, Command, Options, again, option

OURS = "Mini DALL-E"
ONE_CODE = "Mini DALL-E (one code per pass)"
SHIPPED = "Mini DALL-E (shipped demo model)"
WITHOUT_GRAPHS = "Mini DALL-E (no CUDA graphs)"
PLAIN = "naive baseline"
PEER = "DALLE-pytorch"
REPAIRED = "DALLE-pytorch (cache repaired)"
NAMES = (OURS, ONE_CODE, SHIPPED, WITHOUT_GRAPHS, PLAIN, PEER, REPAIRED)
OLD_NAMES = {
    "Mini DALL-E, no CUDA graphs": WITHOUT_GRAPHS,
    "published algorithm": PLAIN,
    "dalle-pytorch": PEER,
    "dalle-pytorch, cache passed on": REPAIRED,
    "DALLE-pytorch, cache repaired": REPAIRED,
}
"""Names in older reports."""

TRAIN_CODES, TRAIN_IMAGES, GENERATE = "train on codes", "train on images", "generate"
WINDOWS = "windows"
TASKS = (TRAIN_CODES, TRAIN_IMAGES, GENERATE, WINDOWS)

#: The share of the logits that is dropped before sampling: DALLE-pytorch's filter_thres for all.
DROPPED = 0.5

#: Packages that dalle-pytorch 1.6.6 imports and no part of it needs here, with the names it takes from them.
STUBS: dict[str, tuple[str, ...]] = {
    "requests": (),
    "omegaconf": ("OmegaConf",),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "pkg_resources": ("get_distribution",),
}


@dataclass(frozen=True)
class SettingOptions(Options):
    """Which model, and how it computes: the same for all contestants."""

    config: str = again(args.Selection, "config", default="L16", help="configuration")
    device: str = again(DeviceOptions, "device", default="cpu", choices=("cpu", "cuda"), help="where to compute")
    precision: str = again(args.ExecutionConfig, "precision", default="fp32", choices=("fp32", "bf16", "fp16"),
                           help="arithmetic of the transformer")
    matmul_precision: str | None = again(DeviceOptions, "matmul_precision")
    threads: int = again(DeviceOptions, "threads")
    batch_size: int = option(2, "samples of a training step", ge=1)
    compile: bool = option(False, "this project trains with torch.compile")


@dataclass(frozen=True)
class ContestantOptions(SettingOptions):
    """The options of this command."""

    name: str = option(REQUIRED, "who", choices=NAMES, positional=True, metavar="NAME")
    task: str = option(REQUIRED, "does what", choices=TASKS, positional=True, metavar="TASK")
    grid: int = option(0, "codes along a side; 0: as configured", ge=0)


COMMAND = Command("python -m benchmarks.contestants", "Do what lines on stdin say.", ContestantOptions)


def settings(options: SettingOptions) -> args.Config:
    """The configuration, one micro-batch a step, nothing read and nothing written."""
    flags = ["--config", options.config, "--generated-data", "--batch-size", str(options.batch_size)]
    flags += ["--gradient-accumulation", "1", "--replication-factor", "1", "--device", options.device]
    flags += ["--precision", options.precision]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    if options.device == "cuda":  # recomputing saves memory, which peers do without and a model's FLOPs do not count
        flags += ["--activation-checkpointing", "false"]
    if options.compile:
        flags += ["--compile"]
    # Blocks that peers lack or do without, and arithmetic that they were not asked for, would not compare.
    lacking = {"qk_norm": False, "rotary_2d": False, "shift_tokens": False, "value_residual": False}
    return args.parse(flags).replace(matmul_precision=options.matmul_precision, **lacking)


def shape(config: args.Config, grid: int = 0) -> tuple[DalleConfig, VQGAN]:
    """The model of a configuration and its VQGAN, of the published size where none is named, with random weights."""
    own = vqgan_config(config)
    vqgan = VQGAN(replace(own, resolution=grid * own.downsampling) if grid else own)
    wanted = dalle_config(config, load_tokenizer(config.data.bpe_path), vqgan)
    return replace(wanted, grid=grid or wanted.grid), vqgan.eval().requires_grad_(False)


def channels_last(vqgan: VQGAN) -> VQGAN:
    """Store its convolutions as this project does when it loads one."""
    torch.nn.utils.convert_conv2d_weight_memory_format(vqgan, torch.channels_last)
    return vqgan


class Contestant:
    """What every contestant has: the shape, random inputs, a device."""

    optimizer: torch.optim.Optimizer

    def __init__(self, options: ContestantOptions) -> None:
        self.config = settings(options)
        self.engine = engines.create(self.config)  # checks the device, sets threads and precision
        self.device = torch.device(options.device)
        self.shape, self.vqgan = shape(self.config, options.grid)
        self.batch = options.batch_size
        self.autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
        torch.manual_seed(0)
        self.text = torch.randint(1, self.shape.num_text_tokens, (self.batch, self.shape.text_seq_len))
        self.codes = torch.randint(self.shape.num_image_tokens, (self.batch, self.shape.image_seq_len))
        side = self.vqgan.image_size
        self.images = torch.randint(256, (self.batch, 3, side, side), dtype=torch.uint8)

    def half(self) -> Any:
        """Autocast in the precision asked for."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def prepare(self, task: str) -> None:
        """Build what the task needs."""
        raise NotImplementedError

    def train(self) -> None:
        """Take one optimizer step over the batch."""
        raise NotImplementedError

    def _descend(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def token(self, position: int, images: int) -> None:
        """Sample the code at one position for so many images, all before it given: only where this costs what it costs
        within a whole image."""
        raise NotImplementedError

    def sample(self, images: int) -> None:
        """Sample the codes of so many images of one caption, and decode them."""
        raise NotImplementedError

    def decode(self, images: int) -> None:
        """Decode so many images."""
        codes = self.codes[:1].expand(images, -1).to(self.device)
        with torch.no_grad():
            self.vqgan.decode(codes)


class Ours(Contestant):
    """This project, through the engine that train.py uses and the sampler that generate.py uses."""

    graphs_enabled = True
    """Whether a GPU replays CUDA graphs."""
    parallel = "auto"
    """See `sampling.Windows`."""

    def prepare(self, task: str) -> None:
        if task == TRAIN_CODES:  # as in train.py, which needs no VQGAN any more when all is encoded
            self.vqgan = self.vqgan.to("meta")
        else:
            self.vqgan = channels_last(self.vqgan).to(self.device)
        if task in (GENERATE, WINDOWS):
            keep_freed_memory()  # as sampling.Sampler does
            dalle, self.prompts = self.sampled_from()
            self.dalle = dalle.eval().to(self.device, self.autocast or torch.float32)
            self.graphs = Graphs(self.dalle) if self.graphs_enabled else None
            self.shared = Shared()
            self.windows: dict[str | int, Windows] = {}
            return
        model = TextToImage(DalleModel(self.shape), self.vqgan if task == TRAIN_IMAGES else None)
        self.inputs = self.images if task == TRAIN_IMAGES else self.codes
        self.engine.prepare(model)

    def train(self) -> None:
        self.engine.step([(self.text, self.inputs)])

    def sampled_from(self) -> tuple[DalleModel, Tensor]:
        """The model that samples, and its prompts (count, T)."""
        return DalleModel(self.shape), self.text[:1]

    def _codes(self, prompt: int, images: int, parallel: str | int) -> Tensor:
        options = SamplingOptions(top_k=int(self.dalle.config.num_image_tokens * (1 - DROPPED)))
        seeds, text = list(range(images)), self.prompts[prompt]
        self.shared.windows = self.windows.setdefault(parallel, Windows(parallel))  # as of one sampling.Sampler
        return sample_codes(self.dalle, text, seeds, options, graphs=self.graphs, shared=self.shared).codes

    def sample(self, images: int) -> None:
        codes = self._codes(0, images, self.parallel)
        with torch.no_grad():
            self.vqgan.decode_by_parts(codes)

    def window(self, width: int) -> dict[str, Any]:
        """Sample the codes of one image of each prompt, so many in one pass."""
        for prompt in range(len(self.prompts)):
            self._codes(prompt, 1, width)
        codes = (self.dalle.config.image_seq_len - 1) * len(self.prompts)  # the first comes with the caption
        return {"codes_per_pass": self.windows[width].codes_per_pass, "codes": codes}


class OneCode(Ours):
    """The same with a pass for each code."""

    parallel = "off"


class Shipped(Ours):
    """The demo's model as it is shipped: how many guesses are right depends on what a model has learned."""

    def sampled_from(self) -> tuple[DalleModel, Tensor]:
        loaded = load(DEMO)
        return loaded.dalle, loaded.tokenizer.tokenize(DEMO_PROMPTS, loaded.config.text_seq_len)


class WithoutGraphs(Ours):
    """The same on a GPU with every step launched by itself."""

    graphs_enabled = False


class Plain(Contestant):
    """The naive baseline, on this project's layers: images encoded in each step, dense masks, the whole sequence again
    for each code, with logits for every position."""

    def prepare(self, task: str) -> None:
        self.dalle = DalleModel(self.shape).to(self.device)
        self.vqgan = self.vqgan.to(self.device)
        self.model = TextToImage(self.dalle, self.vqgan)
        if task == GENERATE:
            self.model.eval().to(self.autocast or torch.float32)
        else:
            self.optimizer = torch.optim.Adam(self.dalle.parameters(), lr=1e-4)

    def train(self) -> None:
        codes = self.model.codes(self.images.to(self.device))
        with self.half():
            loss = self.model(self.text.to(self.device), codes).total
        self._descend(loss)

    @torch.no_grad()
    def token(self, position: int, images: int) -> None:
        text = self.text[:1].expand(images, -1).to(self.device)
        codes = self.codes[:1].expand(images, -1).to(self.device)
        _, logits = self.dalle(text, codes)  # unused positions are padded: the original application's shapes are fixed
        keys = torch.arange(images, device=self.device)
        choice = ops.choice_of(images, 1.0, logits.shape[-1] // 2, None, self.device)
        ops.sample(logits[:, position], keys, torch.full_like(keys, position), choice)

    def sample(self, images: int) -> None:
        for position in range(self.shape.image_seq_len):
            self.token(position, images)
        self.decode(images)


class Peer(Contestant):
    """dalle-pytorch 1.6.6 as it is; its VQGAN is ours, with the same layers, stored as it stores them."""

    for_inference = False

    def prepare(self, task: str) -> None:
        package = import_peer()
        inner = self.vqgan = self.vqgan.to(self.device)

        class Codes(package.VQGanVAE):  # type: ignore[misc, name-defined]
            """What dalle-pytorch asks of a VQGAN."""

            def __init__(self) -> None:
                torch.nn.Module.__init__(self)
                self.inner, self.channels = inner, 3
                self.image_size, self.num_tokens = inner.image_size, inner.num_codes
                self.num_layers = inner.config.downsampling.bit_length() - 1

            def get_codebook_indices(self, images: Tensor) -> Tensor:
                with torch.no_grad():
                    return inner.encode(images)

            def decode(self, codes: Tensor) -> Tensor:
                return inner.decode(codes)

        wanted = self.shape
        self.dalle = package.DALLE(
            dim=wanted.dim,
            vae=Codes(),
            num_text_tokens=wanted.num_text_tokens,
            text_seq_len=wanted.text_seq_len,
            depth=wanted.depth,
            heads=wanted.heads,
            dim_head=wanted.dim_head,
            attn_types=tuple(wanted.attn_types),
            loss_img_weight=wanted.loss_img_weight,
            shift_tokens=False,
            rotary_emb=False,
            optimize_for_inference=self.for_inference,
        ).to(self.device)
        if task == GENERATE:
            self.dalle.eval()
        else:
            parameters = [p for p in self.dalle.parameters() if p.requires_grad]
            self.optimizer = torch.optim.Adam(parameters, lr=1e-4)
            self.inputs = self.images.float() / 255 if task == TRAIN_IMAGES else self.codes

    def train(self) -> None:
        with self.half():
            loss = self.dalle(self.text.to(self.device), self.inputs.to(self.device), return_loss=True)
        self._descend(loss)

    @torch.no_grad()
    def token(self, position: int, images: int) -> None:
        text = self.text[:1].expand(images, -1).to(self.device)
        codes = self.codes[:1, :position].expand(images, -1).to(self.device)
        functions = sys.modules["dalle_pytorch.dalle_pytorch"]
        with self.half():
            logits = self.dalle.forward_with_cond_scale(text, codes, cond_scale=1.0, cache={})[:, -1]
        functions.gumbel_sample(functions.top_k(logits, thres=DROPPED), temperature=1.0, dim=-1)

    def sample(self, images: int) -> None:
        text = self.text[:1].repeat(images, 1).to(self.device)
        with self.half():
            self.dalle.generate_images(text, filter_thres=DROPPED, use_cache=True)


class Repaired(Peer):
    """The same with its key/value cache handed on, which `forward_with_cond_scale` forgets without guidance, and its
    sparse layers built as masked dense ones, without which they compute the whole sequence in spite of the cache."""

    for_inference = True

    def prepare(self, task: str) -> None:
        super().prepare(task)

        def forward(*inputs: Any, cond_scale: float = 1.0, cache: Any = None, **options: Any) -> Tensor:
            return self.dalle(*inputs, cache=cache, **options)

        self.dalle.forward_with_cond_scale = forward


def import_peer() -> Any:
    """Import dalle-pytorch with empty modules in place of what it only imports."""
    for name, attributes in STUBS.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules.setdefault(name, module)
    package: Any = importlib.import_module("dalle_pytorch")
    package.VQGanVAE = importlib.import_module("dalle_pytorch.vae").VQGanVAE
    return package


KINDS: dict[str, Callable[[ContestantOptions], Contestant]] = {
    OURS: Ours,
    WITHOUT_GRAPHS: WithoutGraphs,
    ONE_CODE: OneCode,
    SHIPPED: Shipped,
    PLAIN: Plain,
    PEER: Peer,
    REPAIRED: Repaired,
}


def perform(contestant: Contestant, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a line asks for; what there is to say about it."""
    what = request.pop("do")
    about = getattr(contestant, what)(**request)
    if contestant.device.type == "cuda":
        torch.cuda.synchronize(contestant.device)
    return about or {}


def main() -> None:
    """Serve requests until stdin ends."""
    options = COMMAND.parse()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not come between the answers
    contestant = KINDS[options.name](options)
    contestant.prepare(options.task)
    print(json.dumps({"parameters": count(contestant)}), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        about = perform(contestant, json.loads(line))
        about.update(seconds=time.perf_counter() - begin, peak=peak_bytes(contestant.device))
        print(json.dumps(about), file=answers, flush=True)


def count(contestant: Contestant) -> int:
    """Parameters that are trained, or would be."""
    model = getattr(contestant, "dalle", None) or contestant.engine.model.dalle  # type: ignore[attr-defined]
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    run_main(main)
