"""Writes nf4.safetensors beside this file: two small weights as bitsandbytes saves them.

Needs bitsandbytes: `python tests/data/nf4_record.py`. The dequantized weights are recorded as
SHA-256 of their bytes, in the file's metadata, with the library's version.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

SEED = 20261121
SHAPES = {"plain": (6, 192), "double": (52, 320)}


def main() -> None:
    torch.manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    metadata |= {"seed": str(SEED), "script": "tests/data/nf4_record.py"}
    for name, shape in SHAPES.items():
        magnitude = torch.exp(2 * torch.randn(shape[0], 1))
        weight = (torch.randn(shape) * magnitude / 30).half()
        packed, state = quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=name == "double"
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            state.dtype = dtype
            bits = dequantize_4bit(packed, state).contiguous().view(torch.uint8).numpy()
            metadata[f"{name} {dtype}"] = hashlib.sha256(bits.tobytes()).hexdigest()
        state.dtype = torch.float16
        tensors[f"{name}.weight"] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.weight.{key}"] = value.contiguous()
    save_file(tensors, Path(__file__).with_name("nf4.safetensors"), metadata)


if __name__ == "__main__":
    main()
