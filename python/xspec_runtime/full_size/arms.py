"""The ways to answer one request at full size: ours, and the users' stack."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from time import perf_counter

import torch

from ..arms import HfArm, Outcome, Task
from ..config import SpecConfig
from ..drafters.base import Drafter, Request
from ..drafters.graph_draft import GraphDrafter
from ..drafters.memory import NgramMemory
from ..drafters.ngram import NgramDrafter
from ..engine import SpeculativeDecoder
from ..nf4_model import quantize_model
from ..targets.llama import LlamaTarget
from ..targets.llama_weights import LlamaWeights
from ..verify_cost.stage import find_config, random_model
from .adapters import state_pass, token_adapter_tail
from .imposed import ImposedTarget, ImposedTree, imposed_drafts, script
from .options import Options, Shape
from .oracle import Oracle
from .peers import ResearchLoop, with_bitsandbytes

MEMORY_ANSWERS = 200

# A request by the number of its sample.
Run = Callable[[int], Outcome]


def _task(shape: Shape, vocab: int, options: Options) -> Task:
    draw = torch.Generator().manual_seed(options.seed)
    ids, draft = (
        torch.randint(3, vocab, (1, n), generator=draw).to(options.device)
        for n in (shape.prompt_tokens, shape.draft_prompt_tokens)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Task("random prompt", inputs, Request(ids[0].tolist(), {"input_ids": draft}))


def our_arms(
    options: Options, shape: Shape, oracle: Oracle, draft_oracle: Oracle
) -> tuple[dict[str, Run], dict[str, str]]:
    """Arms by name, and those left out with the reason.

    `l4_verify` is `separate_verify` with the pass of L4 over the draft's states; in
    `adapter_tail` the TokenAdapter ends every verify, and every chain fares like a draft's first.
    """
    config = find_config(shape.config)
    vocab, tokens = config.vocab_size, shape.max_new_tokens
    answer, task = script(vocab, tokens, options.seed), _task(shape, vocab, options)

    def weights(seed: int) -> LlamaWeights:
        model = random_model(config, options.device, shape.dtype, seed)
        if options.weights == "nf4":
            quantize_model(model)
        return LlamaWeights.of(model, share=True)

    room = tokens + options.rows + options.gamma + 1
    target = ImposedTarget(
        weights(options.seed), answer, draft_oracle, capacity=shape.prompt_tokens + room,
        graphs=True if options.device == "cpu" else "auto",
    )  # fmt: skip
    draft_target = LlamaTarget(weights(options.seed + 1), shape.draft_prompt_tokens + room)
    draft = GraphDrafter(draft_target, options.gamma)
    rng = random.Random(options.seed)
    memory = NgramMemory()
    memory.extend([[rng.randrange(vocab) for _ in range(tokens)] for _ in range(MEMORY_ANSWERS)])

    def arm(
        fused: str,
        drafts: bool,
        trees: bool,
        adapter: Callable[[], object] = lambda: None,
        tail: Drafter | None = None,
    ) -> Run:
        rows = options.rows if trees else options.gamma + 1 if drafts or tail else 1
        tree = ImposedTree(NgramDrafter(memory, False), answer, vocab, oracle) if trees else tail
        # A chain that rides in the prefill, or seeds a tree, may be longer than the tree.
        config = SpecConfig(max(rows, options.gamma + 1) if drafts else rows, tokens,
                            prefill_fused=fused)  # fmt: skip
        decoder = SpeculativeDecoder(target, tree, config)

        def run(number: int) -> Outcome:
            start, drafted = perf_counter(), []
            if drafts:
                draft.begin(task.request)
                said = draft.opening(options.gamma)
                adapter()
                drafted = imposed_drafts(said, answer, vocab, draft_oracle[number])
            begin_ms = 1e3 * (perf_counter() - start) if drafts else 0.0
            out = decoder.generate(task.inputs, task.request, drafted=drafted)
            if out.tokens != answer[:tokens]:
                raise RuntimeError("an arm's tokens are not the ones that were imposed")
            return Outcome(
                out.tokens, begin_ms + out.total_ms, begin_ms + out.prefill_ms, out.prefill_ms,
                begin_ms, out.near_ties, 1 + len(out.rounds), out.rounds,
                out.prefill_drafted, out.prefill_accepted,
            )  # fmt: skip

        return run

    tiny = options.shape == "tiny"
    mapped = state_pass(target, options.gamma, tiny, options.seed)
    arms = {
        "plain": arm("off", False, False),
        "separate_verify": arm("exact", True, False),
        "l4_verify": arm("exact", True, False, mapped),
        "fused_exact": arm("exact", True, True),
        "fused_fast": arm("fast", True, True),
        "memory_tree": arm("off", False, True),
    }
    if not target.graphs:
        return arms, {"adapter_tail": "the target has no graphs: its ops are not Triton's"}
    tail = token_adapter_tail(target, draft, options.gamma, tiny)
    return arms | {"adapter_tail": arm("off", False, False, tail=tail)}, {}


def peer_arms(
    options: Options, shape: Shape, oracle: Oracle, draft_oracle: Oracle
) -> tuple[dict[str, Run], dict[str, str]]:
    """The same of transformers, with bitsandbytes where weights are in NF4."""
    names = ("transformers_generate", "transformers_research_loop")
    if options.weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return {}, dict.fromkeys(names, "bitsandbytes is not installed")
    config, models = find_config(shape.config), []
    task = _task(shape, config.vocab_size, options)
    for seed in (options.seed, options.seed + 1):
        model = random_model(config, options.device, shape.dtype, seed)
        if options.weights == "nf4":
            try:
                with_bitsandbytes(model)
            except (ImportError, RuntimeError) as error:
                return {}, dict.fromkeys(names, f"bitsandbytes: {error}")
        models.append(model)
    tokens = shape.max_new_tokens
    exact = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    generate = HfArm(names[0], models[0], True, **exact)

    def research(number: int) -> Outcome:
        accepted = draft_oracle[number]
        return ResearchLoop(*models, options.gamma, accepted, tokens).run(task)

    return {names[0]: lambda number: generate.run(task), names[1]: research}, {}
