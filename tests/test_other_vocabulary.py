"""A draft whose folder has another tokenizer than the target's: translated, and lossless."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from test_vocab import trained
from xspec_runtime.drafters.base import DraftTree
from xspec_runtime.drafters.translated import MODES, TranslatedDrafter, mode_for, respelled
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.models import mini
from xspec_runtime.workloads.spoken import spoken_by

PROMPTS = ("The key elements in this scene", "The driver can")
NEW = 32


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    mini.load("assistant").save_pretrained(folder)
    mini.load_tokenizer().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def draft(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int = 0) -> Path:
    """A small model that learned the target's answers by heart, in tokens of its own."""
    torch.manual_seed(0)
    model = mini.load("assistant")
    known = mini.load_tokenizer()
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=64, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    small = LlamaForCausalLM(config)
    texts = []
    for text in PROMPTS:
        ids = known(text, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        answer = respelled(said[0, ids.shape[1] :].tolist(), known, tokenizer)
        texts.append([*tokenizer(text)["input_ids"], *answer])
    if not rows:
        step = torch.optim.AdamW(small.parameters(), 5e-3)
        for _ in range(60):
            for ids in texts:
                given = torch.tensor([ids])
                step.zero_grad()
                small(input_ids=given, labels=given).loss.backward()
                step.step()
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def e2e(target: Path, folder: Path, arms: str, out: Path) -> dict:
    return run_e2e(
        Options(
            "", arms=arms, warmup=0, max_new_tokens=NEW, target=str(target), draft=str(folder),
            prompts=target / "prompts.txt", output_dir=out,
        )
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_e2e_translates(mode, target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xspec_runtime.plots.draw_all", lambda *_: [])
    tokenizer = trained(420) if mode == "ids" else trained(330, metaspace=True)
    folder = draft(tmp_path / "draft", tokenizer)
    monkeypatch.setattr("xspec_runtime.workloads.spoken.mode_for", lambda *_: mode)
    arms = "target,hf_generate,hf_assisted,draft,tree,draft_alone,cascade"
    results = e2e(target, folder, arms, tmp_path / "out")
    assert results["config"]["draft_tokens"] == mode
    assert 0 < results["config"]["draft_ids_mapped"] < 1
    found = {arm["name"]: arm for arm in results["arms"]}
    alone = found.pop("draft_alone")
    assert all(arm["identical"] == arm["samples"] == 2 for arm in found.values())
    print({name: arm["tokens_per_verify"] for name, arm in found.items()}, alone["agreement"])
    assert found["draft"]["tokens_per_verify"] > 1.3
    said = " ".join(capsys.readouterr().out.split())
    assert "the draft has another vocabulary" in said and "of its ids have a counterpart" in said


def test_the_method_follows_how_texts_are_cut():
    known, near, far = mini.load_tokenizer(), trained(620), trained(270)
    assert mode_for(known, known, PROMPTS) == "ids"
    assert mode_for(near, known, PROMPTS) == "ids"
    assert mode_for(far, known, PROMPTS) == "text"


def test_the_same_vocabulary_keeps_its_ids(target, tmp_path):
    known = mini.load_tokenizer()
    size = len(known)
    same = spoken_by(target, known, (size, size), PROMPTS)
    assert same.direct and same.mapped == 1 and not same.describe()
    # A table with rows to spare could be asked for a token that the other one lacks.
    assert spoken_by(target, known, (size + 64, size), PROMPTS).method == "ids"
    assert spoken_by(tmp_path, known, (size, size), PROMPTS).assumed


def test_drafts_that_cannot_be_read_are_refused(target, tmp_path):
    known = mini.load_tokenizer()
    with pytest.raises(ValueError, match="holds no tokenizer, and its model has 9 tokens"):
        spoken_by(tmp_path, known, (9, 640), PROMPTS)
    with pytest.raises(ValueError, match=r"has 640 tokens, the model there only 600"):
        spoken_by(target, known, (600, 640), PROMPTS)
    other = Tokenizer(models.WordLevel({"\u00e9t\u00e9": 0, "\u00e7a": 1}, "\u00e7a"))
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="shares no token with the target's"):
        spoken_by(tmp_path / "words", known, (2, 640), PROMPTS)


class _Says:
    """Proposes one chain of its own tokens."""

    name = "says"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def propose(self, context, rows: int) -> DraftTree:
        return DraftTree.chain(context[-1], self.ids[: rows - 1])


def test_the_end_of_an_answer_closes_the_text():
    known, far = mini.load_tokenizer(), trained(330, metaspace=True)
    said = far.encode(" scene", add_special_tokens=False)
    context = known.encode(" the driver can see this", add_special_tokens=False)

    def tokens(ids: list[int], limit: int | None = None) -> list[int]:
        return TranslatedDrafter(_Says(ids), far, known, "text", limit).propose(context, 16).tokens

    whole = known.encode(" scene", add_special_tokens=False)
    assert tokens([*said, far.eos_token_id]) == [context[-1], *whole, known.eos_token_id]
    # Without an end the word may go on.
    assert tokens(said) == [context[-1], *whole[:-1]]
    assert tokens([far.eos_token_id]) == [context[-1], known.eos_token_id]
    assert tokens(said, limit=1) == [context[-1]]
