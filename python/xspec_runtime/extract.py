"""What both models answer about a dataset: token pairs, and the hidden states behind them.

The pairs are what drafters and token adapters train on, in the published form; the states, in
chunks of safetensors, are what hidden-state adapters train on. State i predicts token i.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .data.captions import QUESTIONS
from .data.dsec import Clip, Dataset
from .errors import out_of_memory
from .files import check_output, existing_file, read_json, replace_file, write_json
from .journal import Journal
from .models.mini import decode_answer
from .models.vlm_pair import VlmPair
from .stages.clock import StageModel, stage_models

CHUNK = 1000
STATES_SCHEMA = "xspec.states/1"
# Tensors of a chunk, and how many dimensions each has.
_STATES = {"draft": 3, "target": 3, "lengths": 2}


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract.

    Attributes:
        output: the JSON file of pairs; a journal lies beside it.
        states: folder for hidden states, or None.
        questions: asked of every clip; without any, each clip's own.
        max_samples: clips; -1 takes all.
        frames: which frames of a video, see `data.video.frame_indices`.
        chunk: answers of one file of states.
    """

    output: Path
    states: Path | None = None
    questions: tuple[str, ...] = ()
    max_samples: int = -1
    max_new_tokens: int = 50
    frames: str = "uniform"
    chunk: int = CHUNK


