"""The window: while the CPU prepares a video, the draft answers already.

A request whose target needs a video cannot prefill until that is decoded. Its draft needs only the
event image, so what it says in that time costs no wall time, and seeds the target's first rounds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean
from threading import Event
from time import perf_counter
from typing import Any

import torch

from xspec_kernels import ranges

from .drafters.base import Request
from .engine import Generation, SpeculativeDecoder, Stop, asked
from .head_start import LateText, head_start_of, prefill_pair

MODES = ("window", "concurrent", "off")
Inputs = Mapping[str, torch.Tensor]
_PATIENCE = 0.02  # seconds between two questions whether inputs that take long are still wanted


@dataclass(slots=True)
class Stages:
    """Where the time of one request went, in milliseconds from its start.

    Attributes:
        mode: one of `MODES`.
        video_ms: preparing the target's inputs.
        draft_start_ms: when the draft began.
        draft_ms: the draft's own prefill and text.
        window_used_ms: of `draft_ms`, what ran while the video or the target's prefill did.
        hidden_tokens: draft tokens that existed when those were done, at no wall time.
        drafted_tokens: all tokens of the draft's text.
        ttft_ms: from the request to the target's first token.
        total_ms: from the request to its last token.
    """

    mode: str
    video_ms: float = 0.0
    draft_start_ms: float = 0.0
    draft_ms: float = 0.0
    window_used_ms: float = 0.0
    hidden_tokens: int = 0
    drafted_tokens: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0

    def as_dict(self) -> dict[str, str | float | int]:
        """For a result file."""
        return asdict(self)

    def spans(self) -> list[dict[str, str | float | bool]]:
        """What there was before the target's prefill, as entries of a timeline; the draft's text
        lies beside the rest unless the mode is ``off``.
        """
        draft = {"start_ms": self.draft_start_ms, "end_ms": self.draft_start_ms + self.draft_ms}
        video = {"name": "video", "start_ms": 0.0, "end_ms": self.video_ms}
        return [video, {"name": "draft text", **draft, "beside": self.mode != "off"}]

    def __str__(self) -> str:
        return (
            f"{self.mode}: video {self.video_ms:.0f} ms, draft {self.draft_ms:.0f} ms of which "
            f"{self.window_used_ms:.0f} ms and {self.hidden_tokens} of {self.drafted_tokens} "
            f"tokens hidden, first token after {self.ttft_ms:.0f} ms, all after "
            f"{self.total_ms:.0f} ms"
        )


def mean_stages(stages: Sequence[Stages]) -> dict[str, str | float]:
    """Means over requests of one mode, for a result file."""
    rows = [one.as_dict() for one in stages]
    figures = {key: mean(row[key] for row in rows) for key in rows[0] if key != "mode"}
    return {"mode": stages[0].mode, **figures}


def check_mode(mode: str, name: str = "overlap") -> None:
    """Raise `ValueError` unless `mode`, called `name` by whoever gave it, is one of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")


