"""What a draft model is tuned on: the target's answers behind the draft's own prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ...data.dsec import open_dataset
from ...data.events import event_images, load_events
from ...data.images import resize
from ...data.pairs import Pair, known_drives, read_pairs
from ...data.scenes import make_sample
from ...files import write_json
from ...models import mini
from ...models.eventgpt import EventGPTForConditionalGeneration
from ...models.eventgpt_prompt import eventgpt_inputs
from ...vocab import load_tokenizer
from ...workloads.text import chat_ids
from ..base import PAD
from .draft_folder import load_float
from .text import header, padded

Inputs = Mapping[str, torch.Tensor]
KEPT = 256  # prompts of a dataset in memory: each holds its event images


@dataclass(frozen=True)
class DraftAnswers:
    """Prompts of the draft and the target's answers to them.

    Attributes:
        prompt: of a row: ``input_ids [1, L]`` and, where the draft sees, its media.
        answers: the target's ids ``[N, T]``, `PAD` behind.
        lengths: of the answers, ``[N]``.
        media: names of what the draft sees; none for a text model.
        limit: positions that the draft has.
        folds, digest: as in `TextPairs`.
    """

    prompt: Callable[[int], Inputs]
    answers: torch.Tensor
    lengths: torch.Tensor
    media: tuple[str, ...]
    limit: int
    folds: list[list[int]] | None
    digest: str

    def __len__(self) -> int:
        return len(self.answers)

    def batch(
        self, rows: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of the model for some answers, all but their last token among them, and at which
        input position each answer's first token is predicted, ``[B]``.

        Args:
            hidden: bool ``[B]``: zeros stand for what the draft sees.

        Raises:
            ValueError: prompt and answer are longer than the draft has positions.
        """
        prompts = [self.prompt(row) for row in rows.tolist()]
        texts = [
            torch.cat([prompt["input_ids"][0], self.answers[row, : self.lengths[row] - 1]])
            for prompt, row in zip(prompts, rows.tolist(), strict=True)
        ]
        longest = max(map(len, texts))
        if longest > self.limit:
            raise ValueError(
                f"a prompt with its answer takes {longest} positions, the draft has {self.limit}"
            )
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        inputs = {"input_ids": ids}
        for name in self.media:
            seen = torch.cat([prompt[name] for prompt in prompts])
            gone = hidden.view(-1, *[1] * (seen.dim() - 1))
            inputs[name] = seen.masked_fill(gone, 0.0)
        return inputs, torch.tensor([prompt["input_ids"].shape[1] - 1 for prompt in prompts])


def open_draft_answers(
    path: Path, model: PreTrainedModel, draft: str, target: str = "", dataset: Path | None = None
) -> DraftAnswers:
    """The target's answers in a file of pairs, behind prompts as the draft gets them at run time.

    Args:
        draft: name or folder of `model`.
        target: folder of the target, for the tokenizer of a text model's prompts.
        dataset: of the events; the file of pairs names its own where `xspec extract` wrote it.

    Raises:
        FileNotFoundError: the pairs or the dataset are not there.
        ValueError: a pair is damaged, an id is outside the draft's vocabulary, a clip is missing,
            or nothing says what the draft read.
    """
    text = model.config.get_text_config()
    pairs = read_pairs(path, vocab_size=text.vocab_size)
    answers = padded([pair.target for pair in pairs])
    if isinstance(model, EventGPTForConditionalGeneration):
        prompt, media = _seen(path, pairs, model, draft, dataset), ("event_pixel_values",)
    else:
        prompt, media = _asked(pairs, target), ()
    return DraftAnswers(
        prompt,
        answers,
        torch.tensor([len(pair.target) for pair in pairs]),
        media,
        text.max_position_embeddings,
        known_drives(pairs),
        sha256(repr([(p.sample, p.question, p.target) for p in pairs]).encode()).hexdigest(),
    )


def _asked(pairs: Sequence[Pair], target: str) -> Callable[[int], Inputs]:
    if not target or not Path(target).is_dir():
        raise ValueError("a text draft needs --target FOLDER: its tokenizer makes the prompts")
    if not all(pair.question for pair in pairs):
        raise ValueError("the pairs of a text draft need a query in every row")
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [{"input_ids": chat_ids(tokenizer, pair.question)} for pair in pairs]
    return prompts.__getitem__


def _seen(
    path: Path, pairs: Sequence[Pair], model: PreTrainedModel, draft: str, dataset: Path | None
) -> Callable[[int], Inputs]:
    embedded = not Path(draft).is_dir() or model.config.event_token_id == mini.EVENT
    tokenizer = mini.load_tokenizer() if embedded else load_tokenizer(draft)
    said = header(path)
    if dataset is None and "first_seed" in said:

        def scene(row: int) -> Inputs:
            events = make_sample(pairs[row].sample).event_image
            return mini.draft_inputs(pairs[row].question, events, tokenizer)

        return lru_cache(None)(scene)
    dataset = dataset or (Path(said["dataset_dir"]) if said.get("dataset_dir") else None)
    if dataset is None:
        raise ValueError(f"{path} names no dataset: --dataset-dir says where the events are")
    clips = {clip.index: clip for clip in open_dataset(dataset).clips}
    if missing := [pair.sample for pair in pairs if pair.sample not in clips]:
        raise ValueError(f"{dataset} has no clip {missing[0]}, which {path} asks about")

    def clip(row: int) -> Inputs:
        pair = pairs[row]
        events = load_events(clips[pair.sample].events)
        if embedded:
            image = resize(event_images(events, 1), mini.IMAGE_SIZE, "squash")[0]
            return mini.draft_inputs(pair.question, image, tokenizer)
        images = event_images(events, model.config.num_frames)
        return eventgpt_inputs(pair.question, images, tokenizer, model.config)

    return lru_cache(KEPT)(clip)


@torch.inference_mode()
def write_prompt_pairs(
    path: Path,
    target: Path,
    draft: PreTrainedModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write what a text target and its draft answer to `prompts`, greedily.

    Raises:
        FileNotFoundError: there is no target.
        ValueError: it lacks weights, or draft and target have other vocabularies.
    """
    if not (target / "config.json").is_file():
        raise FileNotFoundError(f"{target} holds no model: config.json is missing")
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load_float(target, torch.float32).to(draft.device)
    sizes = [m.config.get_text_config().vocab_size for m in (model, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"target and draft must share a vocabulary, got sizes {sizes}")
    rows = []
    for number, prompt in enumerate(prompts):
        ids = chat_ids(tokenizer, prompt).to(draft.device)
        row = {"sample_idx": number, "query": prompt}
        for name, one in (("egpt", draft), ("vl", model)):
            out = one.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            row[f"{name}_tokens"] = out[0, ids.shape[1] :].tolist()
        rows.append(row)
        progress(number + 1, len(prompts))
    write_json(path, {"target": str(target), "total_samples": len(rows), "results": rows})
