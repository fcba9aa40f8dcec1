"""Keys and values that the passes of a decoder reuse: exactly, for block-diffusion models, or approximately.

This file travels with checkpoints: it imports torch and transformers alone.

Shapes: R rows.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class BlockCacheLayer(DynamicLayer):
    """Keys and values of the finished blocks, in one buffer; those of the active block follow them and are not kept.

    Concatenation, as in transformers' own layer, would copy the whole cache in every pass.

    Args:
        max_length (`int`): columns of the buffer.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length, self.committed = max_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes `key_states` and `value_states`, `(R, heads, columns, head size)`, after the committed columns.

        Returns views of both, the committed columns included. transformers' `args` and `kwargs` are not used.
        """
        if not self.is_initialized:
            rows, heads, _, head_dim = key_states.shape
            self.keys = key_states.new_empty(rows, heads, self.max_length, head_dim)
            self.values = value_states.new_empty(rows, heads, self.max_length, value_states.shape[-1])
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.committed + key_states.shape[-2]
        self.keys[:, :, self.committed : end] = key_states
        self.values[:, :, self.committed : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Committed columns."""
        return self.committed


class WholeCacheLayer(BlockCacheLayer):
    """Keys and values of every column, each as the last pass that ran the column left them.

    Args:
        max_length (`int`): columns of the buffer.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As [`BlockCacheLayer`], but returns all columns, those after the written ones included.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(R, heads, columns, head size)`): of the columns run.
            args, kwargs: transformers', not used.
        """
        super().update(key_states, value_states, *args, **kwargs)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass sees, whatever its `query_length`, and the first of them."""
        return self.max_length, 0


class BlockCache(Cache):
    """The exact cache of a block-diffusion model: a finished block is never run again.

    Args:
        num_layers (`int`): of the network.
        width (`int`): columns of the canvas.
    """

    def __init__(self, num_layers: int, width: int):
        super().__init__(layers=[BlockCacheLayer(width) for _ in range(num_layers)])

    def columns(self, start: int, end: int) -> tuple[int, int]:
        """Columns [first, stop) that the next pass over the window [`start`, `end`) runs: those not kept yet."""
        return self.get_seq_length(), end

    def keep_before(self, start: int) -> None:
        """The columns before `start` are final, and have been run."""
        for layer in self.layers:
            layer.committed = start


class ApproximateCache(BlockCache):
    """A cache for models whose columns all see one another, where no key or value is ever final.

    The first pass over a window runs all columns. The further passes over it reuse the keys and values that this one
    gave to other columns, although these would change with every token revealed. Source: Fast-dLLM 2505.22618.

    Args:
        num_layers (`int`): of the network.
        width (`int`): columns of the canvas.
        reuses_later (`bool`): whether the columns after the window are reused too (`"dual"`), or run in every pass
            (`"prefix"`).
    """

    def __init__(self, num_layers: int, width: int, reuses_later: bool):
        Cache.__init__(self, layers=[WholeCacheLayer(width) for _ in range(num_layers)])
        self.width, self.reuses_later, self.window = width, reuses_later, None

    def columns(self, start: int, end: int) -> tuple[int, int]:
        """Columns [first, stop) that the next pass over the window [`start`, `end`) runs; all for a new window."""
        if self.window != (start, end):
            self.window = (start, end)
            self.keep_before(0)
            return 0, self.width
        return self.get_seq_length(), end if self.reuses_later else self.width


def new_cache(num_layers: int, width: int, settings, one_block: bool) -> BlockCache | None:
    """The cache that a decoder's settings ask for, empty; None where every pass runs all columns.

    Args:
        num_layers (`int`): of the network.
        width (`int`): columns of the canvas.
        settings ([`TIDEGenerationConfig`]): `use_cache` and `approximate_cache` are read.
        one_block (`bool`): whether every column sees every other.
    """
    if settings.use_cache is False:
        return None
    if not one_block:
        return BlockCache(num_layers, width)
    kind = settings.approximate_cache
    return None if kind is None else ApproximateCache(num_layers, width, reuses_later=kind == "dual")
