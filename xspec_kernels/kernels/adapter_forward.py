"""adapter_forward: a draft's tokens or hidden states to the target's tokens, few rows at a time.

The forward pass of the research's adapters, from ops that each have a reference and a kernel:

    TokenNetwork    embed; a layer is layer_linear (q, k, v), row_attention, layer_linear (out),
                    layer_linear (up, GELU), layer_linear (down); layer_norm; lm_head_argmax
    StateNetwork    the bottlenecks and the attention of L1 to L4, then the target's own
                    lm_head_argmax

LayerNorms are parts of the products behind them, residuals and GELU of those before: a layer of a
transformer is five launches, a bottleneck two. At the published sizes and at most 64 rows a launch
waits for its weights, if for anything: two products in one launch would need a barrier over the
whole card between them, which costs what a launch does that starts early.

Rows of a causal network, and of one without attention, keep their bits whatever M is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from xspec_kernels._dispatch import check_tensor, choose
from xspec_kernels.kernels._layer_norm import LayerNorm, row_moments
from xspec_kernels.kernels.embed import embed
from xspec_kernels.kernels.layer_linear import layer_linear
from xspec_kernels.kernels.layer_norm import layer_norm
from xspec_kernels.kernels.lm_head_argmax import ArgmaxResult, lm_head_argmax
from xspec_kernels.kernels.row_attention import row_attention
from xspec_kernels.workspace import Workspace


class Linear(NamedTuple):
    """weight [N, K], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class EncoderLayer(NamedTuple):
    """Attention and feed-forward of a transformer with as many K as V heads, GELU between.

    Attributes:
        qkv: [3 D, D], queries of all heads first, then keys, then values.
        norms: of attention and feed-forward: behind each in a `TokenNetwork`, before each in a
            `StateNetwork`.
    """

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norms: tuple[LayerNorm, LayerNorm]


class TokenNetwork(NamedTuple):
    """A causal post-norm transformer over tokens, the research's TokenAdapter.

    Attributes:
        embed: [V, D]; position: [P, D].
        norm: behind the last layer.
        head: to the logits; its weight may be `embed`.
        pad: an id that no row attends to, the first one excepted; None: there is none.
    """

    embed: torch.Tensor
    position: torch.Tensor
    layers: Sequence[EncoderLayer]
    norm: LayerNorm
    head: Linear
    heads: int
    pad: int | None = None


class Bottleneck(NamedTuple):
    """x + alpha * up(gelu(down(norm(x)))), or with `inner` a norm between down and GELU and none
    before down.
    """

    norm: LayerNorm | None
    down: Linear
    inner: LayerNorm | None
    up: Linear
    alpha: float


class StateNetwork(NamedTuple):
    """States of the draft to states of the target, each looking at itself or at all.

    Attributes:
        head: of the target, [V, D].
        project: of states of another width than the target's.
        first: norm of what the blocks read, or None.
        blocks: all `Bottleneck` (L1 to L3) or all `EncoderLayer` (L4).
        norm: behind the last block.
        out: behind that; None gives the tokens of the norm's rows.
        alpha: share of `out` in what is then (1 - alpha) of the state that came in.
        heads: of the encoder layers.
    """

    head: torch.Tensor
    project: Linear | None
    first: LayerNorm | None
    blocks: Sequence[Bottleneck] | Sequence[EncoderLayer]
    norm: LayerNorm
    out: Linear | None = None
    alpha: float = 1.0
    heads: int = 1


Network = TokenNetwork | StateNetwork


class _Rows:
    """Rows on their way through a network, with the norm that has yet to be taken of them."""

    def __init__(
        self, x: torch.Tensor, num_rows: torch.Tensor | None, workspace: Workspace, backend: str
    ) -> None:
        self.x, self.norm = x, None
        self._moments: torch.Tensor | None = None
        self._num_rows, self._backend, self._workspace = num_rows, backend, workspace

    def measure(self) -> None:
        """Take the moments of rows that no product has made, for all norms of theirs at once."""
        if choose("layer_linear", self._backend, self.x.device.type) == "triton":
            self._moments = row_moments("adapter_forward", self.x)

    def normed(self, norm: LayerNorm | None) -> None:
        """From now on `norm` of the rows is what counts."""
        self.norm = norm and norm._replace(moments=self._moments)

    def product(self, linear: Linear, norm: LayerNorm | None = None, **options) -> torch.Tensor:
        """Of the rows, with another norm than their own where one is given."""
        if norm is not None:
            norm = norm._replace(moments=self._moments)
        return self._linear(self.x, linear, norm=norm or self.norm, **options)

    def add(self, x: torch.Tensor, linear: Linear, keep: float = 1.0, **options) -> None:
        """The rows become keep times themselves and a product of `x`."""
        self.x, self._moments = self._linear(
            x, linear, residual=self.x, keep=keep, residual_norm=self.norm, with_moments=True,
            **options,
        )  # fmt: skip
        self.norm = None

    def become(self, linear: Linear) -> None:
        """The rows become a product of themselves."""
        self.x, self._moments = self._linear(self.x, linear, with_moments=True)

    def attend(self, qkv: torch.Tensor, heads: int, **options) -> torch.Tensor:
        """What the rows' attention reads out."""
        return row_attention(qkv, self._num_rows, heads=heads, backend=self._backend, **options)

    def _linear(self, x: torch.Tensor, linear: Linear, **options):
        return layer_linear(
            x, linear.weight, self._num_rows, bias=linear.bias, workspace=self._workspace,
            backend=self._backend, **options,
        )  # fmt: skip


