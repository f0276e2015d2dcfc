"""The stack that users have today: transformers, with bitsandbytes where weights are in NF4."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..arms import Outcome, Task


def with_bitsandbytes(model: PreTrainedModel) -> None:
    """Put bitsandbytes' NF4 layers, double quantization and all, in the place of every linear layer
    but the head.

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        size, device = (module.in_features, module.out_features), module.weight.device
        kind = {"quant_type": "nf4", "compress_statistics": True}
        made = bnb.nn.Linear4bit(
            *size, bias=False, compute_dtype=module.weight.dtype, device="meta", **kind
        )
        weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, **kind)
        made.weight = weight.to(device)
        model.set_submodule(name, made)


class ResearchLoop:
    """The loop of the public research code: the draft answers alone, one verify of all it said,
    then plain decoding. Every token goes through the host, as there.

    Args:
        gamma: tokens that the draft says.
        accepted: how many of them the verify accepts, imposed.
    """

    name = "research_loop"

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        gamma: int,
        accepted: int,
        max_new_tokens: int,
    ) -> None:
        self._target, self._draft = target, draft
        self._gamma, self._accepted = gamma, min(accepted, gamma, max_new_tokens - 1)
        self._tokens = max_new_tokens

    @torch.inference_mode()
    def run(self, task: Task) -> Outcome:
        """One answer; its tokens are whatever random weights say."""
        start = perf_counter()
        drafts = _decode(self._draft, task.request.draft_inputs["input_ids"], self._gamma)
        cache, ids = DynamicCache(), task.inputs["input_ids"]
        first = _step(self._target, ids, cache)
        ttft = 1e3 * (perf_counter() - start)
        prompt = cache.get_seq_length()
        chain = torch.tensor([[first, *drafts[1:]]], device=ids.device)
        out = self._target(input_ids=chain, past_key_values=cache)
        verified = out.logits[0].argmax(-1).tolist()
        kept = max(self._accepted, 1)
        if surplus := cache.get_seq_length() - prompt - kept:
            cache.crop(-surplus)
        answer = [first, *drafts[1:kept], verified[kept - 1]]
        forwards = 2
        while len(answer) < self._tokens:
            answer.append(_step(self._target, chain.new_tensor([answer[-1:]]), cache))
            forwards += 1
        total = 1e3 * (perf_counter() - start)
        return Outcome(answer[: self._tokens], total, ttft, ttft, forwards=forwards)


def _decode(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[int]:
    cache, answer = DynamicCache(), []
    while len(answer) < count:
        answer.append(_step(model, ids, cache))
        ids = ids.new_tensor([answer[-1:]])
    return answer


def _step(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> int:
    """The token after `ids`; only the last row's logits are computed."""
    out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())
