"""The Llama family as a target on our own kernels: the one that carries the law.

After the prefill, a row's logits and K/V are a function of the weights, the prompt's K/V and the
row's own path and positions; not of the tree around it, nor of where rounds began. Every operation
between a token id and the next one is an op of `xspec_kernels`, which keeps that promise on a GPU,
and on torch where XSPEC_EXACT=1.

Llama, Vicuna, Mistral without sliding window, Qwen2, Qwen3, SmolLM2, and the language models of
Video-LLaVA and EventGPT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from xspec_kernels import embed, info, require_backend

from ..drafters.base import MAX_ROWS, DraftTree
from ..kv_cache import KVCache
from ..nf4_dense import with_dense
from ..prefill import placeholder_ids, usable
from .greedy import TreeRows, Verdict, check_ids, decide, walk
from .llama_decoder import LlamaDecoder, Scored
from .llama_graphs import LlamaGraphs, wants_graphs
from .llama_inputs import embed_prompt
from .llama_rounds import RoundBuffers
from .llama_weights import LlamaWeights
from .sampling import Draws, Sampling
from .windows import Turn

if TYPE_CHECKING:
    from .llama_batch import LlamaBatchTarget

# Head sizes of the Triton kernels.
HEAD_DIMS = (32, 64, 128, 256)
# Prompts are padded to whole multiples of this, so that few shapes of prefill occur.
PREFILL_ROWS = 64


class LlamaTarget:
    """Batch-1 target with the methods of `TransformersTarget`.

    Args:
        model: a loaded model, whose weights are taken and whose towers see the media of a prompt;
            or `LlamaWeights`, for text prompts.
        capacity: rows of the KV cache: prompt and answer, less the answer's last token.
        backend: of the ops, see `xspec_kernels.info`.
        cache: use this one, for instance `KVCache.over` a `StaticCache`, and its capacity.
        max_depth: 32 or 64; nodes of a tree lie above this depth. A row's bits depend on it.
        share_weights: see `LlamaWeights.of`.
        graphs: a round is one launch, decision and commit included, and so is a prefill: on a GPU
            the replay of a CUDA graph, elsewhere a plain call over the same memory. "auto" does so
            on a GPU. Requests that sample or have logits processors, and prefills into another
            cache than this target's, are launched op by op.

    Raises:
        ValueError: the model is not of the family or uses a feature that is not supported (the
            message names it), the backend is unknown, or graphs are wanted of ops that wait for the
            device.
        RuntimeError: the backend cannot run on the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel | LlamaWeights,
        capacity: int = 1024,
        backend: str = "auto",
        cache: KVCache | None = None,
        *,
        max_depth: int = 32,
        share_weights: bool = False,
        graphs: bool | str = "auto",
    ) -> None:
        given = isinstance(model, LlamaWeights)
        self.device = model.embed.device if given else model.device
        require_backend(backend, self.device.type)
        self._rounds = RoundBuffers(self.device, backend, max_depth)
        weights = model if given else LlamaWeights.of(model, share_weights)
        self.dtype = weights.embed.dtype
        chosen = _attention_of(backend, self.device.type)
        if chosen == "torch":
            weights = with_dense(weights)
        _check_head_dim(weights.shape.head_dim, chosen)
        self.model = None if given else model
        self.backend = backend
        self.vocab_size, self.num_layers = weights.shape.vocab, weights.shape.layers
        self.cache = cache or KVCache(self.num_layers, capacity)
        self.turn = Turn()
        # A batch has spare rows behind its capacity.
        self.decoder = LlamaDecoder(weights, self.cache.capacity + MAX_ROWS, backend)
        self.max_depth = max_depth
        self.graphs: LlamaGraphs | None = None
        if wants_graphs(graphs, chosen, self.device.type):
            self.graphs = LlamaGraphs(self.decoder, self._rounds)
        self._placeholders = placeholder_ids(model.config)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        capacity: int = 1024,
        backend: str = "auto",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_depth: int = 32,
        graphs: bool | str = "auto",
    ) -> LlamaTarget:
        """A target for text prompts from `config.json` and safetensors files, without building the
        model. Raises as `LlamaWeights.load` does.
        """
        require_backend(backend, torch.device(device).type)
        weights = LlamaWeights.load(directory, device, dtype)
        return cls(weights, capacity, backend, max_depth=max_depth, graphs=graphs)

    def batched(self, batch: int) -> LlamaBatchTarget:
        """Several requests at once over this target's weights."""
        from .llama_batch import LlamaBatchTarget

        return LlamaBatchTarget(self, batch)

    @torch.inference_mode()
    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
        cache: KVCache | None = None,
        sampling: Sampling | None = None,
    ) -> Verdict:
        """Run the prompt, see `TransformersTarget.prefill`.

        The pass has a whole multiple of `PREFILL_ROWS` rows, or as many as the cache; those behind
        the prompt come later in causal order, so they touch nothing.

        Raises:
            ValueError: `input_ids` is not ``[1, L]``, an input is not understood, or rows are
                masked.
            RuntimeError: the prompt does not fit the cache, or the logits are NaN.
        """
        ids = check_ids(inputs)
        length = ids.shape[1]
        cache = cache or self.cache
        cache.reset()
        cache.check_room(length + 1)
        drafted = usable(drafted, min(self.max_depth - 1, cache.room - length), self._placeholders)
        table = self.decoder.weights.embed
        prompt = embed_prompt(inputs, table, self.model, self.backend)
        rows = length + len(drafted)
        padded = min(-(-rows // PREFILL_ROWS) * PREFILL_ROWS, cache.capacity)
        greedy = not logits_processor and not sampling
        graphs = self.graphs if cache is self.cache and greedy else None
        width = table.shape[1]
        x = graphs.prompt(cache.capacity)[:padded] if graphs else table.new_empty(padded, width)
        x[:length] = prompt
        if drafted:
            tail = torch.tensor(drafted, device=self.device)
            x[length:rows] = embed(tail, table, backend=self.backend)
        x[rows:] = 0

        self._prompt, self._processor, self._sampling = ids, logits_processor, sampling
        self._caches = self._storage(cache)
        # The prompt's last row is the root: it lies in the cache already.
        tree = DraftTree.chain(-1, drafted)
        if graphs:
            self._round = None
            scored = graphs.prefill(padded, length, tree, self._caches)
        else:
            self._round = self._rounds.place([tree], [length - 1])
            hidden = self.decoder.prefill(x, self._caches)[length - 1 : rows]
            scored = self._score(self.decoder.norm(hidden))
        verdict = self.accept(tree, scored, [])
        cache.advance(length + verdict.accepted)
        verdict.drafted = len(drafted)
        return verdict

    @torch.inference_mode()
    def forward(self, tree: DraftTree, height: int = 0) -> Scored:
        """What follows every node, in one pass; the rows' K/V lie behind the committed ones.

        Where `height` is above the tree's rows, the pass has `height` rows. With graphs, more: the
        rows behind the tree's own are unspecified, the K/V of the accepted path is in place
        already, and the next launch overwrites the result.

        Raises:
            ValueError: the tree is deeper than `max_depth` - 1.
            RuntimeError: it does not fit the cache.
        """
        self.cache.check_room(len(tree))
        if self.graphs and not self.wants_logits:
            self._round = None
            return self.graphs.verify([tree], [self.cache.length], height, self._caches)
        self._round = self._rounds.place([tree], [self.cache.length], height)
        return self._score(self.decoder.step(self._round, self._caches))

    @torch.inference_mode()
    def accept(self, tree: DraftTree, scored: Scored, context: Sequence[int]) -> Verdict:
        """The decision on `tree`, which the last `forward` `scored`. The rows of the path
        are in place when this returns, and count from `commit` on.

        Raises:
            RuntimeError: the logits are NaN on the accepted path.
        """
        if self.wants_logits:
            return self._decide_by_logits(tree, scored, context).checked()
        if self._round is None:
            return self._rounds.read(1)[0].checked()
        verdicts = self._rounds.decide(self._round, scored.ids, scored.flags, self._caches)
        return verdicts[0].checked()

    @torch.inference_mode()
    def commit(self, verdict: Verdict) -> None:
        """Keep the KV rows of the root and of the accepted path."""
        if verdict.path is None:
            self.cache.advance(verdict.accepted + 1)
        else:
            self.cache.commit(verdict.path, verdict.length, verdict.accepted)

    @property
    def wants_logits(self) -> bool:
        """Whether the greedy token is not what the request asks for: it is verified op by op."""
        return bool(self._processor or self._sampling)

    def _decide_by_logits(self, tree: DraftTree, scored: Scored, context: Sequence[int]) -> Verdict:
        logits = self.decoder.logits(scored.hidden)
        draws, at = None, self._round
        if self._sampling:
            asked = [(self._sampling, len(context))]
            draws = Draws.of(asked, len(logits), self.device, self.backend)
        if self._processor:
            answer = torch.tensor([context], dtype=self._prompt.dtype, device=self.device)
            prefix = torch.cat([self._prompt, answer], 1)
            return walk(tree, logits, prefix, self._processor, draws)
        laid = TreeRows(at.tokens, at.parents, at.bits, at.depth, at.num_rows)
        return decide(logits[None], laid, self.backend, draws)[0][0]

    def _score(self, hidden: torch.Tensor) -> Scored:
        if self.wants_logits:
            return Scored(hidden, None, None)
        return self.decoder.score(hidden, self._round)

    def _storage(self, cache: KVCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = self.decoder.weights.shape
        for layer in cache.layers:
            if not layer.is_initialized:
                like = self.decoder.weights.embed.new_empty(1, shape.kv_heads, 0, shape.head_dim)
                layer.lazy_initialization(like, like)
        return [(layer.keys, layer.values) for layer in cache.layers]


def _attention_of(backend: str, device_type: str) -> str:
    """The implementation of attention that will run."""
    known = info()
    chosen = known["backend"] if backend == "auto" else backend
    return known["auto"]["tree_attention"][device_type] if chosen == "auto" else chosen


def _check_head_dim(head_dim: int, chosen: str) -> None:
    """Raise `ValueError` where the attention that will run has no kernel of this size."""
    if chosen == "triton" and head_dim not in HEAD_DIMS:
        raise ValueError(
            f"LlamaTarget: heads of {head_dim}, expected one of {HEAD_DIMS}; "
            'backend "torch" takes any'
        )
