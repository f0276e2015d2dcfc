"""The models, decoders and drafters of a soak, made once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from ..batch import BatchDecoder
from ..config import SpecConfig
from ..drafters.base import Drafter, DraftTree
from ..drafters.draft_model import ModelDrafter
from ..drafters.graph_draft import GraphDrafter
from ..drafters.merge import MergedDrafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..engine import SpeculativeDecoder
from ..policy import PricedDrafter
from ..targets.base import Target
from ..targets.llama import LlamaTarget
from ..targets.transformers import TransformersTarget
from .faults import MOMENTS, FaultyDrafter, FaultyPasses
from .plan import (
    BATCHES,
    CAPACITY,
    DRAFTERS,
    LONGEST,
    PENALTY,
    PROCESSED,
    ROWS,
    VOCAB,
    Plan,
    PlannedRequest,
)

# "graphs" is our kernels with a round in one launch.
ENGINES = ("transformers", "llama", "graphs")
GAMMA = 4
# Few enough to be full after a hundred answers.
MEMORY_TOKENS = 2000


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Two layers with weights large enough to keep the best two logits apart."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.25,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def build_target(engine: str, model: LlamaForCausalLM, capacity: int = CAPACITY) -> Target:
    """One of `ENGINES` over `model`."""
    if engine == "transformers":
        return TransformersTarget(model, capacity)
    return LlamaTarget(model, capacity, max_depth=64, graphs=engine == "graphs")


class GuessingDrafter:
    """Random trees around the right answer, which it knows."""

    name = "guess"

    def __init__(self) -> None:
        self._rng, self._answer = Random(), ()

    def begin(self, request: PlannedRequest) -> None:
        self._rng.seed(request.plan.seed)
        self._answer = request.answer

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        rng, known = self._rng, len(context)
        right = self._answer[known : known + rng.randint(0, rows - 1)]
        tree = DraftTree.chain(context[-1], right)
        for _ in range(rows - len(tree)):
            parent, token = rng.randrange(len(tree)), rng.randrange(VOCAB)
            # No two siblings say the same.
            if tree.child(parent, token) is None:
                tree.add(parent, token, 0.0)
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""


class PlannedDrafter:
    """The drafter that a request's plan names, sound or with its fault, from a common stock."""

    name = "planned"

    def __init__(self, stock: dict[str, list[Drafter]]) -> None:
        self._stock = stock
        self._kind, self._inner = "", None

    def begin(self, request: PlannedRequest) -> None:
        plan = request.plan
        self._kind = plan.drafter
        moment = plan.fault if plan.fault in MOMENTS else ""
        self._inner = FaultyDrafter(self._stock[self._kind].pop(), moment, plan.after)
        self._inner.begin(request)

    def opening(self, rows: int) -> list[int]:
        return self._inner.opening(rows)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        return self._inner.propose(context, rows)

    def end(self, answer: Sequence[int]) -> None:
        """Back into the stock, whatever has happened."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        try:
            inner.end(answer)
        except BaseException:
            inner.end([])
            raise
        finally:
            self._stock[self._kind].append(inner.drafter)


class SoakBench:
    """Decoders of every engine and batch size over the same random weights.

    Args:
        prompts: ids ``[1, L]``; their plain answers are found here, before anything is watched.
    """

    def __init__(self, seed: int, engines: Sequence[str], prompts: Sequence[torch.Tensor]) -> None:
        self.prompts = prompts
        self.processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(PENALTY)])
        self.memory = NgramMemory(max_tokens=MEMORY_TOKENS, recency=0)
        self.stock: dict[str, list[Drafter]] = defaultdict(list)
        # One draft model is the target, the other one is a stranger.
        drafts = tiny_llama(seed), tiny_llama(seed + 1)
        for kind in DRAFTERS:
            self.stock[kind] += [self._drafter(kind, *drafts) for _ in range(max(BATCHES))]
        self.decoders: dict[tuple[str, int], SpeculativeDecoder | BatchDecoder] = {}
        self.faults: dict[str, FaultyPasses] = {}
        self.plain: dict[tuple[str, int, bool], list[int]] = {}
        for engine in engines:
            target = build_target(engine, tiny_llama(seed))
            self._find_answers(engine, target)
            self.faults[engine] = FaultyPasses(target)
            drafter = PlannedDrafter(self.stock)
            for batch in set(BATCHES):
                self.decoders[engine, batch] = (
                    SpeculativeDecoder(target, drafter)
                    if batch == 1
                    else BatchDecoder(target, self._make, batch=batch)
                )
        self._warm_up()

    def _warm_up(self) -> None:
        """Allocate what stays: caches of every decoder and drafter."""
        ids = self.prompts[0]
        for decoder in self.decoders.values():
            decoder.config = SpecConfig(1, 2)
            inputs = {"input_ids": ids}
            if isinstance(decoder, BatchDecoder):
                decoder.make_drafter = None
                decoder.generate([inputs] * decoder.batch)
                decoder.make_drafter = self._make
            else:
                SpeculativeDecoder(decoder.target, None, decoder.config).generate(inputs)
        for drafter in (drafter for kind in self.stock.values() for drafter in kind):
            drafter.begin(PlannedRequest(ids[0].tolist(), {"input_ids": ids}, plan=Plan(0, "", 0)))
            drafter.propose([1], max(ROWS))
            drafter.end([])

    def _make(self) -> PlannedDrafter:
        return PlannedDrafter(self.stock)

    def _find_answers(self, engine: str, target: Target) -> None:
        for i, ids in enumerate(self.prompts):
            new = min(LONGEST, CAPACITY - ids.shape[1] + 1)
            plain = SpeculativeDecoder(target, None, SpecConfig(1, new))
            for processed in (False, True)[: 1 + (i < PROCESSED)]:
                processor = self.processor if processed else None
                found = plain.generate({"input_ids": ids}, logits_processor=processor)
                self.plain[engine, i, processed] = found.tokens

    def _drafter(self, kind: str, twin: LlamaForCausalLM, stranger: LlamaForCausalLM) -> Drafter:
        memory = NgramDrafter(self.memory, online=True, name=kind)

        def drafting(model: LlamaForCausalLM) -> ModelDrafter:
            return ModelDrafter(model, GAMMA, siblings=1, capacity=2 * CAPACITY)

        make: dict[str, Callable[[], Drafter]] = {
            "guess": GuessingDrafter,
            "memory": lambda: memory,
            "model": lambda: drafting(twin),
            "tree": lambda: MergedDrafter([memory, drafting(stranger)]),
            "priced": lambda: PricedDrafter(memory, [1.0 + 0.01 * row for row in range(64)]),
            "graph": lambda: GraphDrafter(LlamaTarget(twin, 2 * CAPACITY), GAMMA),
        }
        return make[kind]()
