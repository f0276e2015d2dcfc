"""A target that computes everything and says what a script says, and drafters that know how much
of the script to propose.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from transformers import LogitsProcessorList

from ..drafters.base import MAX_ROWS, ON_DEVICE, Drafter, DraftTree, Request
from ..kv_cache import KVCache
from ..targets.greedy import Verdict
from ..targets.llama import LlamaTarget
from ..targets.llama_decoder import Scored
from ..targets.llama_rounds import Round
from ..targets.llama_weights import LlamaWeights
from ..targets.sampling import Sampling
from .oracle import Oracle


def script(vocab: int, length: int, seed: int) -> list[int]:
    """The answer that is imposed, and as much again as a round may look ahead."""
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length + MAX_ROWS)]


class ImposedTarget(LlamaTarget):
    """A greedy target whose argmax is computed and then replaced by the script's next token, also
    inside its graphs; near ties are those of the real logits.

    Args:
        answer: of `script`.
        chain: accepted lengths of chains that a `Follower` drafted on the device, one a round: its
            drafts are computed and then replaced, too.
        options: of `LlamaTarget`.
    """

    def __init__(
        self,
        weights: LlamaWeights,
        answer: Sequence[int],
        chain: Oracle | None = None,
        **options,
    ) -> None:
        super().__init__(weights, **options)
        self.answer, self._known = list(answer), 0
        self._chain, self._chains = chain, 0
        said, here = self._script_memory()
        self._said, compute = said.numpy(), self.decoder.score

        # No reference to this object: it owns the graphs that hold the function.
        def score(hidden: torch.Tensor, at: Round) -> Scored:
            scored = compute(hidden, at)
            here.copy_(said, non_blocking=True)
            scored.ids.copy_(here[: scored.ids.shape[1]][None])
            return scored

        self.decoder.score = score
        drafted, there = self._script_memory()
        self._drafted, load = drafted.numpy(), self._rounds.load

        def load_round(batch: int, rows: int, drafts: torch.Tensor | None = None) -> Round:
            if drafts is not None:
                there.copy_(drafted, non_blocking=True)
                drafts = there[: len(drafts)]
            return load(batch, rows, drafts)

        self._rounds.load = load_round

    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
        cache: KVCache | None = None,
        sampling: Sampling | None = None,
    ) -> Verdict:
        """See `LlamaTarget.prefill`.

        Raises:
            ValueError: the request is not greedy.
        """
        if logits_processor or sampling:
            raise ValueError("imposed outcomes are greedy ones: no processors, no sampling")
        self._say(0, range(MAX_ROWS))
        verdict = super().prefill(inputs, None, drafted, cache)
        self._known = len(verdict.tokens)
        return verdict

    def forward(self, tree: DraftTree, height: int = 0) -> Scored:
        """See `LlamaTarget.forward`."""
        depths: list[int] = []
        for parent in tree.parent_idx:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        self._say(self._known, depths)
        if tree.tokens[-1] <= ON_DEVICE:
            self._draft(len(tree) - 1)
        return super().forward(tree, height)

    def commit(self, verdict: Verdict) -> None:
        """See `LlamaTarget.commit`."""
        super().commit(verdict)
        self._known += verdict.accepted + 1

    def _script_memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens where the host writes them, and where the device reads them."""
        pinned = self.device.type == "cuda"
        said = torch.zeros(MAX_ROWS, dtype=torch.int64, pin_memory=pinned)
        return said, said.to(self.device)

    def _draft(self, count: int) -> None:
        """Say what stands in place of `count` drafts of the device."""
        if self._chain is None:
            raise ValueError("drafts on the device need accepted lengths of their chains")
        answer = self.answer[self._known :]
        accepted = self._chain[self._chains]
        self._drafted[:count] = imposed_drafts(range(count), answer, self.vocab_size, accepted)
        self._chains += 1

    def _say(self, known: int, depths: Sequence[int]) -> None:
        # Whatever was launched before has published its decision, so nothing reads this any more.
        self._said[: len(depths)] = [self.answer[known + depth] for depth in depths]


class ImposedTree:
    """Trees of a fixed number of rows, of which as many are accepted as the oracle says; the memory
    behind it is asked every time and its answer dropped.
    """

    name = "memory"

    def __init__(self, asked: Drafter, answer: Sequence[int], vocab: int, oracle: Oracle) -> None:
        self._asked, self._answer, self._vocab = asked, answer, vocab
        self._oracle, self._rounds = oracle, 0
        self._shape = random.Random(0)

    def begin(self, request: Request) -> None:
        """The memory indexes the prompt."""
        self._asked.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A path that is right, and other nodes anywhere, all wrong."""
        self._asked.propose(context, rows)
        accepted = min(self._oracle[self._rounds], rows - 1)
        self._rounds += 1
        tree, known = DraftTree.root(context[-1]), len(context)
        depths = [0]
        for node in range(1, rows):
            right = node <= accepted
            low = [i for i in range(node) if depths[i] < min(15, rows - 1)]
            parent = node - 1 if right else self._shape.choice(low)
            token = self._answer[known + depths[parent]]
            # The paths that are right come first wherever trees are cut.
            score = 0.99**node if right else 0.1 * tree.scores[parent]
            tree.add(parent, token if right else (token + node) % self._vocab, score)
            depths.append(depths[parent] + 1)
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""
        self._asked.end([])


def imposed_drafts(
    drafts: Sequence[int], answer: Sequence[int], vocab: int, accepted: int
) -> list[int]:
    """As many tokens as a draft said: those of the script, and from `accepted` on wrong ones."""
    count = len(drafts)
    return [answer[i] if i < accepted else (answer[i] + 1) % vocab for i in range(count)]
