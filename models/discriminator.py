"""A patch discriminator and its share of the stage-1 loss (Isola et al. 2017; Esser et al. 2021, section 3.1).

Letters: B images, S image height and width, h and w height and width of the map of patch scores.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images (B, C, S, S) in [0, 1] -> one score for each overlapping patch (B, 1, h, w); high means real."""

    def __init__(self, channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


class Adversary:
    """The discriminator with its own optimizer, and the two adversarial losses."""

    def __init__(
        self, channels: int, learning_rate: float, weight: float, device: torch.device, width: int = 64
    ) -> None:
        self.model = PatchDiscriminator(channels, width).to(device)
        self.weight = weight
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def generator_loss(self, images: Tensor, reconstruction_loss: Tensor, last_weight: Tensor) -> Tensor:
        """Weighted loss that rises when reconstructions (B, C, S, S) look unreal.

        The weight balances its gradient at the decoder's last layer against the reconstruction's (Esser et al., eq. 7),
        so that neither term dominates.
        """
        self.model.requires_grad_(False)
        loss = -self.model(images * 2.0 - 1.0).mean()
        ours = torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        theirs = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)[0].norm()
        balance = (theirs / (ours + 1e-4)).clamp(0.0, 1e4).detach()
        return self.weight * balance * loss

    def backward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Backpropagate the hinge loss on real images and reconstructions, both (B, C, S, S); `update` steps.

        Returns the loss and the gradient's Euclidean norm.
        """
        self.model.requires_grad_(True)
        loss = 0.5 * (
            F.relu(1.0 - self.model(real * 2.0 - 1.0)).mean() + F.relu(1.0 + self.model(fake * 2.0 - 1.0)).mean()
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = [weight.grad.norm() for weight in self.model.parameters() if weight.grad is not None]
        return loss.detach(), torch.stack(norms).norm()

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step with the gradients of `backward`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def statistics(self) -> list[Tensor]:
        """Copies of the running averages of the normalisation layers, for `restore`."""
        return [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def restore(self, statistics: list[Tensor]) -> None:
        """Restore the running averages that `statistics` returned."""
        for buffer, value in zip(self.model.buffers(), statistics):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume."""
        return {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
