"""TextHead: the target's verified prefix to its next tokens; a recurrent network over words.

It sees no draft and no video: what it adds to a memory of past answers is that it has no need of
equal contexts. Only tokens that the training answers hold can be proposed; its table has a row for
each of these and one for all others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import existing_file, replace_file

FORMAT = "xspec.text_head/1"
UNKNOWN = 0  # row of the table of all tokens that training never saw
LIMITS = {"vocab_size": 2**31 - 1, "words": 2**20, "width": 4096}


@dataclass(frozen=True)
class TextHeadConfig:
    """Sizes of a TextHead; the output shares the embedding's weights.

    Attributes:
        vocab_size: of the target.
        words: different tokens of the training answers.
    """

    vocab_size: int
    words: int
    width: int = 128

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= LIMITS[name]:
                raise ValueError(f"{name} must be an int in 1..{LIMITS[name]}, got {value!r}")


class TextHead(nn.Module):
    """Logits of the next token after every prefix.

    Attributes:
        ids: target ids of the known words, int64 ``[words]``, rising; row i of the table is
            ``ids[i - 1]``.
        temperature: of the probabilities at runtime, calibrated on answers kept out of training.
    """

    def __init__(self, config: TextHeadConfig, ids: torch.Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        width, rows = config.width, config.words + 1
        self.register_buffer("ids", ids)
        self.register_buffer("temperature", torch.ones(()))
        self.embed = nn.Embedding(rows, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(rows))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=width**-0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the table ``[B, T]`` -> logits ``[B, T, words + 1]``; place i sees 0..i."""
        hidden, _ = self.gru(self.dropout(self.embed(rows)))
        return F.linear(self.dropout(self.out(hidden)), self.embed.weight, self.bias)

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Target ids of any shape -> rows of the table."""
        at = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[at] == tokens, at + 1, UNKNOWN)


class TextHeadSteps:
    """A TextHead one token at a time for many paths at once: NumPy, since little arithmetic stands
    between the calls. Float32; its arithmetic differs from the module's in rounding only.
    """

    def __init__(self, head: TextHead) -> None:
        values = {k: v.detach().float().cpu().numpy() for k, v in head.state_dict().items()}
        embed, self.width = values["embed.weight"], head.config.width
        self.ids = np.concatenate([[-1], head.ids.cpu().numpy()])
        self._row = {int(token): row for row, token in enumerate(self.ids)}
        self._input = embed @ values["gru.weight_ih_l0"].T + values["gru.bias_ih_l0"]
        self._hidden = np.ascontiguousarray(values["gru.weight_hh_l0"].T)
        self._hidden_bias = values["gru.bias_hh_l0"]
        scale = 1.0 / float(values["temperature"])
        self._out = np.ascontiguousarray((embed @ values["out.weight"]).T) * scale
        self._out_bias = (embed @ values["out.bias"] + values["bias"]) * scale

    def start(self) -> np.ndarray:
        """State before the first token, ``[1, width]``."""
        return np.zeros((1, self.width), np.float32)

    def advance(self, states: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """States ``[n, width]`` after one more token each."""
        width = self.width
        fed = self._input[[self._row.get(token, UNKNOWN) for token in tokens]]
        kept = states @ self._hidden + self._hidden_bias
        # Half a hyperbolic tangent more is a sigmoid, and it cannot overflow.
        gates = 0.5 + 0.5 * np.tanh(0.5 * (fed[:, : 2 * width] + kept[:, : 2 * width]))
        new = np.tanh(fed[:, 2 * width :] + gates[:, :width] * kept[:, 2 * width :])
        return new + gates[:, width:] * (states - new)

    def likely(self, states: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and probabilities of the `count` likeliest known words, each ``[n, count]``, the
        likeliest first."""
        logits = states @ self._out + self._out_bias
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        chances[:, UNKNOWN] = -1.0
        count = min(count, chances.shape[1] - 1)
        best = np.argpartition(-chances, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(chances, best, 1)
        order = np.argsort(-found, axis=1, kind="stable")
        return self.ids[np.take_along_axis(best, order, 1)], np.take_along_axis(found, order, 1)


def save_text_head(head: TextHead, path: Path) -> None:
    """Write one safetensors file, in one step; sizes are its metadata."""
    state = {key: value.contiguous() for key, value in head.state_dict().items()}
    header = {"format": FORMAT, "config": json.dumps(asdict(head.config))}
    replace_file(path, lambda temporary: save_file(state, temporary, header))


def load_text_head(path: str | Path, vocab_size: int | None = None) -> TextHead:
    """A head ready for inference.

    Args:
        vocab_size: of the target it will draft for; checked where given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text head, its parts contradict each other, or it is for another
            vocabulary.
    """
    path = existing_file(Path(path), "text head")
    try:
        head = _read(path)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a text head: {error}") from None
    if vocab_size not in (None, head.config.vocab_size):
        raise ValueError(
            f"the text head {path} is for a vocabulary of {head.config.vocab_size} tokens, the "
            f"target has {vocab_size}"
        )
    return head.eval().requires_grad_(False)


def _read(path: Path) -> TextHead:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {meta.get('format')}")
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    values = json.loads(meta.get("config", "null"))
    if not isinstance(values, dict):
        raise ValueError("its sizes are missing")
    config = TextHeadConfig(**values)
    ids = state.get("ids")
    if ids is None or ids.dtype != torch.int64 or ids.shape != (config.words,):
        raise ValueError(f"ids must be int64 [{config.words}]")
    if ids[0] < 0 or ids[-1] >= config.vocab_size or (ids.diff() <= 0).any():
        raise ValueError(f"ids must rise within 0..{config.vocab_size - 1}")
    for key, value in state.items():
        if key != "ids" and not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{key} holds values that are not finite numbers")
    head = TextHead(config, ids)
    head.load_state_dict(state)
    if not 0.01 <= float(head.temperature) <= 100.0:
        raise ValueError(f"temperature {float(head.temperature)} is out of range")
    return head
