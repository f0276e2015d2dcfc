"""The research's adapters in the arms: published sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from xspec_kernels import Workspace, adapter_forward

from ..adapters.token_adapter import TokenAdapter, TokenAdapterConfig
from ..drafters.base import Request
from ..drafters.graph_adapter import GraphAdapterDrafter
from ..drafters.graph_draft import GraphDrafter
from ..gpu.adapter_networks import TINY, Sizes
from ..gpu.adapters import builder
from ..gpu.clock import captured
from ..targets.llama import LlamaTarget


def token_adapter_tail(
    target: LlamaTarget, draft: GraphDrafter, gamma: int, tiny: bool
) -> GraphAdapterDrafter:
    """The TokenAdapter behind every verify of the target, in the same launch. It reads the target's
    answer so far, and behind that the first `gamma` tokens of the draft's.

    Raises:
        ValueError: the target has no graphs.
    """
    sizes = TINY if tiny else Sizes()
    config = TokenAdapterConfig(
        target.vocab_size, sizes.width, sizes.layers, sizes.heads, sizes.inner, sizes.positions
    )
    with torch.device(target.device):
        adapter = TokenAdapter(config).to(target.dtype).eval().requires_grad_(False)

    def text(request: Request) -> list[int]:
        draft.begin(request)
        return draft.opening(gamma)

    return GraphAdapterDrafter(adapter, gamma, target, text, reads_answer=True, name="adapter_tail")


def state_pass(target: LlamaTarget, rows: int, tiny: bool, seed: int) -> Callable[[], list[int]]:
    """L4 over `rows` random states of a draft as wide as the target, then the target's head: one
    launch and one wait; gives their tokens.
    """
    device, head = target.device, target.decoder.weights.head
    sizes = (TINY if tiny else Sizes())._replace(target_vocab=1, state_width=head.shape[1])
    draw = torch.Generator(device).manual_seed(seed)
    network = builder(sizes, draw, target.dtype).network("L4")._replace(head=head)
    states = torch.randn(rows, head.shape[1], generator=draw, device=device).to(target.dtype)
    workspace = Workspace(device)

    def run() -> torch.Tensor:
        return adapter_forward(
            network, states, round_to=target.dtype, workspace=workspace, backend=target.backend
        ).ids

    launched = captured(run, device.type) if target.graphs else run
    return lambda: launched().tolist()
