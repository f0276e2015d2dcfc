"""Adapters with random weights, biases and norms included, in the shapes that kernels take."""

from __future__ import annotations

import torch
from torch import nn

from xspec_kernels import Network
from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.network import state_network, token_network
from xspec_runtime.adapters.token_adapter import TokenAdapter, TokenAdapterConfig

VOCAB, WIDTH, POSITIONS = 70, 64, 80
TOKENS = {"token": {}, "token tied": {"tied": True}, "token padded": {"token_bias": True}}
# The last one reads states of another width.
STATES = {
    "L1": {}, "L2": {"blocks": 2}, "L3": {"blocks": 2}, "L4": {"heads": 4},
    "L1 foreign": {"draft_width": 128}, "L4 deep": {"heads": 2, "layers": 2},
}  # fmt: skip
KINDS = (*TOKENS, *STATES)
EXACT = tuple(kind for kind in KINDS if "L4" not in kind)


def shaken(module: nn.Module) -> nn.Module:
    """All parameters random, so that none is left out unseen."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
        elif parameter.dim():
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        else:
            nn.init.constant_(parameter, 0.3)
    return module.eval().requires_grad_(False)


class Given:
    """An adapter, the target's head, and rows for it."""

    def __init__(
        self, kind: str, rows: int, dtype: torch.dtype = torch.float32, layers: int = 2
    ) -> None:
        self.kind, self.reads_tokens = kind, kind in TOKENS
        if self.reads_tokens:
            config = TokenAdapterConfig(VOCAB, WIDTH, layers, 2, 128, POSITIONS, **TOKENS[kind])
            self.adapter = shaken(TokenAdapter(config)).to(dtype)
            self.fed = torch.randint(0, VOCAB, (rows,))
            self.fed[2:7:2] = 0
            return
        sizes = {"bottleneck": 64, "wide": 64, "intermediate": 64, "heads": 1}
        sizes |= {"draft_width": WIDTH} | STATES[kind]
        config = HiddenAdapterConfig(kind[:2], WIDTH, **sizes)
        self.adapter = shaken(HiddenAdapter(config)).to(dtype)
        self.head = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype)
        self.fed = torch.randn(rows, config.draft_width).to(dtype)

    def network(self, device: str = "cpu") -> Network:
        adapter = self.adapter.to(device)
        if self.reads_tokens:
            return token_network(adapter)
        return state_network(adapter, self.head.to(device))

    def logits(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Of the module, computed in `dtype`, [M, V]."""
        adapter, fed = self.adapter.to("cpu"), self.fed
        before = next(adapter.parameters()).dtype
        adapter.to(dtype or before)
        try:
            if self.reads_tokens:
                return adapter(fed[None])[0]
            head = self.head.to(dtype or before)
            return adapter(draft=fed.to(dtype or before)[None])[0] @ head.T
        finally:
            adapter.to(before)
