"""Any transformers model as a target: prefill, verify a tree in one forward pass, commit the
accepted path.

The model keeps its own kernels and arithmetic. Trees go through two public seams,
`AttentionInterface` and `AttentionMaskInterface`: no module is patched. Equal tokens are promised
outside near ties (top-2 gap below 2 ulp of the logits), which every result counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, LogitsProcessorList, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from xspec_kernels import ranges, require_backend, tree_mask, verify_greedy

from ..drafters.base import MAX_ROWS, DraftTree
from ..kv_cache import KVCache

ATTENTION = "xspec_tree"


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    xspec_tree: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of N tree rows ``[B, H, N, D]`` over KV ``[B, H_kv, S, D]``; anything else goes to
    SDPA.

    The heads of a KV group are packed into rows, so K and V are read once and never repeated in
    memory.
    """
    if not xspec_tree:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * rows, width)
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    out = out.reshape(batch, heads, rows, width)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, tree_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(slots=True)
class Verdict:
    """What one verify decided.

    Attributes:
        tokens: emitted tokens, accepted ones and then the recovered or bonus token.
        accepted: accepted draft tokens.
        near_ties: emitted tokens whose two best logits lay within 2 ulp.
        path, length: the accepted path and its length on the device; absent for a single row.
    """

    tokens: list[int]
    accepted: int
    near_ties: int
    path: torch.Tensor | None = None
    length: torch.Tensor | None = None


