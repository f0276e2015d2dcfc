"""What is kept for a model between calls: its memory, its costs, caches and packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ..calibration import calibrate
from ..drafters.base import Drafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..kv_cache import KVCache
from ..policy import PricedDrafter
from ..targets.attention import ATTENTION, use_tree_attention
from ..targets.transformers import TransformersTarget
from .packed import PackedWeights, affordable

# Answers to unrelated prompts share phrases, not words: short contexts tell little.
LOW_SHARE = 0.3
_SLACK = 1.5  # a cache that is too short is replaced by one this much longer than needed
_LEAST = 256  # rows of a cache: verifies are timed in it


def new_memory() -> NgramMemory:
    """An empty one, as for any text."""
    return NgramMemory(recency=0, low_share=LOW_SHARE)


@dataclass
class Kept:
    """What is kept for one model. Nothing here refers to the model, which could else never go.

    Attributes:
        costs: of verifies, by (most rows, whether weights are packed).
        drafters: priced ones that no call is using, by the same and whether they are on `memory`;
            they know what came true.
    """

    memory: NgramMemory = field(default_factory=new_memory)
    costs: dict[tuple[int, bool], list[float]] = field(default_factory=dict)
    drafters: dict[tuple[int, bool, bool], list[PricedDrafter]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    _caches: list[KVCache] = field(default_factory=list)
    _packed: PackedWeights | None = None
    _undecided: bool = True  # whether the copy is affordable
    _installed: bool = False
    _running: int = 0
    _attention: str = ""

    @contextmanager
    def running(self, model: PreTrainedModel, pack: bool | None) -> Iterator[bool]:
        """Attention that verifies trees, and packed weights where wanted, while a call runs; gives
        whether they are packed.

        Args:
            pack: None is yes where the copy is `affordable`.
        """
        with self.lock:
            if not self._running:
                self._attention = model.config.get_text_config()._attn_implementation
                enable(model)
                self._install(model, pack)
            self._running += 1
            packed = self._installed
        try:
            yield packed
        finally:
            with self.lock:
                self._running -= 1
                if not self._running:
                    if self._installed:
                        self._packed.remove()
                    _give_back(model, self._attention)

    @contextmanager
    def cache(self, model: PreTrainedModel, rows: int) -> Iterator[KVCache]:
        """A cache of at least `rows` rows that no other call is using."""
        layers = model.config.get_text_config().num_hidden_layers
        with self.lock:
            # A model that was cast or moved since has left caches of another kind behind.
            self._caches = [cache for cache in self._caches if _suits(cache, model)]
            fits = [cache for cache in self._caches if cache.capacity >= rows]
            cache = min(fits, key=lambda cache: cache.capacity, default=None)
            if cache:
                self._caches.remove(cache)
            elif self._caches:
                self._caches.pop()
        cache = cache or KVCache(layers, max(_LEAST, int(_SLACK * rows)))
        try:
            yield cache
        finally:
            with self.lock:
                self._caches.append(cache)

    def costs_of(self, target: TransformersTarget, rows: int, packed: bool) -> list[float]:
        """Of verifies of 1, 2, ... `rows` rows; measured by the first call."""
        with self.lock:
            if (rows, packed) not in self.costs:
                self.costs[rows, packed] = calibrate(target, rows).costs()
            return self.costs[rows, packed]

    @contextmanager
    def lent(
        self, rows: int, packed: bool, remember: bool, costs: list[float]
    ) -> Iterator[Callable[[], Drafter]]:
        """Makes drafters, of which each belongs to one request at a time: on the memory, or such as
        remember no text.
        """
        key, used = (rows, packed, remember), []

        def make() -> Drafter:
            with self.lock:
                idle = self.drafters.setdefault(key, [])
                found = idle.pop() if idle else None
                memory = self.memory if remember else new_memory()
            used.append(found or PricedDrafter(NgramDrafter(memory, online=remember), costs))
            return used[-1]

        yield make
        # After an error a drafter may be anywhere within a request, so those are left.
        with self.lock:
            for drafter in used:
                if not remember or drafter.drafter.memory is self.memory:
                    self.drafters.setdefault(key, []).append(drafter)

    def _install(self, model: PreTrainedModel, pack: bool | None) -> None:
        """Packed weights where wanted, made or brought up to date."""
        self._installed = False
        if pack is False:
            return
        if self._packed is not None:
            self._packed.refresh(model)
        elif pack or (self._undecided and affordable(model)):
            self._packed = PackedWeights(model)
        self._undecided = False
        if self._packed:
            self._packed.install()
            self._installed = True


_KEPT: WeakKeyDictionary[PreTrainedModel, Kept] = WeakKeyDictionary()
_LOCK = Lock()


def kept_for(model: PreTrainedModel) -> Kept:
    """What is kept for `model`, from its first call on."""
    with _LOCK:
        if model not in _KEPT:
            _KEPT[model] = Kept()
        return _KEPT[model]


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the model's text attention to the one that verifies trees; every other pass goes
    through SDPA. `generate` does so by itself for the length of a call, which takes it a moment.
    """
    use_tree_attention(model)
    return model


def memory_of(model: PreTrainedModel) -> NgramMemory:
    """The memory that calls on `model` share; it may be saved, and shared with other models of the
    same vocabulary (`set_memory`).
    """
    return kept_for(model).memory


def set_memory(model: PreTrainedModel, memory: NgramMemory | str | Path) -> None:
    """Let calls on `model` share this memory, or the one that `NgramMemory.save` wrote."""
    kept = kept_for(model)
    found = memory if isinstance(memory, NgramMemory) else NgramMemory.load(Path(memory))
    with kept.lock:
        kept.memory = found
        kept.drafters.clear()


def forget(model: PreTrainedModel) -> None:
    """Drop everything that is kept for `model`."""
    with _LOCK:
        _KEPT.pop(model, None)


def _suits(cache: KVCache, model: PreTrainedModel) -> bool:
    first = cache.layers[0]
    return first.is_initialized and (first.dtype, first.device) == (model.dtype, model.device)


def _give_back(model: PreTrainedModel, attention: str) -> None:
    """The attention that the model had."""
    if attention != ATTENTION:
        nested = "text_config" in getattr(model.config, "sub_configs", {})
        model.set_attn_implementation({"text_config": attention} if nested else attention)
