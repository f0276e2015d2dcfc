"""KV storage that transformers shares, and heights of trees that cost nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, StaticCache

from tiny import OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.config import SpecConfig
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.kv_cache import KVCache
from xspec_runtime.targets.heights import cheap_heights, cheapest
from xspec_runtime.targets.transformers import TransformersTarget

NEW = 30


def test_transformers_goes_on_from_a_shared_static_cache() -> None:
    model, ids = tiny_llama(1), prompt(1)
    truth = reference(model, ids, 2 * NEW)
    static = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 2 * NEW)
    target = TransformersTarget(model, cache=KVCache.over(static))
    decoder = SpeculativeDecoder(target, OracleDrafter(truth, 1), SpecConfig(16, NEW))
    for _ in range(2):
        assert decoder.generate({"input_ids": ids}).tokens == truth[:NEW]
    assert target.cache.layers[0].keys.data_ptr() == static.layers[0].keys.data_ptr()
    target.cache.truncate(ids.shape[1] + NEW - 1)
    target.cache.publish()
    tokens = [truth[NEW - 1]]
    with torch.inference_mode():
        for _ in range(NEW):
            step = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=static)
            tokens.append(step.logits[0, -1].argmax().item())
    assert tokens[1:] == truth[NEW:]


def test_only_plain_static_caches_of_one_request_are_shared() -> None:
    sliding = StaticCache(
        config=MistralConfig(num_hidden_layers=2, sliding_window=8), max_cache_len=32
    )
    with pytest.raises(ValueError, match=r"full attention .* got \['StaticSlidingWindowLayer'\]"):
        KVCache.over(sliding)
    several = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=32)
    several.early_initialization(3, 2, 4, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="batch 1, got 3"):
        KVCache.over(several)


@pytest.mark.parametrize("rows", [1, 16])
def test_capacity_exactly_enough_and_one_too_few(rows: int) -> None:
    model, ids = tiny_llama(2), prompt(2)
    truth = reference(model, ids, NEW)
    config = SpecConfig(rows, NEW, pad_rows=(32,) if rows > 1 else ())
    drafter = OracleDrafter(truth, 1, 0.3) if rows > 1 else None
    exact = ids.shape[1] + NEW - 1
    decoder = SpeculativeDecoder(TransformersTarget(model, exact), drafter, config)
    assert decoder.generate({"input_ids": ids}).tokens == truth
    if rows == 1:
        short = SpeculativeDecoder(TransformersTarget(model, exact - 1), None, config)
        with pytest.raises(RuntimeError, match=f"1 more needed, capacity {exact - 1}"):
            short.generate({"input_ids": ids})


@pytest.mark.parametrize("capacity", [0, -1, 2.5, "64", None])
def test_capacity_is_a_number_of_rows(capacity) -> None:
    with pytest.raises(ValueError, match=f"capacity must be .* got {capacity!r}"):
        TransformersTarget(tiny_llama(0), capacity)


def test_heights_that_a_greater_one_undercuts_are_left_out() -> None:
    assert cheapest({2: 1.0, 3: 2.0, 4: 1.5, 5: 1.6, 6: 1.9, 7: 1.8}) == (2, 4, 5, 7)
    assert cheapest({2: 3.0, 3: 2.0, 4: 1.0}) == (4,)
    # Within the noise nothing is left out.
    assert cheapest({2: 1.01, 3: 1.0}) == (2, 3)


def test_heights_are_measured_on_the_target() -> None:
    target = TransformersTarget(tiny_llama(3), 64)
    heights = cheap_heights(target, rows=6, prompt_rows=8, repeats=2)
    assert heights[-1] == 6 and heights == tuple(sorted(set(heights)))
    SpecConfig(6, pad_rows=heights)
    with pytest.raises(ValueError, match=r"rows must be in 2\.\.64, got 1"):
        cheap_heights(target, rows=1)
    with pytest.raises(RuntimeError, match="capacity 64"):
        cheap_heights(target, rows=6, prompt_rows=60)