def _tokens(network: TokenNetwork, ids: torch.Tensor, rows: _Rows, backend: str) -> torch.Tensor:
    """Rows [M, D] for the head."""
    rows.x = embed(ids, network.embed, position=network.position, backend=backend)
    unread = {} if network.pad is None else {"token_ids": ids, "pad": network.pad}
    for layer in network.layers:
        seen = rows.attend(rows.product(layer.qkv), network.heads, causal=True, **unread)
        rows.add(seen, layer.out)
        rows.normed(layer.norms[0])
        rows.add(rows.product(layer.up, gelu_out=True), layer.down)
        rows.normed(layer.norms[1])
    return layer_norm(rows.x, rows.norm or network.norm, then=rows.norm and network.norm,
                      backend=backend)  # fmt: skip


def _states(network: StateNetwork, rows: _Rows, backend: str) -> torch.Tensor:
    """Rows [M, D] for the head."""
    if network.project is not None:
        rows.become(network.project)
    else:
        rows.measure()
    into = rows.x
    rows.normed(network.first)
    for block in network.blocks:
        if isinstance(block, Bottleneck):
            _bottleneck(rows, block)
            continue
        rows.add(rows.attend(rows.product(block.qkv, block.norms[0]), network.heads), block.out)
        rows.add(rows.product(block.up, block.norms[1], gelu_out=True), block.down)
    if network.out is None:
        return layer_norm(rows.x, network.norm, backend=backend)
    return rows.product(
        network.out, network.norm, scale=network.alpha, residual=into, keep=1 - network.alpha
    )


def _bottleneck(rows: _Rows, block: Bottleneck) -> None:
    if block.inner is None:
        inner = rows.product(block.down, block.norm, gelu_out=True)
        rows.add(inner, block.up, scale=block.alpha)
        return
    inner, moments = rows.product(block.down, block.norm, with_moments=True)
    norm = block.inner._replace(moments=moments)
    rows.add(inner, block.up, norm=norm, gelu_in=True, scale=block.alpha)


def _check(network: Network, fed: torch.Tensor) -> None:
    op = "adapter_forward"
    if isinstance(network, TokenNetwork):
        if fed.dim() != 1 or not 1 <= len(fed) <= len(network.position):
            raise ValueError(
                f"{op}: fed has shape {list(fed.shape)}, expected [M] ids with M from 1 to "
                f"{len(network.position)}"
            )
        check_tensor(op, "fed", fed, fed.shape, (torch.int32, torch.int64), network.embed.device)
        return
    width = network.head.shape[1] if network.project is None else network.project.weight.shape[1]
    if fed.dim() != 2 or not len(fed) or fed.shape[1] != width:
        raise ValueError(f"{op}: fed has shape {list(fed.shape)}, expected [M, {width}] states")
    check_tensor(op, "fed", fed, fed.shape, (network.head.dtype,), network.head.device)


def adapter_forward(
    network: Network,
    fed: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    round_to: torch.dtype | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> ArgmaxResult:
    """The target's likeliest token for every row.

    Args:
        network: weights of one dtype, all widths multiples of 64.
        fed: [M] int32 or int64 ids of a `TokenNetwork`, M at most its positions; [M, De] states of
            a `StateNetwork`, in its dtype. An id outside the vocabulary makes its row NaN.
        num_rows: [1] int32 on the device, rows that count, 1 at least; None means all M. States
            behind it change nothing, and results behind it are unspecified.
        round_to: logits are compared as `lm_head_argmax` says.
        workspace: scratch of this decoder and stream; None allocates for this call.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous.
    """
    _check(network, fed)
    workspace = workspace or Workspace(fed.device)
    rows = _Rows(fed, num_rows, workspace, backend)
    if isinstance(network, TokenNetwork):
        hidden, head = _tokens(network, fed, rows, backend), network.head
    else:
        hidden, head = _states(network, rows, backend), Linear(network.head)
    return lm_head_argmax(
        hidden, head.weight, num_rows, bias=head.bias, round_to=round_to, workspace=workspace,
        backend=backend,
    )  # fmt: skip
