"""SuffixDecoding (Snowflake's arctic-inference, Apache-2.0), where it is installed, as a drafter to
compare with. Nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

from ..drafters.base import DraftTree, Request

DEPTH = 64  # tokens of context, and of a path
# Its defaults cut trees by match length and token probability. Rows are what drafters are compared
# at here, and without the cuts it accepts most from 16 rows on.
# A context is matched by its last tokens, never as a whole, so that one needs something in front.
NO_PROMPT = [0]
SPECULATION = {"max_spec_factor": float(DEPTH), "min_token_prob": 0.0, "use_tree_spec": True}


def suffix_decoding_missing() -> str:
    """Why SuffixDecoding cannot be run, or ""."""
    try:
        from arctic_inference.suffix_decoding import SuffixDecodingCache  # noqa: F401
    except ImportError as error:
        return f"arctic-inference is not importable: {error}"
    return ""


class SuffixDecodingDrafter:
    """Trees from the suffix tree of past answers, or of this request where that expects more.

    Args:
        online: whether answers stay in the tree.
    """

    def __init__(self, online: bool, name: str = "SuffixDecoding") -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.name = name
        self.online = online
        self._cache = SuffixDecodingCache(max_tree_depth=DEPTH)
        self._ids = count()
        self._active: int | None = None
        self._prompt: list[int] = NO_PROMPT
        self._seen = 0

    def learn(self, answers: Iterable[Sequence[int]]) -> None:
        """Add past answers."""
        for answer in answers:
            self.begin(Request())
            self._cache.add_active_response(self._active, list(answer))
            self._close(keep=True)

    def begin(self, request: Request) -> None:
        """Start a request with its prompt."""
        self._close(keep=False)
        self._active, self._seen = next(self._ids), 0
        self._prompt = list(request.prompt_ids) or NO_PROMPT
        self._cache.start_request(self._active, self._prompt)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes; scores are its own estimates."""
        self._cache.add_active_response(self._active, list(context[self._seen :]))
        self._seen = len(context)
        draft = self._cache.speculate(
            self._active, [*self._prompt, *context], max_spec_tokens=rows - 1, **SPECULATION
        )
        tree = DraftTree.root(context[-1])
        for token, parent, score in zip(draft.token_ids, draft.parents, draft.probs, strict=True):
            tree.add(parent + 1, token, min(score, tree.scores[parent + 1]))
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """Keep the answer, if online and there is one."""
        if answer and self._active is not None:
            self._cache.add_active_response(self._active, list(answer[self._seen :]))
        self._close(keep=self.online and bool(answer))

    def _close(self, keep: bool) -> None:
        if self._active is None:
            return
        self._cache.stop_request(self._active)
        if not keep:
            self._cache.evict_cached_response(self._active)
        self._active = None