def extract(
    pair: VlmPair,
    data: Dataset,
    options: ExtractOptions,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Answer every (clip, question) with both models; returns what was written to `output`.

    Started again with the same options, it goes on where it stopped.

    Args:
        on_answer: told (answers there, answers in all).

    Raises:
        ValueError: an option is out of range, the journal is of other options, or no clip can be
            answered.
    """
    if options.max_samples != -1 and options.max_samples < 1:
        raise ValueError(f"max_samples must be -1 (all) or at least 1, got {options.max_samples}")
    if options.chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {options.chunk}")
    check_output(options.output)
    clips = data.clips if options.max_samples == -1 else data.clips[: options.max_samples]
    config = {
        **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "questions": list(options.questions),
        "dataset_dir": str(data.folder),
        "draft": type(pair.draft).__name__,
        "target": type(pair.target).__name__,
    }
    work = [(c, q, text) for c in clips for q, text in enumerate(_questions(c, options.questions))]
    journal = Journal(options.output.with_suffix(".journal.jsonl"), config, "key")
    longest = max(
        m.config.get_text_config().max_position_embeddings for m in (pair.draft, pair.target)
    )
    models = stage_models(pair, options.max_new_tokens, options.frames, longest)
    store = StateFolder(options.states) if options.states else None
    with journal:
        for clip, number, question in work:
            if f"{clip.index}/{number}" in journal.done:
                continue
            row, states = _answer(pair, models, clip, number, question, store is not None)
            if store and states:
                store.add(row["key"], states)
            journal.write(row)
            on_answer(len(journal.rows), len(work))
    rows = [row for row in journal.rows if "error" not in row]
    if not rows:
        raise ValueError(f"no clip of {data.folder} could be answered: {journal.rows[0]['error']}")
    if store:
        store.pack([row["key"] for row in rows], options.chunk, config)
    record = _record(data, options, rows, journal.rows)
    write_json(options.output, record)
    return record


def _questions(clip: Clip, asked: Sequence[str]) -> Sequence[str]:
    return asked or (clip.question or QUESTIONS[0],)


def _answer(
    pair: VlmPair,
    models: tuple[StageModel, StageModel],
    clip: Clip,
    number: int,
    question: str,
    states: bool,
) -> tuple[dict, dict[str, torch.Tensor]]:
    key = f"{clip.index}/{number}"
    row: dict = {
        "key": key,
        "sample_idx": clip.index,
        "question_idx": number,
        "sample_id": clip.id,
        "drive": clip.drive,
        "query": question,
    }
    found: dict[str, torch.Tensor] = {}
    try:
        for name, model, short in zip(("draft", "target"), models, ("egpt", "vl"), strict=True):
            with _recorded(model.target.model, states) as seen:
                tokens = model.run(clip, question).tokens
            row[f"{short}_tokens"] = tokens
            row[f"{short}_text"] = decode_answer(list(tokens), pair.tokenizer)
            if states:
                found[name] = torch.cat(seen)[: len(tokens)].half().cpu().contiguous()
    except (ValueError, OSError, RuntimeError) as error:
        # The next answer would not fit either.
        if out_of_memory(error):
            raise
        return {"key": key, "error": " ".join(str(error).split())}, {}
    return row, found


@contextmanager
def _recorded(model: PreTrainedModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """The rows that the language-model head reads, one a token, in order."""
    seen: list[torch.Tensor] = []
    hook = None
    if wanted:
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0][0, -1:].detach().clone())
        )
    try:
        yield seen
    finally:
        if hook:
            hook.remove()


def _record(data: Dataset, options: ExtractOptions, rows: list[dict], every: list[dict]) -> dict:
    results = [{k: v for k, v in row.items() if k != "key"} for row in rows]
    failed = len(every) - len(rows)
    return {
        "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"),
        "dataset_dir": str(data.folder),
        "total_samples": len(rows),
        "num_questions": max(1, len(options.questions)),
        "questions": sorted({row["query"] for row in rows}),
        "eventgpt_success": len(rows),
        "videollava_success": len(rows),
        "error_count": failed,
        "extraction_mode": "sequential",
        "results": results,
    }


class StateFolder:
    """States of one answer a file while a run is under way, then chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loose = folder / "answers"

    def _path(self, key: str) -> Path:
        return self.loose / f"{key.replace('/', '_')}.safetensors"

    def add(self, key: str, states: dict[str, torch.Tensor]) -> None:
        replace_file(self._path(key), lambda path: save_file(states, path))

    def pack(self, keys: Sequence[str], size: int, config: dict) -> None:
        """Write chunks and their index, then remove the loose files."""
        chunks = []
        for start in range(0, len(keys), size):
            part = [load_file(self._path(key)) for key in keys[start : start + size]]
            tensors = {"lengths": torch.tensor([[len(p["draft"]), len(p["target"])] for p in part])}
            for name in ("draft", "target"):
                tensors[name] = torch.nn.utils.rnn.pad_sequence(
                    [p[name] for p in part], batch_first=True
                )
            file = f"chunk_{start // size:05}.safetensors"
            replace_file(self.folder / file, lambda path, tensors=tensors: save_file(tensors, path))
            chunks.append({"path": file, "start_idx": start, "n_samples": len(part)})
        index = {
            "schema": STATES_SCHEMA,
            "total_samples": len(keys),
            "chunk_size": size,
            "chunks": chunks,
            "config": config,
        }
        write_json(self.folder / "index.json", index)
        for key in keys:
            self._path(key).unlink(missing_ok=True)
        if not any(self.loose.iterdir()):
            self.loose.rmdir()


def read_states(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All states of a folder: draft ``[N, L, De]`` and target ``[N, T, Dt]`` in half precision,
    zeros behind the end, and lengths ``[N, 2]``.

    Raises:
        FileNotFoundError: there is no index, or a chunk is missing.
        ValueError: the index is damaged or names a file elsewhere.
        RuntimeError: a chunk is damaged.
    """
    index = read_json(folder / "index.json", "index of hidden states")
    chunks = index.get("chunks") if isinstance(index, dict) else None
    if not isinstance(index, dict) or index.get("schema") != STATES_SCHEMA or not chunks:
        raise ValueError(f"{folder / 'index.json'} is no index of hidden states")
    parts = []
    for chunk in chunks:
        name = chunk.get("path") if isinstance(chunk, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / 'index.json'} names {json.dumps(name)}, expected a file")
        try:
            part = load_file(existing_file(folder / name, "chunk of hidden states"))
        except SafetensorError as error:
            raise RuntimeError(f"{folder / name} is damaged: {error}") from None
        if {key: len(value.shape) for key, value in part.items()} != _STATES:
            raise RuntimeError(f"{folder / name} is damaged: expected draft, target and lengths")
        parts.append(part)

    def joined(kind: str) -> torch.Tensor:
        longest = max(part[kind].shape[1] for part in parts)
        return torch.cat([pad(p[kind], (0, 0, 0, longest - p[kind].shape[1])) for p in parts])

    return joined("draft"), joined("target"), torch.cat([part["lengths"] for part in parts])
