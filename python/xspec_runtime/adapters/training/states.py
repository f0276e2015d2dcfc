"""Hidden states of recorded answers as training material: batches, labels, a split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ...data.pairs import known_drives, read_pairs
from ...extract import read_states
from ...files import existing_file, read_json
from ...models import mini
from .loop import split_rows

ABSENT = -1  # stands for a token behind the end of an answer
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "weight")


@dataclass(frozen=True)
class States:
    """Answers of both models as states.

    Attributes:
        draft, target: half precision ``[N, L, De]`` and ``[N, T, Dt]``, zeros behind the end.
        lengths: ``[N, 2]``, of the draft's and of the target's answers.
        tokens: the target's ids ``[N, T]``, `ABSENT` behind the end.
        folds: rows of one drive each, or None where drives are not known.
        digest: of what the folder's index says, which names the material.
        draft_name: the draft model as the index calls it, or "".
    """

    draft: torch.Tensor
    target: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor
    folds: list[list[int]] | None
    digest: str
    draft_name: str

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: torch.Tensor) -> Batch:
        """Some answers, in float32."""
        return Batch(
            self.draft[index].float(),
            self.target[index].float(),
            _reach(self.lengths[index, 0], self.draft.shape[1]),
            _reach(self.lengths[index, 1], self.target.shape[1]),
            self.tokens[index],
        )

    def split(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See `split_rows`."""
        return split_rows(len(self), share, self.folds)


@dataclass(frozen=True)
class Batch:
    """States ``[B, L, De]`` and ``[B, T, Dt]``, where they are (bool), and the target's ids."""

    draft: torch.Tensor
    target: torch.Tensor
    has_draft: torch.Tensor
    has_target: torch.Tensor
    tokens: torch.Tensor

    def hide(self, hidden: torch.Tensor) -> Batch:
        """The same with the draft of the rows ``hidden`` (bool ``[B]``) replaced by zeros."""
        draft = self.draft.masked_fill(hidden[:, None, None], 0.0)
        return Batch(draft, self.target, self.has_draft, self.has_target, self.tokens)


def open_states(folder: Path, head: torch.Tensor, pairs: Path | None = None) -> States:
    """The states of `folder`, as `xspec extract --states` writes them.

    Args:
        head: the target's language-model head ``[V, Dt]``; without `pairs` it says which token a
            target state predicts.
        pairs: the JSON of the same run: tokens, and drives for the split.

    Raises:
        ValueError: widths, counts or lengths do not fit; otherwise as `read_states`.
    """
    draft, target, lengths = read_states(folder)
    lengths = lengths.long()
    if target.shape[2] != head.shape[1]:
        raise ValueError(
            f"target states in {folder} have width {target.shape[2]}, the target's head reads "
            f"{head.shape[1]}"
        )
    if not len(lengths) or int(lengths.min()) < 1:
        raise ValueError(f"{folder} holds no answers, or one without tokens")
    for name, states in (("draft", draft), ("target", target)):
        if not states.isfinite().all():
            raise ValueError(f"{name} states in {folder} hold values that are not finite numbers")
    folds = None
    if pairs is None:
        best = [(rows.float() @ head.T).argmax(-1) for rows in target.split(64)]
        reach = _reach(lengths[:, 1], target.shape[1])
        tokens = torch.cat(best).masked_fill(~reach, ABSENT)
    else:
        tokens, folds = _recorded(pairs, lengths, target.shape[1], head.shape[0])
    index = existing_file(folder / "index.json")
    config = read_json(index).get("config") or {}
    digest = sha256(json.dumps(read_json(index), sort_keys=True).encode())
    digest.update(target[:, 0].numpy().tobytes())
    name = str(config.get("draft") or "") if isinstance(config, dict) else ""
    return States(draft, target, lengths, tokens, folds, digest.hexdigest(), name)


def _recorded(
    path: Path, lengths: torch.Tensor, width: int, vocab_size: int
) -> tuple[torch.Tensor, list[list[int]] | None]:
    pairs = read_pairs(path, vocab_size=vocab_size)
    found = [len(pair.target) for pair in pairs]
    if found != lengths[:, 1].tolist():
        raise ValueError(
            f"{path} holds {len(pairs)} answers that are not those of the {len(lengths)} states: "
            "their lengths differ"
        )
    tokens = torch.full((len(pairs), width), ABSENT)
    for row, pair in zip(tokens, pairs, strict=True):
        row[: len(pair.target)] = torch.tensor(pair.target)
    return tokens, known_drives(pairs)


def read_head(target: str) -> torch.Tensor:
    """The target's language-model head ``[V, D]`` in float32: of ``mini``, of a folder with
    safetensors, or of one such file.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no head.
    """
    from safetensors import SafetensorError, safe_open

    if target == "mini":
        return mini.load("target").get_output_embeddings().weight.detach().float()
    path = Path(target)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [existing_file(path)]
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name in set(HEAD_NAMES) & set(stored.keys()):
                    if len(stored.get_slice(name).get_shape()) == 2:
                        return stored.get_tensor(name).float()
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    raise ValueError(f"{target} holds no language-model head named {', '.join(HEAD_NAMES)}")


def _reach(lengths: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width) < lengths[:, None]
