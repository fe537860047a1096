"""Keys and values of one layer while sampling, laid out so that a token reads only what its pattern shows it.

Letters: B images, P positions of the text part, G side of the code grid, N = G * G codes, H heads, K width of a head, D
width.
"""

import functools
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import DalleConfig
from models.patterns import allowed_codes

#: Images of a prompt up to which each has a copy of the text keys beside its own (`JoinedCache`).
_JOINED_IMAGES = 2


@functools.lru_cache(maxsize=8)
def _seen(pattern: str, grid: int, device: torch.device) -> List[Tensor]:
    """For each image position the indices of those it may attend to."""
    return [row.nonzero()[:, 0].to(device) for row in allowed_codes(pattern, grid)]


class LayerCache:
    """Text keys stored once for each prompt and shared by all images drawn from it; image keys on the code grid.

    A row or a column of codes is a view then, and sparse patterns read only what they may see.
      text_key, text_value    (prompts, H, P, K)
      image_key, image_value  (B, H, G, G, K) with B = prompts * images per prompt
      history                 (B, G * G, D) inputs of the two sub-layers, only with shift_tokens
    """

    def __init__(
        self,
        config: DalleConfig,
        pattern: str,
        prompts: int,
        images: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, width, grid = config.heads, config.dim_head, config.grid
        self.pattern, self.text_len, self.grid = pattern, config.text_len, grid
        self.prompts, self.images = prompts, images
        self.text_key = torch.zeros(prompts, heads, config.text_len, width, device=device, dtype=dtype)
        self.text_value = torch.zeros_like(self.text_key)
        self.history: List[Optional[Tensor]] = [None, None]
        if config.shift_tokens:
            self.history = [
                torch.zeros(prompts * images, grid * grid, config.dim, device=device, dtype=dtype) for _ in range(2)
            ]
        self._make_room(config)

    def _make_room(self, config: DalleConfig) -> None:
        shape = (self.prompts * self.images, config.heads, self.grid, self.grid, config.dim_head)
        self.image_key = self.text_key.new_zeros(shape)
        self.image_value = self.text_key.new_zeros(shape)

    def put_text(self, start: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (prompts, H, n, K) of text positions from `start` on."""
        end = start + key.shape[2]
        self.text_key[:, :, start:end] = key
        self.text_value[:, :, start:end] = value

    def put_first_codes(self, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (B, H, n, K) of the first n codes."""
        self.image_key.flatten(2, 3)[:, :, : key.shape[2]] = key
        self.image_value.flatten(2, 3)[:, :, : key.shape[2]] = value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
        """Keep key and value of the code at `position` and attend from there. (B, H, 1, K) each -> (B, H, 1, K)."""
        batch, heads, _, width = query.shape
        prompts, images = self.prompts, self.images
        row, column = divmod(position, self.grid)
        self.image_key[:, :, row, column] = key[:, :, 0]
        self.image_value[:, :, row, column] = value[:, :, 0]
        query = query * width**-0.5
        image_key, image_value = self._visible(position)
        # All images of a prompt read the same text keys: one matrix product for them, (prompts, H, images, K).
        grouped = query.view(prompts, images, heads, width).transpose(1, 2)
        text_scores = torch.matmul(grouped, self.text_key.transpose(-1, -2))  # (prompts, H, images, P)
        text_scores = text_scores.transpose(1, 2).reshape(batch, heads, 1, -1)
        image_scores = torch.matmul(query, image_key.transpose(-1, -2))  # (B, H, 1, n)
        weights = torch.softmax(torch.cat([text_scores, image_scores], dim=-1), dim=-1)
        text_weights, image_weights = weights.split([text_scores.shape[-1], image_scores.shape[-1]], dim=-1)
        grouped = text_weights.reshape(prompts, images, heads, -1).transpose(1, 2)
        from_text = torch.matmul(grouped, self.text_value).transpose(1, 2).reshape(batch, heads, 1, width)
        return from_text + torch.matmul(image_weights, image_value)

    def _visible(self, position: int) -> Tuple[Tensor, ...]:
        """Keys and values (B, H, n, K) of the image positions that `position` sees: views where the pattern allows."""
        row, column = divmod(position, self.grid)
        both = (self.image_key, self.image_value)
        if self.pattern == "full":
            return tuple(t.flatten(2, 3)[:, :, : position + 1] for t in both)
        if self.pattern == "axial_row":
            return tuple(t[:, :, row, : column + 1] for t in both)
        if self.pattern == "axial_col":
            return tuple(t[:, :, : row + 1, column] for t in both)
        seen = _seen(self.pattern, self.grid, self.image_key.device)[position]
        return tuple(t.flatten(2, 3).index_select(2, seen) for t in both)


class JoinedCache(LayerCache):
    """Text and visible image keys next to each other for each image: one fused product a token.

    For few images the number of small operations costs more than reading text keys again. Rows of `lanes`
    (2, B, H, lane, P + room, K), keys and values: one lane with room for all codes (full), for a row (axial_row), for
    what a window shows (conv); a lane for each column (axial_col).
    """

    def _make_room(self, config: DalleConfig) -> None:
        grid, num_codes = self.grid, self.grid**2
        lanes, room = {"full": (1, num_codes), "axial_row": (1, grid), "axial_col": (grid, grid)}.get(
            self.pattern, (1, 0)
        )
        images = self.prompts * self.images
        if not room:
            # What is seen does not lie side by side: it is gathered behind the text, token by token.
            self.codes = self.text_key.new_zeros(2, images, config.heads, num_codes, config.dim_head)
            room = max(len(seen) for seen in _seen(self.pattern, grid, self.text_key.device))
        shape = (2, images, config.heads, lanes, config.text_len + room, config.dim_head)
        self.lanes = self.text_key.new_zeros(shape)
        keys, values = self.lanes.unbind(0)
        self._lanes = list(zip(keys.unbind(2), values.unbind(2)))  # views, looked up once

    def put_text(self, start: int, key: Tensor, value: Tensor) -> None:
        super().put_text(start, key, value)
        end = start + key.shape[2]
        for lanes, text in zip(self.lanes, (key, value)):
            lanes[:, :, :, start:end] = text.repeat_interleave(self.images, dim=0)[:, :, None]

    def put_first_codes(self, key: Tensor, value: Tensor) -> None:
        first, count = self.text_len, key.shape[2]
        for index, codes in enumerate((key, value)):
            lanes = self.lanes[index]
            if self.pattern == "full":
                lanes[:, :, 0, first : first + count] = codes
            elif self.pattern == "axial_row":  # earlier rows are never seen again
                row = codes[:, :, (count - 1) // self.grid * self.grid :]
                lanes[:, :, 0, first : first + row.shape[2]] = row
            elif self.pattern == "axial_col":
                for column in range(min(self.grid, count)):
                    own = codes[:, :, column :: self.grid]
                    lanes[:, :, column, first : first + own.shape[2]] = own
            else:
                self.codes[index, :, :, :count] = codes

    def attend(self, query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
        lane, last = 0, position
        if self.pattern == "axial_row":
            last = position % self.grid
        elif self.pattern == "axial_col":
            last, lane = divmod(position, self.grid)
        keys, values = self._lanes[lane]
        if self.pattern in ("full", "axial_row", "axial_col"):
            end = self.text_len + last
            keys.narrow(2, end, 1).copy_(key)
            values.narrow(2, end, 1).copy_(value)
        else:
            seen = _seen(self.pattern, self.grid, query.device)[position]
            end = self.text_len + len(seen) - 1
            for codes, new, room in zip(self.codes, (key, value), (keys, values)):
                codes.narrow(2, position, 1).copy_(new)
                room.narrow(2, self.text_len, len(seen)).copy_(codes.index_select(2, seen))
        return F.scaled_dot_product_attention(query, keys.narrow(2, 0, end + 1), values.narrow(2, 0, end + 1))


def make_cache(
    config: DalleConfig, pattern: str, prompts: int, images: int, device: torch.device, dtype: torch.dtype
) -> LayerCache:
    """Return an empty cache of a layer for `images` images of each of `prompts` prompts."""
    kind = JoinedCache if images <= _JOINED_IMAGES else LayerCache
    return kind(config, pattern, prompts, images, device, dtype)
