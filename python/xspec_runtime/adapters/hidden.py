"""Hidden-state adapters of the research: what the draft's last layer says, in the target's terms.

State i is the last layer's output, normalized, that predicts token i of the model's own answer;
state 0 stands at the end of the prompt. An adapter gives target states, and the target's
language-model head turns those into tokens. L1 to L5 read the draft's states, B1 the target's own,
L5F both. Which token a state predicts is said in `alignment.state_position`.

Layouts, initial values and parameter counts follow https://github.com/xifan-zhang/EventGPT
(`pipeline/adapter_train/hidden_adapter.py`); a draft of another width passes one more projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

LEVELS = ("L1", "L2", "L3", "L4", "L5", "L5F", "B1")
READS_TARGET = ("L5F", "B1")
READS_DRAFT = tuple(level for level in LEVELS if level != "B1")


@dataclass(frozen=True, slots=True)
class HiddenAdapterConfig:
    """Sizes; the defaults are the published ones, as trained.

    Attributes:
        width, draft_width: of the target's and of the draft's states.
        bottleneck: inner width of L1 and L2; `wide` of L3; `intermediate` of L4, L5, L5F and B1.
        blocks: of L2 and L3; L4 and above have `layers`.
        positions: states that L5, L5F and B1 tell apart.
        alpha: the initial share of what is added to a state.
    """

    level: str = "L4"
    width: int = 4096
    draft_width: int = 4096
    bottleneck: int = 256
    wide: int = 1024
    blocks: int = 3
    layers: int = 1
    heads: int = 8
    intermediate: int = 2048
    positions: int = 512
    dropout: float = 0.1
    alpha: float = 0.1

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        for name in ("width", "draft_width", "bottleneck", "wide", "blocks", "layers", "heads",
                     "intermediate", "positions"):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**20:
                raise ValueError(f"{name} must be an int in 1..{2**20}, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of {self.heads} heads, got {self.width}")
        if not 0 <= self.dropout < 1 or not 0 < self.alpha <= 1:
            raise ValueError(
                f"dropout must be in 0..1 and alpha above 0, got {self.dropout} and {self.alpha}"
            )


class HiddenAdapter(nn.Module):
    """One of `LEVELS`."""

    kind = "hidden"

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        self.config = config
        foreign = config.draft_width != config.width and config.level in READS_DRAFT
        self.project = nn.Linear(config.draft_width, config.width) if foreign else nn.Identity()
        self.body = _BODIES[config.level](config)

    def forward(
        self,
        draft: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Target states ``[B, S, width]``.

        Args:
            draft: ``[B, S, draft_width]``, for every level but B1.
            target: ``[B, S, width]``, for L5F and B1.
            mask: bool ``[B, S]``, true where a state is; only L4 looks ahead and needs it.

        Raises:
            ValueError: states that this level reads are missing, or of another shape.
        """
        config, level = self.config, self.config.level
        for name, states, width, wanted in (
            ("draft", draft, config.draft_width, level in READS_DRAFT),
            ("target", target, config.width, level in READS_TARGET),
        ):
            if (states is not None) != wanted:
                raise ValueError(f"{level} {'needs' if wanted else 'does not read'} {name} states")
            if wanted and (states.dim() != 3 or states.shape[2] != width):
                raise ValueError(f"{name} states must be [B, S, {width}], got {list(states.shape)}")
        read = [] if draft is None else [self.project(draft)]
        read += [] if target is None else [target]
        length = read[0].shape[1]
        if hasattr(self.body, "position") and length > config.positions:
            raise ValueError(f"at most {config.positions} states can be read, got {length}")
        return self.body(*read, mask=mask)


