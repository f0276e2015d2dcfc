"""Any transformers model as a target: prefill, verify a tree in one forward pass, commit the
accepted path.

The model keeps its own kernels and arithmetic. Trees go through two public seams,
`AttentionInterface` and `AttentionMaskInterface`: no module is patched. Equal tokens are promised
outside near ties (top-2 gap below 2 ulp of the logits), which every result counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from xspec_kernels import require_backend

from ..drafters.base import MAX_ROWS, DraftTree
from ..kv_cache import KVCache
from ..prefill import extend_inputs, placeholder_ids, usable
from .attention import use_tree_attention
from .greedy import (
    TreeRows,
    Verdict,
    check_ids,
    decide,
    decide_steps,
    lay_out,
    row_flags,
    walk,
)
from .sampling import SAMPLING_OPS, Draws, Sampling
from .windows import Turn, Windows

if TYPE_CHECKING:
    from .batch import BatchTarget

# Those of the round; the forward pass is transformers' own.
OPS = ("tree_mask", "verify_greedy", "kv_commit")

__all__ = ["TransformersTarget", "Verdict", "row_flags"]


class TransformersTarget:
    """Batch-1 target over a causal language model or vision-language model of transformers.

    The cache is static: allocated once at `capacity` rows, at addresses that stay. For several
    requests at once see `targets.batch.BatchTarget`.

    Args:
        model: an evaluation-mode model; its text attention is switched to
            `targets.attention.ATTENTION` (which hands every pass that is no tree to SDPA).
        capacity: rows of the KV cache: prompt and answer, less the answer's last token.
        backend: of the ops, see `xspec_kernels.info`.
        cache: use this one, for instance `KVCache.over` a `StaticCache`, and its capacity.

    Raises:
        ValueError: the model keeps recurrent state or caps its attention logits, or the backend is
            unknown.
        RuntimeError: the backend cannot run on the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int = 1024,
        backend: str = "auto",
        cache: KVCache | None = None,
    ) -> None:
        text = model.config.get_text_config()
        self.windows = Windows.of(model)
        require_backend(backend, model.device.type, OPS)
        self.model = model
        self.backend = backend
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size = text.vocab_size
        self.num_layers = text.num_hidden_layers
        self.turn = Turn()
        self.cache = cache or KVCache(self.num_layers, capacity)
        self._slots = torch.arange(MAX_ROWS, device=self.device)
        self._placeholders = placeholder_ids(model.config)
        use_tree_attention(model)

    def batched(self, batch: int) -> BatchTarget:
        """Several requests at once over this target's model."""
        from .batch import BatchTarget

        return BatchTarget(self, batch)

    @torch.inference_mode()
    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
        cache: KVCache | None = None,
        sampling: Sampling | None = None,
    ) -> Verdict:
        """Run the prompt: the first token, or more where drafts that ride along are accepted.

        Args:
            inputs: `input_ids` ``[1, L]`` and whatever the model takes beside it.
            logits_processor: applied to every row with that row's own prefix, prompt included, for
                the whole request (repetition penalty, no-repeat n-grams, ...).
            drafted: what the answer may begin with, at most 63 tokens; rows behind the prompt in
                the same pass. Used as far as the cache has room, and up to the first id that the
                model would replace by media features.
            cache: where the prompt goes; by default this target's own.
            sampling: of the whole request; None is greedy. Processors come first.

        Raises:
            ValueError: `input_ids` is not ``[1, L]``, or an input cannot be extended by `drafted`.
            RuntimeError: the prompt does not fit the cache, the logits are NaN, or the backend
                cannot sample.
        """
        if sampling:
            require_backend(self.backend, self.device.type, SAMPLING_OPS)
        ids = check_ids(inputs)
        length = ids.shape[1]
        cache = cache or self.cache
        cache.reset()
        cache.check_room(length + 1)
        drafted = usable(drafted, min(MAX_ROWS - 1, cache.room - length), self._placeholders)
        tree = DraftTree.chain(-1, drafted)
        logits = self.model(
            **(extend_inputs(inputs, drafted) if drafted else inputs),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(tree),
        ).logits[0]
        self.turn = Turn.of(inputs)
        self._prompt, self._processor, self._sampling = ids, logits_processor, sampling
        self._laid = lay_out([tree], len(tree), self.device, self.backend) if drafted else None
        verdict = self.accept(tree, logits, [])
        # A chain lies as it is committed; what was rejected is written over.
        cache.advance(length + verdict.accepted)
        verdict.drafted = len(drafted)
        return verdict

    @torch.inference_mode()
    def forward(self, tree: DraftTree, height: int = 0) -> torch.Tensor:
        """Logits ``[N, V]`` after every node, in one pass; the rows' K/V lie behind the committed
        ones.

        Where `height` is above the tree's rows and the cache has the room, N is `height` and the
        rows after the tree's are inert.
        """
        rows = len(tree)
        cache = self.cache
        cache.check_room(rows)
        if rows == 1:
            tokens = torch.tensor([tree.tokens], device=self.device)
            positions = torch.full_like(tokens, cache.length)
            kwargs = {}
        else:
            if rows < height <= cache.room:
                rows = height
            self._laid = lay_out([tree], rows, self.device, self.backend)
            tokens, positions = self._laid.tokens, self._laid.depth + cache.length
            seen = torch.arange(cache.length, device=self.device)[None]
            additive = self.windows.masks(
                self._additive_mask(self._laid, rows), positions, torch.cat([seen, positions], 1)
            )
            kwargs = {"attention_mask": additive, "xspec_tree": True}
        return self.model(
            input_ids=tokens,
            position_ids=self.turn.positions(positions),
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        ).logits[0]

    @torch.inference_mode()
    def accept(self, tree: DraftTree, logits: torch.Tensor, context: Sequence[int]) -> Verdict:
        """The decision on `tree`, whose `logits` the last `forward` gave; nothing is
        committed yet. `context` is the answer so far, the root its last token.

        Raises:
            RuntimeError: the target's logits are NaN on the accepted path.
        """
        draws = None
        if self._sampling:
            asked = [(self._sampling, len(context))]
            draws = Draws.of(asked, len(logits), self.device, self.backend)
        if self._processor:
            answer = torch.tensor([context], dtype=self._prompt.dtype, device=self.device)
            prefix = torch.cat([self._prompt, answer], 1)
            return walk(tree, logits, prefix, self._processor, draws).checked()
        if logits.shape[0] == 1:
            return decide_steps(logits, draws)[0].checked()
        return decide(logits[None], self._laid, self.backend, draws)[0][0].checked()

    @torch.inference_mode()
    def commit(self, verdict: Verdict) -> None:
        """Keep the KV rows of the root and of the accepted path."""
        if verdict.accepted:
            self.cache.commit(verdict.path, verdict.length, verdict.accepted)
        else:
            self.cache.advance(1)

    def _additive_mask(self, laid: TreeRows, rows: int) -> torch.Tensor:
        """``[1, 1, N, length + N]``: 0 on committed rows and the row's path, -inf elsewhere."""
        length = self.cache.length
        path = (laid.bits[0, :, None] >> self._slots[:rows]) & 1
        mask = torch.zeros(1, 1, rows, length + rows, dtype=self.dtype, device=self.device)
        mask[0, 0, :, length:].masked_fill_(path == 0, float("-inf"))
        return mask
