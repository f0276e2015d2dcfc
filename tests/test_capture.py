"""What the host does in captured launches of Triton kernels, seen without a GPU.

On a CPU a captured function runs other code than on a GPU: an op of torch, and all of it behind one
call. Here the Triton half of every op runs, for a card of capability 9.0, but for the kernels,
which are noted. A capture must not wait for the device or read pageable memory, nor let scratch
grow, nor launch what the run before it did not compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import INTERPRETED
from tape import check_waits
from test_adapter_tail import adapter_of
from test_llama_target import FAMILIES
from tiny import SIZES, prompt
from xspec_kernels import SEQUENCE, TOKENS, Workspace, _dispatch, _triton
from xspec_kernels.kernels import skinny_linear
from xspec_kernels.kernels.verify_tail import COUNT
from xspec_runtime import graphs
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.graph_adapter import GraphAdapterDrafter
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.nf4_model import quantize_model
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_graphs import PrefillPair

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are noted, not run")


class Card:
    """Takes launches in place of a card.

    Attributes:
        seen: launches, with all that chooses a binary.
        capturing: a capture is under way.
        captured: kernels of each capture.
    """

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.capturing = False
        self.captured: list[list[str]] = []

    def launch(self, kernel, grid, device, *arguments, **constants) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        form = [(p.name, form_of(p, named.pop(p.name))) for p in kernel.params]
        self.seen.append((kernel.fn.__name__, grid, form, sorted(named.items())))
        if kernel.fn.__name__ == "_accept_kernel" and not self.capturing:
            publish(*arguments[kernel.arg_names.index("sequence") :][:2])


def form_of(parameter, value: Any) -> object:
    """What Triton compiles a parameter for."""
    if parameter.is_constexpr or value is None:
        return value
    aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    if isinstance(value, torch.Tensor):
        return value.dtype, aligned and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not parameter.do_not_specialize:
        return value == 1, aligned and value % 16 == 0
    return getattr(value, "block_shape", type(value))


def publish(sequence: torch.Tensor, record: torch.Tensor) -> None:
    """Every request emits a token."""
    record[:, COUNT], record[:, TOKENS] = 1, 5
    sequence += 1
    record[:, SEQUENCE] = sequence


class Capture(TorchDispatchMode):
    """Refuses what a capture refuses, inside our ops too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_waits(func, args, kwargs)
        if func.namespace != "xspec":
            return func(*args, **kwargs)
        run = _dispatch._IMPLEMENTATIONS[func._schema.name.removeprefix("xspec::")][args[-1]]
        with self:
            return run(*args[:-1])