class _Bottleneck(nn.Module):
    """x + alpha * Up(drop(GELU(Down(LN x))))."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.down = nn.Linear(config.width, config.bottleneck, bias=False)
        self.up = nn.Linear(config.bottleneck, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.alpha = nn.Parameter(torch.tensor(config.alpha))
        nn.init.kaiming_normal_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.drop(nn.functional.gelu(self.down(self.norm(x))))
        return x + self.alpha * self.up(inner)


class _Bottlenecks(nn.Module):
    """L1 and L2."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        count = 1 if config.level == "L1" else config.blocks
        self.blocks = nn.ModuleList(_Bottleneck(config) for _ in range(count))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _WideBlock(nn.Module):
    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.width, config.wide, bias=False),
            nn.LayerNorm(config.wide),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.wide, config.width, bias=False),
            nn.Dropout(config.dropout),
        )
        self.alpha = nn.Parameter(torch.tensor(config.alpha))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * self.net(x)


class _Wide(nn.Module):
    """L3."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        self.first = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(_WideBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(
            width, config.heads, config.dropout, batch_first=True
        )
        self.inner_norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(
            nn.Linear(width, config.intermediate),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.intermediate, width),
            nn.Dropout(config.dropout),
        )

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor | None, future: torch.Tensor | None
    ) -> torch.Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, hidden, need_weights=False, attn_mask=future)[0]
        return x + self.inner(self.inner_norm(x))


class _Attention(nn.Module):
    """L4: every state looks at every other; the result is mixed into the draft's state."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.width)
        self.alpha = nn.Parameter(torch.tensor(config.alpha))
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.mix(h, h, None if mask is None else ~mask, None)

    def mix(
        self,
        x: torch.Tensor,
        into: torch.Tensor,
        hidden: torch.Tensor | None,
        future: torch.Tensor | None,
    ) -> torch.Tensor:
        """`into` moved by alpha towards what the blocks make of `x`."""
        for block in self.blocks:
            x = block(x, hidden, future)
        return self.leave(x, into)

    def leave(self, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """`into` moved by alpha towards what the blocks made, `x`."""
        return into + self.alpha * (self.out(self.norm(x)) - into)


class _Causal(_Attention):
    """L5 on the draft's states, B1 on the target's own: no state looks ahead."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__(config)
        self.first = nn.LayerNorm(config.width)
        self.position = nn.Embedding(config.positions, config.width)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, h: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.placed(h, h)

    def enter(self, h: torch.Tensor, start: int = 0) -> torch.Tensor:
        """What the blocks read of ``[..., S, width]``, positions `start` and on."""
        return self.first(h) + self.position.weight[start : start + h.shape[-2]]

    def placed(self, h: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        length = h.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        return self.mix(self.enter(h), into, None, future)


class _Fused(_Causal):
    """L5F: a gate between the draft's and the target's states."""

    def __init__(self, config: HiddenAdapterConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(2 * config.width, config.width)
        self.join = nn.Linear(2 * config.width, config.width)

    def forward(
        self, draft: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        both = torch.cat([draft, target], -1)
        gate = self.gate(both).sigmoid()
        fused = gate * draft + (1 - gate) * target + self.join(both)
        return self.placed(fused, target)

    def beside(self, draft: torch.Tensor) -> torch.Tensor:
        """The draft states ``[S, width]`` and their share of the gate and of the joined state,
        ``[S, 3 * width]``: what `fuse` needs of them, once for all steps.
        """
        width = draft.shape[-1]
        maps = ((self.gate.weight[:, :width], self.gate.bias),
                (self.join.weight[:, :width], self.join.bias))  # fmt: skip
        return torch.cat([draft, *(nn.functional.linear(draft, *each) for each in maps)], -1)

    def fuse(self, beside: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Gated states ``[S, width]`` of target states and what `beside` gave for their places."""
        width = target.shape[-1]
        draft, gate, joined = beside.split(width, -1)
        gate = torch.addmm(gate, target, self.gate.weight[:, width:].T).sigmoid()
        joined = torch.addmm(joined, target, self.join.weight[:, width:].T)
        return torch.lerp(target, draft, gate) + joined


_BODIES = {
    "L1": _Bottlenecks,
    "L2": _Bottlenecks,
    "L3": _Wide,
    "L4": _Attention,
    "L5": _Causal,
    "B1": _Causal,
    "L5F": _Fused,
}
