"""Published EventGPT checkpoints to ours: other names, safetensors, and the flags made explicit.

The published layout is LLaVA's: one Llama (`model.layers.*`, `lm_head`) with `model.visual_tower`,
`model.visual_projector` and `model.feature_adaptor` beside its layers, in safetensors or in pickled
shards. Tensors keep their values and dtype. Shards are read and written one at a time.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from ..files import existing_file, read_json, write_json
from ..targets.checkpoint import weight_map
from .eventgpt import EventGPTConfig, EventGPTForConditionalGeneration

CLIP_HEAD = 64  # of every published CLIP vision tower; no shape tells it
PLACEHOLDER = 0  # <unk>: Llama's tokenizer spells unknown text in bytes and never emits it
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "generation_config.json"),
)
_TOWER = "model.visual_tower."
# Published prefix -> ours, the first that fits; None: not used in a forward pass.
_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"(vision_model\.|.*\.)?embeddings\.position_ids$", None),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", None),
    (r"model\.visual_tower\.visual_tower\.(vision_model\.)?", _TOWER),
    (r"vision_model\.", _TOWER),
    (r"(text_model\.|text_projection\.|visual_projection\.|logit_scale$)", None),
    (r"model\.visual_projector\.", "model.visual_projector."),
    (r"model\.feature_adaptor\.", "model.feature_adaptor."),
    (r"model\.(?=(embed_tokens|layers|norm)\.)", "model.language_model."),
    (r"lm_head\.", "lm_head."),
)
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Converted:
    """What came of a conversion: the folder, its tensors, and published tensors that are unused."""

    folder: Path
    tensors: int
    unused: list[str]


def convert_eventgpt(
    source: Path,
    destination: Path,
    clip: Path | None = None,
    tokenizer: Path | None = None,
    frames: int = 5,
    adaptor_passes: int = 1,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write the checkpoint in `source` to a new folder `destination`, whole or not at all.

    Args:
        source: folder with `config.json` and weights: safetensors, or ``pytorch_model*.bin``.
        clip: folder of the CLIP model, where `source` does not hold the vision tower.
        tokenizer: folder whose tokenizer files are copied; by default those of `source`.
        frames: event images a request.
        adaptor_passes: see `EventGPTConfig`.
        on_shard: told (written shards, all shards).

    Raises:
        FileNotFoundError: a folder or a file is missing.
        FileExistsError: `destination` is there already.
        ValueError: the checkpoint is of another kind, or has other tensors than its configuration
            says; the message names them.
        RuntimeError: a file is damaged.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} exists; name a new folder")
    files = [_Shard(path) for path in _weight_files(source)]
    names = {name for shard in files for name in shard.shapes}
    if clip and not any(name.startswith("model.visual_tower.") for name in names):
        files += [_Shard(path) for path in _weight_files(clip)]
    found = _renamed(files)
    config = _config(source, clip, found, frames, adaptor_passes)
    unused = _check_tensors(files, found, config)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".eventgpt.") as room:
        folder = Path(room) / destination.name
        folder.mkdir()
        _write(files, config, folder, on_shard)
        _copy_tokenizer(tokenizer or source, folder)
        folder.rename(destination)
    return Converted(destination, len(found), unused)


def rename(name: str) -> str | None:
    """Our name of a published tensor; None for one that no forward pass uses.

    Raises:
        ValueError: no EventGPT tensor has this name.
    """
    for pattern, ours in _NAMES:
        if match := re.match(pattern, name):
            return None if ours is None else ours + name[match.end() :]
    raise ValueError(f"{name} is no tensor of an EventGPT model of a supported kind")


class _Shard:
    """One file of weights; shapes are known at once, values when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.safe = path.suffix == ".safetensors"
        try:
            if self.safe:
                with safe_open(path, framework="pt") as file:
                    self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            else:
                self.shapes = {k: tuple(v.shape) for k, v in self._pickled().items()}
        except (SafetensorError, OSError, AttributeError) as error:
            raise RuntimeError(f"{path} is no readable file of weights: {error}") from None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, under our names."""
        if self.safe:
            with safe_open(self.path, framework="pt") as file:
                values = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        else:
            values = self._pickled()
        renamed = {rename(name): value.contiguous() for name, value in values.items()}
        return {name: value for name, value in renamed.items() if name}

    def _pickled(self) -> Mapping[str, torch.Tensor]:
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RuntimeError(f"{self.path} is no readable file of weights: {reason}") from None
        if not isinstance(values, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            for key, value in values.items()
        ):
            raise RuntimeError(f"{self.path} holds other things than named tensors")
        return values


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, each once, in order of name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return [
                existing_file(folder / f, "weights") for f in sorted({*weight_map(index).values()})
            ]
        if (folder / stem).is_file():
            return [folder / stem]
    raise FileNotFoundError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index"
    )


def _renamed(files: Iterable[_Shard]) -> dict[str, tuple[int, ...]]:
    """Shapes under our names; refuses a tensor that stands in two files."""
    found: dict[str, tuple[int, ...]] = {}
    for shard in files:
        for name, shape in shard.shapes.items():
            ours = rename(name)
            if ours in found:
                raise ValueError(f"{shard.path} holds {name}, which another file holds too")
            if ours:
                found[ours] = shape
    return found


def _config(
    source: Path,
    clip: Path | None,
    found: Mapping[str, tuple[int, ...]],
    frames: int,
    adaptor_passes: int,
) -> EventGPTConfig:
    """Our configuration from the published one and from shapes.

    The published flag for marker tokens is one of training; what counts is whether the embedding
    has rows for them.
    """
    path = existing_file(source / "config.json", "model configuration")
    values = read_json(path)
    if not isinstance(values, dict) or not str(values.get("model_type")).startswith("EventChat"):
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} is of model type {kind!r}, expected EventChat_llama")
    if values.get("use_event_qformer"):
        raise ValueError(f"{path}: use_event_qformer is set, expected a model without QFormer")
    text = {key: values[key] for key in _LLAMA if values.get(key) is not None}
    if table := found.get("model.language_model.embed_tokens.weight"):
        text["vocab_size"] = table[0]
    special = bool(values.get("mm_use_im_start_end")) and table and table[0] > 32000
    return EventGPTConfig(
        _vision(clip, found),
        LlamaConfig(**text),
        event_token_id=PLACEHOLDER,
        num_frames=frames,
        adaptor_passes=adaptor_passes,
        event_markers="special" if special else "text",
    )


def _vision(clip: Path | None, found: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    if clip:
        values = read_json(existing_file(clip / "config.json", "CLIP configuration"))
        values = values.get("vision_config", values) if isinstance(values, dict) else {}
        return CLIPVisionConfig(**values)
    patch = found.get(f"{_TOWER}embeddings.patch_embedding.weight")
    places = found.get(f"{_TOWER}embeddings.position_embedding.weight")
    inner = found.get(f"{_TOWER}encoder.layers.0.mlp.fc1.weight")
    if not (patch and places and inner):
        raise ValueError("the checkpoint holds no vision tower; name the folder of its CLIP model")
    layers = {name.split(".")[4] for name in found if name.startswith(f"{_TOWER}encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=patch[0],
        intermediate_size=inner[0],
        num_hidden_layers=len(layers),
        num_attention_heads=patch[0] // CLIP_HEAD,
        image_size=round((places[0] - 1) ** 0.5) * patch[2],
        patch_size=patch[2],
    )


def _check_tensors(
    files: Iterable[_Shard], found: Mapping[str, tuple[int, ...]], config: EventGPTConfig
) -> list[str]:
    """Raise `ValueError` unless `found` is what a model of `config` has; returns unused names."""
    with torch.device("meta"):
        model = EventGPTForConditionalGeneration(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if odd:
        shape = found.get(odd[0])
        raise ValueError(
            f"the weights do not fit the configuration: {odd[0]} is "
            f"{'missing' if shape is None else list(shape)}, expected "
            f"{list(wanted[odd[0]]) if odd[0] in wanted else 'no such tensor'} "
            f"({len(odd)} such tensors)"
        )
    return sorted(name for shard in files for name in shard.shapes if rename(name) is None)


def _write(
    files: list[_Shard],
    config: EventGPTConfig,
    folder: Path,
    on_shard: Callable[[int, int], None],
) -> None:
    total, size, places = len(files), 0, {}
    for i, shard in enumerate(files, 1):
        name = "model.safetensors" if total == 1 else f"model-{i:05}-of-{total:05}.safetensors"
        tensors = shard.tensors()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
        on_shard(i, total)
    if total > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    config.architectures = [EventGPTForConditionalGeneration.__name__]
    config.save_pretrained(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
