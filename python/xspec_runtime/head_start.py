"""A draft that works before the target can: on its own text, continued by the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from time import perf_counter

import torch

from .drafters.base import Drafter, DraftTree, Request
from .drafters.draft_model import ModelDrafter
from .drafters.graph_draft import GraphDrafter
from .drafters.merge import MergedDrafter, merge
from .engine import SpeculativeDecoder
from .graphs import own_stream
from .prefill import DraftedText
from .targets.llama_graphs import PrefillPair

_DRAFTS = (ModelDrafter, GraphDrafter)


class HeadStart:
    """A draft model that may begin its request before the decoder asks it to.

    The decoder's `begin` then finds the request begun: the draft's prompt is read once, and the KV
    rows of its own text that the target agrees with are kept.

    Attributes:
        tokens: the draft's own text so far.
        times: when each of them was there.
        started, ended: when the draft began, and when it last did something.
    """

    def __init__(self, draft: ModelDrafter | GraphDrafter) -> None:
        self.draft = draft
        self.name = draft.name
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.started = self.ended = 0.0
        self._request: Request | None = None
        self._running: Future[None] | None = None
        self._stop = Event()
        device = draft.model.device
        self._stream = own_stream(device) if device.type == "cuda" else None

    def run(
        self, request: Request, limit: int, ends: Sequence[int], done: Callable[[], bool]
    ) -> None:
        """Read the prompt, then add tokens until there are `limit`, one is in `ends`, or `done`."""
        self.start(request)
        while len(self.tokens) < limit and not done():
            if self.tokens:
                tokens = self.draft.propose(self.tokens, 2).tokens[1:]
            else:
                tokens = self.draft.opening(1)
            self.ended = perf_counter()
            if not tokens:
                return
            token = tokens[0]
            self.tokens.append(token)
            self.times.append(self.ended)
            if token in ends:
                return

    def start(self, request: Request) -> None:
        """Read the prompt; the decoder's `begin` will find that done."""
        self.clear()
        self._request = request
        self._follow()
        self.started = self.ended = perf_counter()
        self.draft.begin(request)
        self.ended = perf_counter()

    def clear(self) -> None:
        """No request, and no text of one."""
        self._request, self.tokens, self.times = None, [], []
        self.started = self.ended = 0.0

    def run_beside(
        self, pool: ThreadPoolExecutor, request: Request, limit: int, ends: Sequence[int]
    ) -> None:
        """`run` on another thread, and on a GPU on another stream, until `join` or `abandon`."""
        self._stop.clear()
        # Before the thread starts, nobody may see the last request's text.
        self.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.draft.model.device))

        def work() -> None:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                self.run(request, limit, ends, self._stop.is_set)

        self._running = pool.submit(work)

    def join(self) -> None:
        """Stop what runs beside; an error of it is raised here, once."""
        running, self._running = self._running, None
        try:
            if running is not None:
                self._stop.set()
                running.result()
        finally:
            self._follow()

    def abandon(self) -> None:
        """The request is over, whatever became of it."""
        self._stop.set()
        self._running = self._request = None

    def _follow(self) -> None:
        """Launch what comes now behind all that ran beside. A launch tells the host its tokens
        before it has put the rows of the cache, and the length that it reads, in their places.
        """
        if self._stream is not None:
            torch.cuda.current_stream(self.draft.model.device).wait_stream(self._stream)

    def begin(self, request: Request) -> None:
        """Begin, unless `run` has."""
        self.join()
        if self._request is not request:
            self._request, self.tokens = request, []
            self.draft.begin(request)

    def opening(self, rows: int) -> list[int]:
        """How the answer may begin: the text there is, or else what the draft says."""
        return self.tokens[:rows] or self.draft.opening(rows)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """The draft's proposal."""
        return self.draft.propose(context, rows)

    def end(self, answer: Sequence[int]) -> None:
        """The request is over."""
        self._request = None
        self.draft.end(answer)


class LateText:
    """A drafter's proposals, with the text of a draft that ran until the target's first token."""

    def __init__(self, drafter: Drafter, head: HeadStart) -> None:
        self.name = drafter.name
        self._drafter, self._head = drafter, head

    def begin(self, request: Request) -> None:
        self._head.join()
        self._text = DraftedText(self._head.tokens)
        self._drafter.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        tree = self._drafter.propose(context, rows)
        chain = self._text.chain(context, rows)
        return merge([tree, chain], rows) if chain else tree

    def end(self, answer: Sequence[int]) -> None:
        self._drafter.end(answer)


def head_start_of(decoder: SpeculativeDecoder) -> HeadStart:
    """The head start of the decoder's draft model, put in its place.

    Raises:
        ValueError: the decoder's drafter is no draft model, nor merged with one.
    """
    drafter = decoder.drafter
    if isinstance(drafter, _DRAFTS):
        drafter = decoder.drafter = HeadStart(drafter)
    if isinstance(drafter, HeadStart):
        return drafter
    parts = drafter.drafters if isinstance(drafter, MergedDrafter) else []
    for i, part in enumerate(parts):
        if isinstance(part, _DRAFTS):
            parts[i] = HeadStart(part)
        if isinstance(parts[i], HeadStart):
            return parts[i]
    name = drafter.name if drafter else "plain decoding"
    raise ValueError(f"there is no draft model in {name!r} that could work in the window")


def prefill_pair(decoder: SpeculativeDecoder, head: HeadStart) -> PrefillPair | None:
    """Both models' prefills as one launch, where both are captured on one device; else None."""
    target, draft = decoder.target, head.draft.model
    graphs = [getattr(model, "graphs", None) for model in (target, draft)]
    if None in graphs or target is draft or target.device != draft.device:
        return None
    return PrefillPair(*graphs)
