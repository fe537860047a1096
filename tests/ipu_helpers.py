"""What the IPU tests share: a tiny model, data whose captions change with the epoch, and training without IPUs."""
from __future__ import annotations

import sys
import types

import torch
from helpers import tiny_vqgan

import args
from data import PairDataset, TextSettings, epoch_order
from engines.base import parameter_groups
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN, VqganConfig
from training.setup import dalle_config

MODEL = {
    "num_text_tokens": 9, "num_image_tokens": 7, "text_seq_len": 5, "grid": 4, "dim": 8, "depth": 3, "heads": 2,
    "dim_head": 4, "attn_types": ("full", "axial_row", "axial_col"),
}
VQGAN_CONFIG = tiny_vqgan(ch_mult=(1, 1, 2), num_codes=7, embed_dim=4, z_channels=4)


def small_model(**changes):
    """The configuration of another tiny model, for plans and captures."""
    sizes = {"num_text_tokens": 30, "num_image_tokens": 11, "text_seq_len": 6, "grid": 4, "dim": 16, "depth": 3}
    return DalleConfig(**{**sizes, "heads": 2, "dim_head": 8, **changes})


def published_model(config, vocabulary=8192):
    """The model that a configuration describes, with a vocabulary of so many ids and the published VQGAN."""
    with torch.device("meta"):
        return dalle_config(config, types.SimpleNamespace(vocab_size=vocabulary), VQGAN(VqganConfig()))


class Pairs(PairDataset):
    """Random captions that depend on the epoch, and random images: bytes (3, 16, 16), or codes (16,)."""

    def __init__(self, count, images=False):
        super().__init__(count, TextSettings(types.SimpleNamespace(vocab_size=9), 5))
        self.images = images

    def _text(self, pair):
        text = torch.randint(1, 9, (5,), generator=torch.Generator().manual_seed(1000 * int(self._epoch) + pair))
        text[3:] = 0
        return text

    def image(self, pair):
        generator = torch.Generator().manual_seed(pair)
        if self.images:
            return torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)
        return torch.randint(0, 7, (16,), generator=generator)


def make_model(with_vqgan=False, soft=None, **changes):
    """The same weights every time, the VQGAN laid out as `load_vqgan` does it."""
    torch.manual_seed(0)
    dalle = DalleModel(DalleConfig(**dict(MODEL, **changes)))
    torch.manual_seed(1)
    vqgan = VQGAN(VQGAN_CONFIG).to(memory_format=torch.channels_last) if with_vqgan else None
    return TextToImage(dalle, vqgan, soft=soft)


def make_config(stages=1, **options):
    """A configuration for `stages` IPUs: the embeddings on the first, the three layers over the others."""
    layers = {1: [3], 2: [0, 3], 4: [0, 1, 1, 1]}[stages]
    base = {
        "device": "ipu", "batch_size": 2, "gradient_accumulation": max(2, 2 * stages - 1),
        "ipus_per_replica": stages, "layers_per_ipu": layers, "num_hidden_layers": 3, "learning_rate": 1.0e-2,
        "image_size": 16, "epochs": 2, "max_steps": 0,
    }
    return args.Config().replace(**dict(base, **options))


def train_plainly(config, model, dataset, rates=None):
    """What every engine must equal, in plain PyTorch: (losses of all steps, trained model). rates: of each step."""
    options, size = config.optimizer, config.global_batch
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[options.optimizer]
    groups = parameter_groups(model, options.weight_decay)
    optimizer = kind(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), eps=options.eps)
    losses = []
    model.train()
    for epoch in range(config.execution.epochs):
        dataset.set_epoch(epoch)
        order = epoch_order(len(dataset), config.execution.random_seed, epoch).tolist()
        for first in range(0, len(order) - size + 1, size):
            text, images = (torch.stack(tensors) for tensors in zip(*[dataset[i] for i in order[first : first + size]]))
            for group in optimizer.param_groups:
                group["lr"] = rates[len(losses)] if rates else group["lr"]
            loss = model(text, images).total
            loss.backward()
            if options.clip_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.dalle.parameters(), options.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses, model


def train_with(engine, config, model, dataset, rates=None):
    """The loop of train.py, without its frills: losses of all calls of the engine."""
    engine.prepare(model, dataset)
    losses = []
    for epoch in range(config.execution.epochs):
        for batch in engine.loader(dataset, epoch):
            engine.set_learning_rate(rates[len(losses)] if rates else config.optimizer.learning_rate)
            losses.append(float(engine.step(batch).loss))
    return losses


def largest_difference(first, second):
    """Of two state dicts with equal names."""
    assert list(first) == list(second)
    return max(float((first[key].float() - second[key].float()).abs().max()) for key in first)


def install_poprun(monkeypatch, horovod, options, index, count, replicas):
    """Let this process be one of `count` that poprun has started; returns the stand-in for horovod.torch."""
    popdist = types.ModuleType("popdist")
    popdist.isPopdistEnvSet, popdist.getInstanceIndex = lambda: True, lambda: index
    popdist.getNumTotalReplicas, popdist.getNumInstances = lambda: replicas, lambda: count
    popdist.getNumLocalReplicas = lambda: replicas // count
    popdist.poptorch = types.ModuleType("popdist.poptorch")
    popdist.poptorch.Options = options
    for module in (popdist, popdist.poptorch, types.ModuleType("horovod"), horovod):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return horovod
