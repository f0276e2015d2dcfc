"""Phase `prefill`: prompts through a 7B model and frames through its vision tower, against the
operations they take at the rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from .clock import interleaved
from .forward import need_transformers
from .parts import Context, Options, Part

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

    from ..targets.llama_weights import LlamaShape

GOAL = 1.4


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase.

    Attributes:
        prompt_tokens: of the target and of the draft.
        vision: of the tower of Video-LLaVA, and the frames of a request.
        matrix: side of the matrices whose product tells the rate.
    """

    config: str = "llama-7b"
    prompt_tokens: tuple[int, ...] = (2076, 637)
    vision: tuple[tuple[str, int], ...] = (
        ("hidden_size", 1024), ("intermediate_size", 4096), ("num_hidden_layers", 24),
        ("num_attention_heads", 16), ("image_size", 224), ("patch_size", 14),
    )  # fmt: skip
    frames: int = 8
    matrix: int = 8192
    repeats: int = 6


FULL = Scale()
TINY = Scale(
    "tiny", (40, 20),
    (("hidden_size", 64), ("intermediate_size", 128), ("num_hidden_layers", 2),
     ("num_attention_heads", 4), ("image_size", 28), ("patch_size", 14)),
    3, 64, 2,
)  # fmt: skip


def parts(options: Options) -> list[Part]:
    """The language model in either kind of weights, and the vision tower."""
    found = [Part("prefill", name, partial(prompts, name), 45) for name in ("bf16", "nf4")]
    return [*found, Part("prefill", "vision", vision, 20)]


def scale(context: Context) -> Scale:
    """The sizes of this run."""
    return TINY if context.options.dry_run else FULL


def matrix_tflops(side: int, device: str) -> float:
    """10^12 operations a second of a product of two square matrices of random bf16 numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = interleaved({"": lambda: a @ b}, device, 4)[""]
    return 2 * side**3 / timing.ms / 1e9


def prompt_operations(shape: LlamaShape, rows: int) -> float:
    """Multiplications and additions of a prompt: every product of every row, attention to the rows
    before, and the head for the last row.
    """
    inner = shape.heads * shape.head_dim
    kept = shape.kv_heads * shape.head_dim
    products = shape.hidden * (2 * inner + 2 * kept + 3 * shape.intermediate)
    attention = 2 * inner * (rows + 1) / 2
    return 2 * (shape.layers * rows * (products + attention) + shape.hidden * shape.vocab)


def frame_operations(config: CLIPVisionConfig, frames: int) -> float:
    """Multiplications and additions of the layers of a vision tower."""
    rows = (config.image_size // config.patch_size) ** 2 + 1
    products = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    attention = 2 * config.hidden_size * rows
    return 2.0 * frames * config.num_hidden_layers * rows * (products + attention)


@torch.inference_mode()
def prompts(weights: str, context: Context) -> Iterator[dict]:
    """A prompt from its ids to the first token on the host: `LlamaTarget` op by op and as one
    graph, and transformers with SDPA on the same weights where they are in bf16.
    """
    need_transformers()
    from ..nf4_model import quantize_model
    from ..targets.llama import LlamaTarget
    from ..targets.llama_weights import LlamaWeights
    from ..verify_cost.stage import find_config, random_model

    sizes, device, seed = scale(context), context.options.device, context.options.seed
    tflops = matrix_tflops(sizes.matrix, device)
    model = random_model(find_config(sizes.config), device, torch.bfloat16, seed)
    peer = model if weights == "bf16" else None
    if weights == "nf4":
        quantize_model(model)
    held = LlamaWeights.of(model, share=peer is None)
    del model
    yield {"matrix_tflops": tflops}
    draw = torch.Generator(device).manual_seed(seed)
    for count in sizes.prompt_tokens:
        ids = torch.randint(held.shape.vocab, (1, count), device=device, generator=draw)
        work: dict[str, Callable[[], object]] = {}
        for name, graphs in (("xspec eager", False), ("xspec graph", True)):
            target = LlamaTarget(held, capacity=count + 64, graphs=graphs)
            work[name] = partial(target.prefill, {"input_ids": ids})
        if peer is not None:
            work["transformers"] = lambda ids=ids: (
                peer(ids, logits_to_keep=1).logits.argmax().item()
            )
        bound = prompt_operations(held.shape, count) / tflops / 1e9
        timings = interleaved(work, device, sizes.repeats, burst=1)
        rows = [
            {"weights": weights, "prompt_tokens": count, "backend": name, "ms": found.ms,
             "spread": found.spread, "bound_ms": bound, "ratio": found.ms / bound,
             "goal": GOAL, "met": found.ms / bound <= GOAL}
            for name, found in timings.items()
        ]  # fmt: skip
        yield {"prefill": rows, "attention": _attention()}
        _log(context, f"{weights}, {count} tokens", rows)


@torch.inference_mode()
def vision(context: Context) -> Iterator[dict]:
    """The frames of a request through the tower, together and one by one."""
    need_transformers()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes, device = scale(context), context.options.device
    tflops = matrix_tflops(sizes.matrix, device)
    config = CLIPVisionConfig(**dict(sizes.vision))
    torch.manual_seed(context.options.seed)
    with torch.device(device):
        tower = CLIPVisionModel(config).to(torch.bfloat16).eval()
        side = config.image_size
        frames = torch.randn(sizes.frames, 3, side, side, dtype=torch.bfloat16)
    work = {
        "together": lambda: tower(frames),
        "one by one": lambda: [tower(frame[None]) for frame in frames],
    }
    bound = frame_operations(config, sizes.frames) / tflops / 1e9
    rows = [
        {"frames": sizes.frames, "backend": name, "ms": found.ms, "spread": found.spread,
         "bound_ms": bound, "ratio": found.ms / bound}
        for name, found in interleaved(work, device, sizes.repeats, burst=1).items()
    ]  # fmt: skip
    yield {"matrix_tflops": tflops, "vision": rows}
    _log(context, f"{sizes.frames} frames", rows)


def _attention() -> str:
    from ..targets.llama_decoder import flash_attention

    return "sdpa" if flash_attention() is None else "flash-attn"


def _log(context: Context, what: str, rows: list[dict]) -> None:
    cells = (f"{row['backend']} {row['ms']:.2f} ms ({row['ratio']:.2f})" for row in rows)
    context.log(f"{what}: {', '.join(cells)}; in brackets times {rows[0]['bound_ms']:.2f} ms")