class Recorder:
    """Stands in for `CudaRecorder`."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def warm(self, run: Callable[[], Any]) -> Any:
        self._card.seen.clear()
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        card, warmed = self._card, self._card.seen[:]
        card.seen.clear()
        card.capturing = True
        try:
            with Capture():
                result = run()
        finally:
            card.capturing = False
        assert card.seen == warmed, "the capture launches what its first run did not"
        card.captured.append([name for name, *_ in warmed])
        return run, result


@pytest.fixture
def card(monkeypatch) -> Card:
    found, grow = Card(), Workspace._grow

    def held(self, name: str, *arguments):
        assert not found.capturing, f"{name} grows while capturing"
        return grow(self, name, *arguments)

    for name, module in list(sys.modules.items()):
        if name.startswith("xspec_kernels."):
            for attribute, value in (("launch", found.launch), ("card_of", lambda device: 90)):
                if name != "xspec_kernels._triton" and hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, value)
    monkeypatch.setattr(_triton, "unusable", lambda device_type: None)
    monkeypatch.setattr(Workspace, "_grow", held)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "new_recorder", lambda device, pool: Recorder(found))
    return found


def target_of(name: str = "llama", capacity: int = 384, dtype=torch.bfloat16) -> LlamaTarget:
    """With heads that the kernels take."""
    config_class, model_class, options = FAMILIES[name.removesuffix("_nf4")]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = model_class(config_class(**SIZES | heads, **options)).to(dtype).eval()
    if name.endswith("_nf4"):
        quantize_model(model)
    return LlamaTarget(model, capacity, "triton", graphs=True)


def decode(target: LlamaTarget, length: int = 20, rounds: int = 2) -> None:
    """A prefill, then verifies; the second of each kind is a replay."""
    for _ in range(2):
        target.prefill({"input_ids": prompt(length, length)})
        for _ in range(rounds):
            tree = DraftTree([5, 6, 7, 8], [-1, 0, 0, 1], [1.0] * 4)
            target.commit(target.accept(tree, target.forward(tree), [5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama_nf4"])
def test_verify_and_prefill(name: str, dtype, card: Card) -> None:
    decode(target_of(name, dtype=dtype))
    prefill, verify = card.captured
    assert prefill[-2:] == verify[-2:] == ["_accept_kernel", "_kv_commit_kernel"]
    assert len(verify) == 1 + 3 + 2 * 7 + 2 + 2
    product = "nf4_linear_kernel" if name.endswith("nf4") else "_skinny_linear_kernel"
    assert verify.count(product) == 8


def test_a_prompt_beyond_the_fused_rows_of_nf4(card: Card) -> None:
    decode(target_of("llama_nf4"), length=300)
    assert card.captured[0].count("_dequantize_kernel") == 8


def test_phases(card: Card) -> None:
    target = target_of()
    target.graphs.profile = True
    decode(target)
    assert [kernels[-1] for kernels in card.captured] == [
        "_kv_commit_kernel", "_norm_act_kernel", "_lm_head_join_kernel", "_kv_commit_kernel",
    ]  # fmt: skip


def test_a_batch(card: Card) -> None:
    target = target_of()
    batch = target.batched(3)
    for rows in (4, 40, 40, 4):
        batch.reset()
        for length in (9, 20, 33):
            batch.prefill({"input_ids": prompt(length, length)})
        trees = [DraftTree.chain(5, [6] * min(rows - 1, 20)) for _ in range(3)]
        batch.commit(batch.accept(trees, batch.forward(trees, rows), [[5]] * 3))
    assert len(card.captured) == 2


def test_drafts(card: Card) -> None:
    drafter = GraphDrafter(target_of(), 3, (9,))
    for length in (5, 40):
        drafter.begin(Request([], {"input_ids": prompt(1, 10)}))
        for _ in range(2):
            drafter.propose([5] * length, 4)
    assert [kernels.count("_lm_head_tiles_kernel") for kernels in card.captured] == [1, 3]


@pytest.mark.parametrize("reads_answer", [False, True])
def test_an_adapter_behind_the_verify(reads_answer: bool, card: Card) -> None:
    target = target_of()
    drafter = GraphAdapterDrafter(
        adapter_of(), 4, target, lambda request: [5, 9], reads_answer=reads_answer
    )
    for _ in range(2):
        target.prefill({"input_ids": prompt(1)})
        drafter.begin(Request())
        for known in range(1, 4):
            tree = drafter.propose([5] * known, 5)
            target.commit(target.accept(tree, target.forward(tree), [5]))
    prefill, start, verify = card.captured
    assert start[-1] == verify[-1] == "_pick_kernel" and "_pick_kernel" not in prefill
    assert verify.count("_row_attention_kernel") == reads_answer


def test_two_prefills_in_one_launch(card: Card) -> None:
    target, draft = target_of(), target_of("qwen2")
    pair = PrefillPair(target.graphs, draft.graphs)
    for _ in range(2):
        with pair.beside(lambda: draft.prefill({"input_ids": prompt(1, 70)})):
            target.prefill({"input_ids": prompt(2, 20)})
    assert [kernels.count("_accept_kernel") for kernels in card.captured] == [2]


# What must not be, planted into the product.


def test_a_wait_is_found(card: Card, monkeypatch) -> None:
    planted(monkeypatch, lambda x: x.sum().item())
    with pytest.raises(RuntimeError, match="aten::item waits for the device"):
        decode(target_of())


def test_pageable_memory_is_found(card: Card, monkeypatch) -> None:
    planted(monkeypatch, lambda x: torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="lift_fresh waits for the device"):
        decode(target_of())


def test_scratch_of_its_own_is_found(card: Card) -> None:
    target = target_of()
    score, one = target.decoder.score, target.decoder

    def fresh(*arguments):
        one._workspace = Workspace("cpu")
        return score(*arguments)

    one.score = fresh
    with pytest.raises(AssertionError, match="grows while capturing"):
        decode(target)


def test_another_binary_is_found(card: Card, monkeypatch) -> None:
    heights = iter(range(100))
    planted(monkeypatch, lambda x: card.seen.append((next(heights),)))
    with pytest.raises(AssertionError, match="launches what its first run did not"):
        decode(target_of())


def planted(monkeypatch, what: Callable[[torch.Tensor], object]) -> None:
    sound = skinny_linear.norm_arguments

    def unsound(op, x, *rest):
        what(x)
        return sound(op, x, *rest)

    monkeypatch.setattr(skinny_linear, "norm_arguments", unsound)