class TransformersTarget:
    """Batch-1 greedy target over a causal language model or vision-language model of transformers.

    Args:
        model: an evaluation-mode model; its text attention is switched to `ATTENTION` (which hands
            every pass that is no tree to SDPA).
        capacity: rows of the KV cache: prompt, answer and one tree.
        backend: of the ops, see `xspec_kernels.info`.

    Raises:
        ValueError: the model slides its attention window or keeps recurrent state, or the backend
            is unknown.
        RuntimeError: the backend cannot run on the model's device.
    """

    def __init__(self, model: PreTrainedModel, capacity: int = 1024, backend: str = "auto") -> None:
        text = model.config.get_text_config()
        unsupported = {t for t in getattr(text, "layer_types", None) or []} - {"full_attention"}
        if unsupported or getattr(text, "sliding_window", None):
            raise ValueError(
                f"{type(model).__name__} uses {sorted(unsupported) or 'a sliding window'}, "
                "expected full attention in every layer"
            )
        require_backend(backend, model.device.type)
        self.model = model
        self.backend = backend
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size = text.vocab_size
        self.cache = KVCache(text.num_hidden_layers, capacity)
        self._slots = torch.arange(MAX_ROWS, device=self.device)
        nested = "text_config" in getattr(model.config, "sub_configs", {})
        model.set_attn_implementation({"text_config": ATTENTION} if nested else ATTENTION)

    @torch.inference_mode()
    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
    ) -> Verdict:
        """Run the prompt: the first token.

        Args:
            inputs: `input_ids` ``[1, L]`` and whatever the model takes beside it.
            logits_processor: applied to every row with that row's own prefix, prompt included, for
                the whole request (repetition penalty, no-repeat n-grams, ...).
        """
        ids = inputs["input_ids"]
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise ValueError(f"input_ids must be [1, length], got shape {tuple(ids.shape)}")
        self.cache.reset()
        self.cache.check_room(ids.shape[1] + 1)
        logits = self.model(
            **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[0]
        self.cache.advance(ids.shape[1])
        self._prompt, self._processor = ids, logits_processor
        return self.accept(DraftTree.root(-1), logits, [])

    @torch.inference_mode()
    def forward(self, tree: DraftTree) -> torch.Tensor:
        """Logits ``[N, V]`` after every node, in one pass; the rows' K/V lie behind the committed
        ones.
        """
        rows = len(tree)
        self.cache.check_room(rows)
        tokens = torch.tensor([tree.tokens], device=self.device)
        if rows == 1:
            positions = torch.full_like(tokens, self.cache.length)
            kwargs = {}
        else:
            parents = torch.tensor([tree.parent_idx], dtype=torch.int32, device=self.device)
            mask = tree_mask(parents, max_depth=MAX_ROWS, backend=self.backend)
            self._tree = (tokens, parents, mask.ancestor_bits)
            positions = mask.depth + self.cache.length
            additive = self._additive_mask(mask.ancestor_bits, rows)
            kwargs = {"attention_mask": additive, "xspec_tree": True}
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        ).logits[0]

    @torch.inference_mode()
    def accept(self, tree: DraftTree, logits: torch.Tensor, context: Sequence[int]) -> Verdict:
        """The greedy decision on `tree`, whose `logits` the last `forward` gave; nothing is
        committed yet. `context` is the answer so far, the root its last token.

        Raises:
            RuntimeError: the target's logits are NaN on the accepted path.
        """
        if self._processor:
            return self._walk(tree, logits, context)
        best = logits.argmax(-1)[None]
        ties = row_flags(logits)
        if logits.shape[0] == 1:
            # All the host needs comes in one copy, here and below: one wait a round.
            token, flag = _read(torch.stack((best[0, 0], ties[0])))
            return Verdict([token], 0, _count([flag]))
        tokens, parents, bits = self._tree
        result = verify_greedy(tokens, parents, best, bits, backend=self.backend)
        rows = [result.accept_len, result.accept_path[0], result.output_ids[0], ties]
        accepted, *rest = _read(torch.cat(rows))
        rows = logits.shape[0]
        path, emitted, flags = rest[:rows], rest[rows : 2 * rows], rest[2 * rows :]
        count = _count([flags[node] for node in (0, *path[:accepted])])
        return Verdict(
            emitted[: accepted + 1], accepted, count, result.accept_path, result.accept_len
        )

    @torch.inference_mode()
    def commit(self, verdict: Verdict) -> None:
        """Keep the KV rows of the root and of the accepted path."""
        if verdict.accepted:
            self.cache.commit(verdict.path, verdict.length, verdict.accepted)
        else:
            self.cache.advance(1)

    def _walk(self, tree: DraftTree, logits: torch.Tensor, context: Sequence[int]) -> Verdict:
        """`accept` where what follows a node depends on the tokens before it: node by node."""
        answer = torch.tensor([context], dtype=self._prompt.dtype, device=self.device)
        prefix = torch.cat([self._prompt, answer], 1)
        path, emitted, flags = [0], [], []
        while True:
            scores = self._processor(prefix, logits[path[-1]][None].to(torch.float32, copy=True))
            token, flag = _read(torch.stack((scores.argmax(), row_flags(scores)[0])))
            emitted.append(token)
            flags.append(flag)
            child = tree.child(path[-1], token)
            if child is None:
                break
            path.append(child)
            prefix = torch.cat([prefix, prefix.new_tensor([[token]])], 1)
        accepted = torch.tensor([path[1:]], dtype=torch.int32, device=self.device)
        length = torch.tensor([len(path) - 1], dtype=torch.int32, device=self.device)
        return Verdict(emitted, len(path) - 1, _count(flags), accepted, length)

    def _additive_mask(self, ancestor_bits: torch.Tensor, rows: int) -> torch.Tensor:
        """``[1, 1, N, length + N]``: 0 on committed rows and the row's path, -inf elsewhere."""
        length = self.cache.length
        path = (ancestor_bits[0, :, None] >> self._slots[:rows]) & 1
        mask = torch.zeros(1, 1, rows, length + rows, dtype=self.dtype, device=self.device)
        mask[0, 0, :, length:].masked_fill_(path == 0, float("-inf"))
        return mask


def row_flags(logits: torch.Tensor) -> torch.Tensor:
    """int64 ``[N]`` for logits ``[N, V]``: 1 where the best two lie within 2 ulp, 2 for NaN."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    ulp = torch.finfo(logits.dtype).eps * torch.exp2(best.abs().clamp_min(1e-30).log2().floor())
    return torch.where(best.isnan(), 2, (best - second < 2 * ulp).long())


def _read(values: torch.Tensor) -> list[int]:
    """One copy to the host, which waits for the device."""
    with ranges.range_("readback", values.numel()):
        return values.tolist()


def _count(flags: Sequence[int]) -> int:
    """Near ties among `flags`; argmax would silently pick a NaN's place, so that is an error."""
    if 2 in flags:
        raise RuntimeError("the target's logits are NaN: its weights or inputs are damaged")
    return sum(flags)
