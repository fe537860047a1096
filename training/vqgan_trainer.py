"""One training step of a VQGAN on any device: losses, optimizer, averaged weights, codebook maintenance.

Letters: B images, S image height and width, N codes per image, D embed_dim, g codes along one side, M = B*N feature
vectors.
"""
from __future__ import annotations

import copy
import math
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from models.discriminator import Adversary
from models.vqgan import VQGAN
from models.vqgan_codebook import CodebookUpkeep
from training.vqgan_options import TrainingOptions
from utils.resume import load_moments


def learning_rate(peak: float, progress: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * max(progress, 0.001) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 in [0, 1] on the device."""
    return images.to(device).float().div_(255.0).contiguous(memory_format=torch.channels_last)


class Trainer:
    """A VQGAN with its optimizer, moving average, codebook maintenance and optional perceptual and adversarial terms.

    `codebook_ready`: features are quantised. A model with random weights learns faster if it first trains without
    codes; `initialise_codebook` then builds the codebook from its features.
    """

    def __init__(
        self,
        model: VQGAN,
        options: TrainingOptions,
        device: torch.device,
        codebook_ready: bool,
        perceptual: nn.Module | None = None,
    ) -> None:
        self.model, self.options, self.device = model, options, device
        self.codebook_ready = codebook_ready
        self.perceptual = perceptual
        self.step_number = 0
        self.bad_steps = [0, 0]
        """Steps skipped because loss or gradient was not finite: in total, and in a row up to now."""
        self.upkeep: CodebookUpkeep | None = None
        if model.config.variant == "vq":
            self.upkeep = CodebookUpkeep(model, 0.99 if options.codebook_update == "ema" else None)
        # As a list: walking through the modules in every step is slow.
        self._parameters: list[Tensor] = list(model.parameters())
        trained = [p for p in self._parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
        self._average = copy.deepcopy(model).requires_grad_(False)
        self._averages: list[Tensor] = list(self._average.parameters())
        self.adversary: Adversary | None = None
        if options.discriminator_start is not None:
            self.adversary = Adversary(model.config.out_ch, options.learning_rate, options.discriminator_weight, device)

    @property
    def result(self) -> VQGAN:
        """The model to evaluate and save: the averaged one, or the model itself without --ema-decay."""
        return self._average if self.options.ema_decay else self.model

    def reconstruction_loss(self, images: Tensor, pixels: Tensor) -> Tensor:
        """Weighted absolute and squared error on the [-1, 1] scale, plus the perceptual term; both (B, 3, S, S)."""
        options, difference = self.options, (images - pixels) * 2.0
        loss = options.l1_weight * difference.abs().mean() + options.l2_weight * difference.pow(2).mean()
        if self.perceptual is not None:
            loss = loss + options.perceptual_weight * self.perceptual(images, pixels)
        return loss

    def step(self, images: Tensor, progress: float) -> dict[str, Tensor]:
        """One optimizer step on uint8 images (B, 3, S, S); returns losses as tensors.

        `progress` of the run, from 0 to 1, sets the learning rate. If the loss or a gradient is not finite, of the
        discriminator or of the model, nothing is updated, and the step is counted in `bad_steps`.
        """
        options, model = self.options, self.model.train()
        pixels = to_pixels(images, self.device)
        rate = learning_rate(options.learning_rate, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        features = model.features(pixels)  # (B, D, g, g)
        codes: Tensor | None = None
        if self.codebook_ready:
            quantised, codebook_loss, codes = model.quantize(features)
        else:
            quantised, codebook_loss = features, features.new_zeros(())
        output = model.pixels(quantised)  # (B, 3, S, S)
        loss = reconstruction = self.reconstruction_loss(output, pixels)
        losses = {"reconstruction": reconstruction.detach(), "codebook": codebook_loss.detach()}
        adversary = self.adversary if self.step_number >= (options.discriminator_start or 0) else None
        if adversary is not None:
            statistics = adversary.statistics()
            generator_loss = adversary.generator_loss(output, reconstruction, model.decoder.conv_out.weight)
            losses["generator"] = generator_loss.detach()
            loss = loss + generator_loss
        self.optimizer.zero_grad(set_to_none=True)
        (loss + options.codebook_weight * codebook_loss).backward()
        losses["grad_norm"] = norm = nn.utils.clip_grad_norm_(self._parameters, options.clip_grad_norm)
        if adversary is not None:
            losses["discriminator"], other_norm = adversary.backward(pixels, output.detach())
            norm = norm + other_norm
        bad = not bool(torch.isfinite(norm + reconstruction.detach()))
        self.bad_steps = [self.bad_steps[0] + bad, (self.bad_steps[1] + 1) * bad]
        if not bad:
            self.optimizer.step()
            if adversary is not None:
                adversary.update(rate)
            revived = None if codes is None else self._update_codebook(features.detach(), codes, progress)
            self._update_average(revived)
        elif adversary is not None:
            adversary.restore(statistics)
        self.step_number += 1
        return losses

    @torch.no_grad()
    def initialise_codebook(self, batches: Iterator[Tensor]) -> None:
        """Initialise the codebook from features of the next images: about eight feature vectors for each code."""
        self.codebook_ready = True
        if self.upkeep is None:
            return
        config = self.model.config
        needed = max(1, 8 * config.num_codes // (self.options.batch_size * config.grid**2))
        features = [self.model.features(to_pixels(next(batches), self.device)) for _ in range(needed)]
        self.upkeep.initialise(torch.cat(features).flatten(2).transpose(1, 2).flatten(0, 1))
        self._average.quantize.codebook.copy_(self.model.quantize.codebook)

    def _update_codebook(self, features: Tensor, codes: Tensor, progress: float) -> Tensor | None:
        if self.upkeep is None:
            return None
        flat = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (M, D)
        self.upkeep.update(flat, codes.flatten())
        every = self.options.revive_every
        # Not in the last part of a run: a revived code would have no time to become useful.
        if every and self.step_number % every == every - 1 and progress < 0.8:
            return self.upkeep.revive(flat)
        return None

    @torch.no_grad()
    def _update_average(self, revived: Tensor | None) -> None:
        decay = min(self.options.ema_decay, (1.0 + self.step_number) / (10.0 + self.step_number))
        torch._foreach_lerp_(self._averages, self._parameters, 1.0 - decay)
        if revived is not None:
            # A revived code is a new code: do not average it with the old one.
            self._average.quantize.codebook[revived] = self.model.quantize.codebook[revived]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume at the next step: tensors and plain values."""
        return {
            "step": self.step_number,
            "bad_steps": list(self.bad_steps),
            "codebook_ready": self.codebook_ready,
            "model": dict(self.model.state_dict()),
            "average": dict(self._average.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "upkeep": self.upkeep.state_dict() if self.upkeep else None,
            "adversary": self.adversary.state_dict() if self.adversary else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict` of a trainer of the same model, including random states."""
        self.step_number, self.codebook_ready = state["step"], state["codebook_ready"]
        self.bad_steps = [int(count) for count in state.get("bad_steps", (0, 0))]
        self.model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        load_moments(self.optimizer, state["optimizer"])
        for part, name in ((self.upkeep, "upkeep"), (self.adversary, "adversary")):
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
