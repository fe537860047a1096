"""What a machine allows: the work in a step and an image, and the speeds of a matmul and of reading memory."""
from __future__ import annotations

import time
from statistics import median
from typing import Any, Callable

import torch

from models.config import DalleConfig
from models.patterns import allowed_codes
from ops.matmul import matmul
from ops.matmul import suits as matmul_suits
from ops.rows import read_all

#: What their makers' datasheets promise of dense matmuls in half precision, in GFLOP/s, by a part of the name.
_DATASHEETS = {"H200": 989_000, "H100 PCIe": 756_000, "H100": 989_000, "A100": 312_000, "L40S": 362_000, "L4": 121_000}


def datasheet(name: str, precision: str) -> float | None:
    """The speed in GFLOP/s that a GPU's datasheet gives for its matmul; None where we do not know one."""
    if precision == "fp32":
        return None
    return next((speed for part, speed in _DATASHEETS.items() if part in name), None)


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    with torch.no_grad():
        function()
    return time.perf_counter() - begin


class Work:
    """The least arithmetic and memory traffic of a model of this shape."""

    def __init__(self, config: DalleConfig) -> None:
        dim, inner = config.dim, config.heads * config.dim_head
        layer = dim * 3 * inner + inner * dim + dim * config.up_width + config.hidden * dim
        heads = dim * (config.text_table_size + config.num_image_tokens)
        self.weights_read = config.depth * layer + dim * config.num_image_tokens
        """Weights that each code of an image must read."""
        self.parameters = config.depth * layer + 2 * heads
        """Matrices and tables; biases, norms and positions are a thousandth more."""
        pairs = sum(self._pairs(config, pattern) for pattern in config.layer_patterns)
        text, image = config.text_len - 1, config.image_seq_len
        forward = 2 * (config.depth * layer * config.seq_len + 2 * inner * pairs)
        forward += 2 * dim * (text * config.text_table_size + image * config.num_image_tokens)
        self.training_flop = 3 * forward
        """Multiplications and additions of a sample in training: forward, and twice as much backward. Attention counts
        the pairs that its pattern shows, heads the logits that can occur."""

    @staticmethod
    def _pairs(config: DalleConfig, pattern: str) -> int:
        """Pairs of positions that attend to each other in a layer."""
        text = config.text_len
        codes = int(allowed_codes(pattern, config.grid)[:-1, :-1].sum())
        return text * (text + 1) // 2 + text * (config.image_seq_len - 1) + codes


class Machine:
    """Speeds measured on the spot, several times in a run; medians count."""

    def __init__(self, device: str, precision: str) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        side = 2048 if device == "cpu" else 8192
        self.device = device
        self.matrix = torch.randn(side, side, device=device, dtype=dtype)
        self.vector = torch.ones(100_000_000 if device == "cpu" else 2_000_000_000, device=device)
        self.matmuls: list[float] = []
        self.native_matmuls: list[float] = []
        self.reads: list[float] = []

    def _timed(self, function: Callable[[], Any]) -> float:
        def call() -> None:
            function()
            if self.device == "cuda":
                torch.cuda.synchronize()

        call()
        return median(seconds_of(call) for _ in range(5))

    def measure(self) -> None:
        """Time both once more."""
        side = self.matrix.shape[0]
        self.matmuls.append(2 * side**3 / self._timed(lambda: self.matrix @ self.matrix) / 1e9)
        if matmul_suits(self.matrix, self.matrix):
            seconds = self._timed(lambda: matmul(self.matrix, self.matrix))
            self.native_matmuls.append(2 * side**3 / seconds / 1e9)
        # The faster of two ways, so that nothing can beat the limit by reading in a better order.
        seconds = self._timed(self.vector.sum)
        if read_all(self.vector) is not None:
            seconds = min(seconds, self._timed(lambda: read_all(self.vector)))
        self.reads.append(self.vector.numel() * 4 / seconds / 1e9)

    def to_dict(self) -> dict[str, Any]:
        """Medians of all measurements, and these."""
        return {
            "gflop_per_second": median(self.matmuls),
            "fastest_gflop_per_second": max(map(median, filter(None, (self.matmuls, self.native_matmuls)))),
            "read_gb_per_second": median(self.reads),
            "gflop_per_second_all": self.matmuls,
            "own_gflop_per_second_all": self.native_matmuls,
            "read_gb_per_second_all": self.reads,
        }
