"""Device tables of tensor addresses, for kernels that reach many tensors in one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

_MAX_TABLES = 64
_tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()
_captured: dict[tuple, torch.Tensor] = {}


def address_table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors' addresses as int64 on their device, kept for the next call on the same ones.

    A table that a CUDA graph was captured with is kept for good: the graph reads it on replay.

    Raises:
        RuntimeError: a graph is being captured and the table is not there yet.
    """
    device = tensors[0].device
    key = (device, *(tensor.data_ptr() for tensor in tensors))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # Taken out and put back, as another thread may drop the oldest one meanwhile.
    table = _tables.pop(key, None)
    if table is None:
        if capturing:
            raise RuntimeError("run the op once on these tensors before capturing a graph of it")
        table = torch.tensor(key[1:], dtype=torch.int64, device=device)
    _tables[key] = table
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    if capturing:
        _captured[key] = table
    return table
