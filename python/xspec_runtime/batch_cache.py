"""The KV cache of a batch: requests of different lengths side by side in one storage."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from xspec_kernels import MAX_NODES, kv_commit

from .kv_cache import KVCache, KVLayer

# Rows of storage past the capacity: the tallest tree of the batch sets the rows of all, so inert
# rows may be written behind a request that is nearly full.
SPARE = MAX_NODES


class _SlotLayer(KVLayer):
    """One layer of one request: a view of the batch's storage."""

    def __init__(self, cache: KVCache, whole: _BatchLayer, slot: int) -> None:
        super().__init__(cache)
        self.whole, self.slot = whole, slot

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self.whole.is_initialized:
            self.whole.lazy_initialization(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.whole.keys[self.slot : self.slot + 1]
        self.values = self.whole.values[self.slot : self.slot + 1]
        self.is_initialized = True


class _Slot(KVCache):
    """The cache of one request of a batch."""

    def __init__(self, whole: BatchKVCache, slot: int) -> None:
        super().__init__(0, whole.capacity)
        self.layers = [_SlotLayer(self, layer, slot) for layer in whole.layers]


class _BatchLayer(KVLayer):
    """K and V of one layer, ``[B, H_kv, S, D]``; every request's rows go behind its own."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def room(like: torch.Tensor) -> torch.Tensor:
            rows = self.cache.capacity + SPARE
            return like.new_zeros(self.cache.batch, like.shape[1], rows, like.shape[3])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, places, end = self.cache.writing
        self.keys[requests, :, places] = key_states.transpose(1, 2)
        self.values[requests, :, places] = value_states.transpose(1, 2)
        used = slice(0, key_states.shape[0])
        return self.keys[used, :, :end], self.values[used, :, :end]

    def get_seq_length(self, *args) -> int:
        return self.cache.longest


class BatchKVCache(Cache):
    """Up to `batch` requests side by side in one preallocated storage, each with its own length.

    The first `active` slots hold running requests. A prompt is written through its slot
    (`slots[i]` is a `KVCache`), trees through this cache: `place` says where the next forward pass
    writes, `commit` keeps the accepted paths.
    """

    def __init__(self, num_layers: int, capacity: int, batch: int) -> None:
        self.capacity, self.batch, self.active = capacity, batch, 0
        super().__init__(layers=[_BatchLayer(self) for _ in range(num_layers)])
        self.slots: list[KVCache] = [_Slot(self, i) for i in range(batch)]

    def reset(self) -> None:
        """Forget every request. What running ones left is wiped."""
        for slot in range(self.active):
            self.wipe(slot)
        self.active = 0

    @torch.inference_mode()
    def wipe(self, slot: int) -> None:
        """Empty a slot that may hold NaNs: behind the rows of a later request they would count
        under a zero weight.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot].zero_()
                layer.values[slot].zero_()
        self.slots[slot].reset()

    @property
    def longest(self) -> int:
        """Rows of the longest running request."""
        return max((slot.length for slot in self.slots[: self.active]), default=0)

    def place(self, rows: int) -> torch.Tensor:
        """Make the next forward pass write `rows` rows behind those of every running request.

        Returns:
            int64 ``[active]``: the committed lengths on the device.
        """
        device = self.layers[0].device
        lengths = torch.tensor([s.length for s in self.slots[: self.active]], device=device)
        requests = torch.arange(self.active, device=device)[:, None]
        places = lengths[:, None] + torch.arange(rows, device=device)
        self.writing = (requests, places, self.longest + rows)
        return lengths

    def commit(
        self, accept_path: torch.Tensor, accept_len: torch.Tensor, accepted: list[int]
    ) -> None:
        """Keep the root and the accepted path of every running request's tree.

        Args:
            accept_path: int32 ``[active, N]``, nodes in order, root excluded, -1 padded.
            accept_len: int32 ``[active]``.
            accepted: `accept_len` on the host.
        """
        if any(accepted):
            used = slice(0, self.active)
            tensors = [t[used] for layer in self.layers for t in (layer.keys, layer.values)]
            lengths = self.writing[1][:, 0].int()
            kv_commit(tensors, accept_path, accept_len, lengths)
        for slot, count in zip(self.slots, accepted, strict=False):
            slot.advance(count + 1)

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Drop a running request; the last one moves to its place."""
        self.active -= 1
        free, last = self.slots[slot], self.slots[self.active]
        if free is not last:
            rows = last.length
            for to, source in zip(free.layers, last.layers, strict=True):
                to.keys[:, :, :rows] = source.keys[:, :, :rows]
                to.values[:, :, :rows] = source.values[:, :, :rows]
            free.length = rows
        last.reset()
