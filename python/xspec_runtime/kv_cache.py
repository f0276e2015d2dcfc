"""A preallocated KV cache for transformers models: write a tree behind the committed rows, keep one
path.
"""

from __future__ import annotations

from numbers import Integral

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer

from xspec_kernels import kv_commit


class KVLayer(CacheLayerMixin):
    """K and V of one layer, ``[B, H_kv, S, D]``; new rows go behind the committed ones."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def room(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(*like.shape[:2], self.cache.capacity, like.shape[3])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.cache.length
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self, *args) -> int:
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    get_max_cache_shape = get_max_length


class _StaticView(KVLayer):
    """One layer in the storage of a `StaticLayer`."""

    def __init__(self, cache: KVCache, static: StaticLayer) -> None:
        super().__init__(cache)
        self.static = static

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self.static.is_initialized:
            self.static.lazy_initialization(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self.static.keys, self.static.values
        self.is_initialized = True


class KVCache(Cache):
    """All layers of one request.

    A forward pass writes its rows at ``length ..``; nothing counts as committed until `advance`
    (prefill, plain steps) or `commit` (a verified tree) says so, so a rejected row costs nothing to
    drop.

    Raises:
        ValueError: `capacity` is no number of rows.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        if not isinstance(capacity, Integral) or capacity < 1:
            raise ValueError(f"capacity must be an integer of at least 1, got {capacity!r}")
        self.capacity = capacity
        self.length = 0
        super().__init__(layers=[KVLayer(self) for _ in range(num_layers)])

    @classmethod
    def over(cls, static: StaticCache) -> KVCache:
        """A cache in the storage of transformers' own; `publish` tells that one what it holds.

        Raises:
            ValueError: a layer slides its window, or the storage is for several requests.
        """
        layers = static.layers
        if any(type(layer) is not StaticLayer for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers} - {"StaticLayer"})
            raise ValueError(f"expected full attention in every layer of the cache, got {kinds}")
        if any(layer.is_initialized and layer.keys.shape[0] != 1 for layer in layers):
            raise ValueError(f"expected a cache of batch 1, got {layers[0].keys.shape[0]}")
        cache = cls(0, layers[0].max_cache_len)
        cache.layers = [_StaticView(cache, layer) for layer in layers]
        return cache

    @torch.inference_mode()
    def publish(self) -> None:
        """Set the length of the `StaticCache` this one lies `over`, so that transformers goes on
        from here. An answer's last token is never fed; where the answer was cut, `truncate` first.
        """
        for layer in self.layers:
            layer.static.cumulative_length.fill_(self.length)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.capacity - self.length

    def check_room(self, rows: int) -> None:
        """Raise `RuntimeError` unless `rows` more rows fit."""
        if self.length + rows > self.capacity:
            raise RuntimeError(
                f"KV cache is full: {self.length} rows committed, {rows} more needed, capacity "
                f"{self.capacity}; raise the capacity"
                f"{' or lower max_new_tokens' if self.length else ', the prompt does not fit'}"
            )

    def advance(self, rows: int) -> None:
        """The next `rows` written rows are committed as they lie."""
        self.length += rows

    def truncate(self, length: int) -> None:
        """Drop committed rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in 0..{self.length}, got {length}")
        self.length = length

    def commit(self, accept_path: torch.Tensor, accept_len: torch.Tensor, accepted: int) -> None:
        """Keep the root and the accepted path of the tree just written; `accepted` is its length.

        Args:
            accept_path: int32 ``[B, N]``, nodes in order, root excluded, -1 padded.
            accept_len: int32 ``[B]``.
            accepted: `accept_len` on the host (batch 1).
        """
        if accepted:
            tensors = [t for layer in self.layers for t in (layer.keys, layer.values)]
            lengths = torch.full_like(accept_len, self.length)
            kv_commit(tensors, accept_path, accept_len, lengths)
        self.length += accepted + 1
