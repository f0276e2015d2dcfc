"""Random inputs of the ops that sample: equal tokens are asked for, whatever the law."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from xspec_kernels import sample_tokens, tree_mask, verify_sampling

from .cases import Case, Tensors, chain, trees

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Each vocabulary is a kernel to compile: one block, several, and a model's.
_VOCABULARIES = (40, 9001, 32000)
_LAWS = (
    {},
    {"temperature": 0.7, "top_k": 50},
    {"top_p": 0.9},
    {"temperature": 1.6, "top_k": 1000, "top_p": 0.95},
)


def _logits(draw: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Ties, tokens that cannot be, a row without a law."""
    logits = 4 * torch.randn(*shape, generator=draw)
    logits[torch.rand(shape, generator=draw) < 0.1] = -torch.inf
    logits[..., 0] = 1.0
    logits.view(-1, shape[-1])[-1, 1] = torch.nan
    return logits.to(dtype)


def sample_tokens_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Every law, dtype and number of blocks."""
    for vocab, dtype in zip(_VOCABULARIES, _DTYPES, strict=True):
        for law in _LAWS:
            for rows in sizes[-2:]:
                draw = torch.Generator().manual_seed(rng.randrange(2**31))
                uniforms = torch.rand(rows, dtype=torch.float64, generator=draw)
                inputs = [_logits(draw, dtype, rows, vocab), uniforms]

                def call(given: Tensors, backend: str, law=law) -> list[torch.Tensor]:
                    return [sample_tokens(*given, **law, backend=backend)]

                name = f"{rows} x {vocab}, {dtype}, {law}"
                yield Case("sample_tokens", name, inputs, call, ("ids",))


def verify_sampling_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Drafts that are given and drafts that were drawn; ragged batches of trees, a chain."""
    for vocab, dtype in zip(_VOCABULARIES[:2], _DTYPES[1:], strict=True):
        for law in _LAWS[::3]:
            for drawn in (False, True):
                for nodes in dict.fromkeys((*sizes[1:3], sizes[-1])):
                    straight = sizes[1:2] == (nodes,)
                    yield _verify_case(rng, nodes, vocab, dtype, law, drawn, straight)


def _verify_case(
    rng: random.Random,
    nodes: int,
    vocab: int,
    dtype: torch.dtype,
    law: dict[str, float],
    drawn: bool,
    straight: bool,
) -> Case:
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    _, (parents, num_rows) = trees(rng, 3, nodes, not straight)
    if straight:
        parents = torch.tensor([chain(nodes)] * 3, dtype=torch.int32)
    logits = _logits(draw, dtype, 3, nodes, vocab)
    # Near the target's own law, so that some drafts are accepted; a few children were not drawn.
    near = logits.float().nan_to_num(0, 0, -1e4)
    draft = (near + 0.5 * torch.randn(near.shape, generator=draw)).softmax(-1)
    draft[torch.rand(3, nodes, generator=draw) < 0.2] = 0
    tokens = (draft + 1e-6).flatten(0, 1).multinomial(1, generator=draw).view(3, nodes)
    tokens = tokens.gather(1, parents.clamp(0, nodes - 1).long())
    bits = tree_mask(parents, num_rows, max_depth=64, backend="torch").ancestor_bits
    uniforms = torch.rand(3, nodes, dtype=torch.float64, generator=draw)
    inputs = [logits, tokens, parents, bits, uniforms, num_rows, draft if drawn else None]

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        *tree, probabilities = given
        return list(verify_sampling(*tree, draft_probs=probabilities, **law, backend=backend))

    kind = "drawn" if drawn else "given"
    shape = "chains" if straight else "trees"
    name = f"3 {shape} of {nodes}, {kind}, {vocab} tokens, {dtype}, {law}"
    return Case("verify_sampling", name, inputs, call, ("accept_len", "accept_path", "output_ids"))
