"""One call of `model.generate` with our decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from ..batch import BatchDecoder, BatchPrompt
from ..config import SpecConfig
from ..drafters.base import Drafter, DraftTree, PricingDrafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..engine import SpeculativeDecoder
from ..policy import PricedDrafter
from ..targets.greedy import Verdict
from ..targets.transformers import TransformersTarget
from .asked import Asked, RowProcessor, check
from .inputs import deal, padding
from .kept import Kept, kept_for
from .output import Watch, output

ROWS = 16
Make = Callable[[], Drafter | None]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    xspec_rows: int = ROWS,
    xspec_drafter: Drafter | None = None,
    xspec_memory: bool | NgramMemory = True,
    xspec_streamer: BaseStreamer | None = None,
    xspec_seed: int | None = None,
    xspec_pack: bool | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """For `custom_generate`; the keywords starting with ``xspec_`` are given to `model.generate`.

    Args:
        xspec_rows: rows of a verify at most, root included; 1 is plain decoding.
        xspec_drafter: asked instead of the memory, for a single prompt.
        xspec_memory: False keeps nothing and drafts from the prompt and this answer alone; or a
            memory of your own.
        xspec_streamer: transformers does not hand `streamer` on to a callable.
        xspec_seed: of the draws where the call samples; by default drawn from torch's generator.
        xspec_pack: whether float32 weights on a CPU are copied once into a layout in which short
            verifies cost no more than single rows; by default where a quarter of the free memory
            holds the copy.

    Returns:
        What `generate` returns: ids ``[B, T]``, padded at the end, or with
        `return_dict_in_generate` an output with `sequences`, and `scores`, `logits` and the filled
        cache for a single prompt.

    Raises:
        ValueError: the call asks for something that is not supported; the message names it.
        RuntimeError: the target's logits are NaN.
    """
    config = generation_config or model.generation_config
    own = {
        "xspec_rows": xspec_rows, "xspec_drafter": xspec_drafter, "xspec_memory": xspec_memory,
        "xspec_streamer": xspec_streamer,
    }  # fmt: skip
    check(model, input_ids, config, logits_processor or (), model_kwargs, own)
    asked = Asked.of(input_ids, logits_processor, stopping_criteria, config)
    rows = deal(model.config, input_ids, model_kwargs)
    if asked.temperature and xspec_seed is None:
        xspec_seed = int(torch.randint(2**62, ()))
    settings = SpecConfig(
        xspec_rows, asked.max_new_tokens, asked.ends, temperature=asked.temperature,
        top_k=asked.top_k, top_p=asked.top_p, seed=xspec_seed or 0,
    )  # fmt: skip
    kept = kept_for(model)
    needed = input_ids.shape[1] + asked.max_new_tokens + xspec_rows
    with kept.running(model, xspec_pack) as packed, kept.cache(model, needed) as cache:
        target = _ScoringTarget(model, cache=cache)
        with _drafters(kept, target, xspec_rows, packed, xspec_drafter, xspec_memory) as (
            make,
            memory,
        ):
            call = _Call(input_ids, asked, config, model_kwargs, xspec_streamer)
            answers = call.run(target, settings, make, rows, memory)
        return output(
            input_ids, answers, asked, config, target.logits, call.scores or target.logits, cache,
            model_kwargs,
        )  # fmt: skip


class _ScoringTarget(TransformersTarget):
    """Remembers the logits of emitted tokens while asked to."""

    logits: list[torch.Tensor] | None = None

    def accept(self, tree: DraftTree, logits: torch.Tensor, context: Sequence[int]) -> Verdict:
        verdict = super().accept(tree, logits, context)
        if self.logits is not None:
            path = [] if verdict.path is None else verdict.path[0, : verdict.accepted].tolist()
            self.logits += [logits[node : node + 1].float() for node in (0, *path)]
        return verdict


class _Call:
    """The answers of one call.

    Attributes:
        scores: of the emitted tokens, where processors made them and the call wants them.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        asked: Asked,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        streamer: BaseStreamer | None,
    ) -> None:
        self.input_ids, self.asked, self.streamer = input_ids, asked, streamer
        self.scored = bool(
            config.return_dict_in_generate and (config.output_scores or config.output_logits)
        )
        self.scores: list[torch.Tensor] | None = [] if self.scored and asked.processors else None
        prompts = [input_ids[i : i + 1] for i in range(len(input_ids))]
        self.watches = [Watch(prompt, asked.criteria) for prompt in prompts]
        self.processors = [
            RowProcessor(asked.processors_of(i), prompt, padding(model_kwargs, i), self.scores)
            if asked.processors
            else None
            for i, prompt in enumerate(prompts)
        ]

    def run(
        self,
        target: _ScoringTarget,
        settings: SpecConfig,
        make: Make,
        rows: Sequence[dict[str, Any]],
        memory: NgramMemory | None,
    ) -> list[list[int]]:
        """Tokens of every prompt; answers that criteria have cut are learned by `memory`."""
        if self.streamer:
            self.streamer.put(self.input_ids.cpu())
        if len(rows) == 1:
            target.logits = [] if self.scored else None
            decoder = SpeculativeDecoder(target, make(), settings)
            found = [
                decoder.generate(
                    rows[0], None, self.processors[0], lambda tokens: self._tell(0, tokens),
                    stop=self.watches[0].stop,
                )
            ]  # fmt: skip
        else:
            prompts = [
                BatchPrompt(row, None, processor, stop=watch.stop)
                for row, processor, watch in zip(rows, self.processors, self.watches, strict=True)
            ]
            found = BatchDecoder(target, make, settings, len(rows)).generate(prompts, self._tell)
        if self.streamer:
            self.streamer.end()
        answers = []
        for answer, watch in zip(found, self.watches, strict=True):
            answers.append(watch.final(answer.tokens))
            # Drafters take a request that was stopped for one that nobody wanted.
            if memory is not None and answer.cancelled:
                memory.add(answers[-1])
        return answers

    def _tell(self, index: int, tokens: list[int]) -> None:
        new = self.watches[index].see(tokens)
        if self.streamer and new:
            self.streamer.put(torch.tensor(new))


@contextmanager
def _drafters(
    kept: Kept,
    target: TransformersTarget,
    rows: int,
    packed: bool,
    drafter: Drafter | None,
    memory: bool | NgramMemory,
) -> Iterator[tuple[Make, NgramMemory | None]]:
    """What makes the drafter of a request, and the memory that learns its answer."""
    if rows < 2:
        yield (lambda: None), None
        return
    if isinstance(drafter, PricingDrafter):
        yield (lambda: drafter), None
        return
    costs = kept.costs_of(target, rows, packed)
    if drafter is not None:
        yield (lambda: PricedDrafter(drafter, costs)), None
    elif isinstance(memory, bool):
        with kept.lent(rows, packed, memory, costs) as make:
            yield make, kept.memory if memory else None
    else:
        yield (lambda: PricedDrafter(NgramDrafter(memory, online=True), costs)), memory