class Overlap:
    """Answers requests whose inputs take long to prepare.

    The modes differ in time only, not in answers:

    - ``window``: inputs are prepared on another thread, and until they are there the draft works
      on this one. The default where both models are on one device.
    - ``concurrent``: the draft has a thread, and on a GPU a stream, of its own, and goes on beside
      the target's prefill. Where both models run in graphs on one device, it begins with the
      target instead: both prefills are branches of one graph, one launch (unless drafts are to
      ride in the target's). The default where the draft has a device of its own, on which it
      takes no time from the target.
    - ``off``: preparation, draft and target one after another on this thread.

    Args:
        decoder: its drafter is a `ModelDrafter`, or merged from several with one among them; that
            one is replaced by its `HeadStart`.
        mode: one of `MODES`; None: the default.
        limit: most tokens of the draft's text; by default the rows of a verify. Those behind its
            first wrong one are wasted, and on the CPU each takes time from the preparation.

    Attributes:
        stages: of the last answer.

    Raises:
        ValueError: an unknown mode, a limit below 1, or no draft model in the decoder.
    """

    def __init__(
        self, decoder: SpeculativeDecoder, mode: str | None = None, limit: int | None = None
    ) -> None:
        if mode is not None:
            check_mode(mode)
        if limit is None:
            limit = decoder.config.rows
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.decoder = decoder
        self.head = head_start_of(decoder)
        if mode is None:
            apart = self.head.draft.model.device != decoder.target.device
            mode = "concurrent" if apart else "window"
        self.mode = mode
        self.stages = Stages(mode)
        # Drafts that ride in the target's prefill must be there before it.
        paired = mode == "concurrent" and decoder.config.prefill_fused != "fast"
        self._pair = prefill_pair(decoder, self.head) if paired else None
        self._limit = min(limit, decoder.config.max_new_tokens)

    def generate(
        self,
        prepare: Callable[[Event], Inputs],
        request: Request,
        on_tokens: Callable[[list[int]], None] | None = None,
        frames: int | None = None,
        stop: Stop | None = None,
        **options: Any,
    ) -> Generation:
        """Answer one prompt.

        Args:
            prepare: makes the target's inputs, on another thread unless the mode is ``off``. Its
                argument is set once nobody wants them any more: it should then end soon.
            request: what the drafters may know, with the draft's inputs.
            on_tokens, options: as in `SpeculativeDecoder.generate`; `stop` also ends the
                preparation and the draft's text.
            frames: payload of the range `target.preprocess`.

        Raises:
            Exception: what `prepare`, the draft or the target raised, once; nothing runs on.
        """
        start, first, unwanted = perf_counter(), [], Event()
        stopped = asked(stop)

        def heard(tokens: list[int]) -> None:
            first.append(perf_counter())
            if on_tokens:
                on_tokens(tokens)

        pool = ThreadPoolExecutor(2, "xspec-overlap")
        stream = _stream_of(self.decoder.target.device)
        work = partial(_prepared, prepare, unwanted, frames, stream)
        try:
            found = self._prepare(pool, request, work, stopped)
            if found is None:
                self.stages = Stages(self.mode)
                return Generation([], cancelled=True)
            inputs, prepared = found
            decoder, drafted = self._decoder()
            with self._prefills(request):
                answer = decoder.generate(
                    inputs, request, on_tokens=heard, drafted=drafted, stop=stop, **options
                )
            self.stages = self._measured(start, prepared, first[0] if first else perf_counter())
            return answer
        finally:
            unwanted.set()
            self.head.abandon()
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(
        self,
        pool: ThreadPoolExecutor,
        request: Request,
        work: Callable[[], tuple[Inputs, float]],
        stopped: Callable[[], bool],
    ) -> tuple[Inputs, float] | None:
        """The target's inputs and when they were there, the draft has begun; None once stopped."""
        limit, ends = self._limit, self.decoder.config.eos_token_ids
        if stopped():
            return None
        if self.mode == "off":
            prepared = work()
            self.head.run(request, limit, ends, stopped)
            return prepared
        running = pool.submit(work)
        if self.mode == "window":
            self.head.run(request, limit, ends, lambda: running.done() or stopped())
        elif self._pair:
            self.head.clear()
        else:
            self.head.run_beside(pool, request, limit, ends)
        while not wait([running], _PATIENCE).done:
            if stopped():
                return None
        return running.result()

    def _decoder(self) -> tuple[SpeculativeDecoder, list[int]]:
        """What answers, and the draft's text that it gets before the prefill."""
        decoder, drafted = self.decoder, self.head.tokens[:]
        goes_on = self.mode == "concurrent" and not self._pair
        if not goes_on or decoder.config.prefill_fused == "off":
            return decoder, drafted
        late = LateText(decoder.drafter, self.head)
        riding = drafted if decoder.config.prefill_fused == "fast" else []
        return SpeculativeDecoder(decoder.target, late, decoder.config), riding

    def _prefills(self, request: Request) -> AbstractContextManager[None]:
        """While this lasts, the target's prefill takes the draft's along, if they are a pair."""
        if self._pair is None:
            return nullcontext()
        return self._pair.beside(lambda: self.head.start(request))

    def _measured(self, start: float, prepared: float, first: float) -> Stages:
        head = self.head
        # Until here the draft had company.
        until = {"window": prepared, "concurrent": first}.get(self.mode, start)
        return Stages(
            self.mode,
            1e3 * (prepared - start),
            1e3 * max(0.0, head.started - start),
            1e3 * (head.ended - head.started),
            1e3 * max(0.0, min(head.ended, until) - head.started),
            bisect_right(head.times, until),
            len(head.tokens),
            1e3 * (first - start),
            1e3 * (perf_counter() - start),
        )


def _prepared(
    prepare: Callable[[Event], Inputs],
    stop: Event,
    frames: int | None,
    stream: torch.cuda.Stream | None,
) -> tuple[Inputs, float]:
    """What `prepare` makes and when it was there; what it launches comes before whatever is
    launched on `stream` later.
    """
    # The current device and stream are a thread's own.
    here = nullcontext() if stream is None else torch.cuda.stream(stream)
    with here, ranges.range_("target.preprocess", frames):
        inputs = prepare(stop)
    return inputs, perf_counter()


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream; None where there are none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
