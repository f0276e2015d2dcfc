"""Many prompts, several at a time: the rounds of all running requests share their forward passes.

A request that ends makes room for the next one at once. Every answer equals the one that
`SpeculativeDecoder` gives by itself outside near ties, whatever runs, fails or is cancelled beside
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from .batch_call import BatchCall
from .config import SpecConfig
from .drafters.base import Drafter, Request
from .engine import Generation, Stop
from .prefill import check_drafted
from .targets.base import Target
from .targets.greedy import check_ids


@dataclass(slots=True)
class BatchPrompt:
    """One prompt of a batch; the fields are the arguments of `SpeculativeDecoder.generate`."""

    inputs: Mapping[str, torch.Tensor]
    request: Request | None = None
    logits_processor: LogitsProcessorList | None = None
    drafted: Sequence[int] = ()
    stop: Stop | None = None
    seed: int | None = None


class BatchDecoder:
    """Decoding of several requests at once, each with a drafter of its own.

    Where the configuration has a temperature, a prompt with a `seed` is answered as by
    `SpeculativeDecoder` with that seed; the others draw from the configuration's seed and their
    place among the prompts. Neither depends on what runs beside them.

    Args:
        target: the model; its capacity holds for every request.
        make_drafter: makes the drafters, at most `batch` and one for each whose request failed,
            which is not asked again; they may share a memory. None: plain decoding.
        config: as for `SpeculativeDecoder`.
        batch: requests at once.

    Raises:
        ValueError: `batch` is below 1.
    """

    def __init__(
        self,
        target: Target,
        make_drafter: Callable[[], Drafter] | None = None,
        config: SpecConfig | None = None,
        batch: int = 8,
    ) -> None:
        self.target = target.batched(batch)
        self.make_drafter = make_drafter
        self.config = config or SpecConfig()
        self.batch = batch
        self.idle: list[Drafter] = []

    def generate(
        self,
        prompts: Sequence[BatchPrompt | Mapping[str, torch.Tensor]],
        on_tokens: Callable[[int, list[int]], None] | None = None,
        return_errors: bool = False,
    ) -> list[Generation]:
        """Answer `prompts`; the answers come in their order.

        In `Generation.rounds` all times but `propose_ms` are those of the whole batch, and
        `prefill_ms` counts from this call on, waiting included.

        Args:
            prompts: any number; a mapping is the `inputs` of a `BatchPrompt`.
            on_tokens: called with a prompt's index and its new tokens as soon as they are final.
            return_errors: the error of a request, malformed ones included, comes back as its
                `Generation.error`, beside the tokens it had, and the others go on. Without, the
                first error is raised and ends them all. Where a shared pass runs out of memory, it
                is tried once more without drafts; whatever else breaks a shared pass is the error
                of all requests in it.

        Raises:
            ValueError: a prompt is malformed, or may outgrow the cache; the message names it, and
                nothing has been decoded by then.
            RuntimeError: the target's logits are NaN.
            Exception: what a drafter, `stop` or `on_tokens` raised.
        """
        prompts = [p if isinstance(p, BatchPrompt) else BatchPrompt(p) for p in prompts]
        answers = [Generation([]) for _ in prompts]
        for i, prompt in enumerate(prompts):
            try:
                self._check(i, prompt)
            except ValueError as error:
                if not return_errors:
                    raise
                answers[i].error = error
        tell = on_tokens or (lambda index, tokens: None)
        BatchCall(self, prompts, answers, tell, return_errors).run()
        return answers

    def _check(self, index: int, prompt: BatchPrompt) -> None:
        try:
            length = check_ids(prompt.inputs).shape[1]
            check_drafted(prompt.drafted, self.target.target.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        # The last token is never fed; a prefill wants room for one row behind the prompt.
        new, capacity = self.config.max_new_tokens, self.target.cache.capacity
        if length + max(new - 1, 1) > capacity:
            raise ValueError(
                f"prompt {index}: {length} rows and max_new_tokens {new} may outgrow the KV cache, "
                f"capacity {capacity}; raise it or lower max_new_tokens"
            )
