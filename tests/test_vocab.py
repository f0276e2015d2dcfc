"""Vocabularies compared, and drafters whose tokens are not the target's."""

from __future__ import annotations

import json
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from running import xspec
from xspec_runtime.data.captions import QUESTIONS
from xspec_runtime.data.scenes import make_sample, target_caption
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.translated import MODES, TranslatedDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.vocab import UNMAPPED, compare, load_tokenizer, render, same_ids, translate
from xspec_runtime.workloads import MiniPair, Settings

TEXTS = [target_caption(make_sample(i).scene) for i in range(60)]


def trained(size: int, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of `size` tokens on captions, byte-level or in SentencePiece's manner."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Oracle:
    """Proposes the rest of a known text, in tokens of its own."""

    name = "oracle"

    def __init__(self, tokenizer, text: str) -> None:
        self.ids = tokenizer.encode(text, add_special_tokens=False)
        self.ended: list[int] | None = None

    def begin(self, request: Request) -> None:
        self.prompt = request.prompt_ids

    def propose(self, context, rows: int) -> DraftTree:
        known = len(context)
        rest = self.ids[known:] if self.ids[: known - 1] == list(context[:-1]) else []
        return DraftTree.chain(context[-1], rest[: rows - 1])

    def end(self, answer) -> None:
        self.ended = list(answer)


def test_a_vocabulary_and_itself():
    tokenizer = mini.load_tokenizer()
    found = compare(tokenizer, tokenizer)
    assert found.identical and found.shared == mini.VOCAB
    assert found.only_left == found.only_right == []
    assert found.left_to_right == list(range(mini.VOCAB))
    assert "no translation is needed" in render(found, ("a", "b"))


def test_tokens_match_by_what_they_spell():
    left, right = trained(400), trained(330, metaspace=True)
    found = compare(left, right)
    assert 0 < found.shared < min(found.left_size, found.right_size)
    assert not found.identical
    for i, j in enumerate(found.left_to_right):
        if j != UNMAPPED and i not in left.all_special_ids:
            assert left.decode([i]) == right.decode([j])
    assert found.left_to_right[left.eos_token_id] == right.eos_token_id
    assert len(found.only_left) == found.left_size - found.shared
    assert same_ids(left, left, TEXTS[:3]) == 1.0 > same_ids(left, right, TEXTS[:3])


def test_translation_ends_at_the_first_unmapped_token():
    assert translate([2, 0, 1, 2], [5, UNMAPPED, 7]) == [7, 5]
    assert translate([9], [5]) == []


@pytest.mark.parametrize("mode", MODES)
def test_answers_of_a_foreign_drafter_are_the_targets(mode):
    pair = MiniPair(Settings(max_new_tokens=60))
    foreign = trained(420)
    for task in pair.scene_tasks(2):
        plain = pair.decoder("target").generate(task.inputs, task.request).tokens
        oracle = Oracle(foreign, pair.tokenizer.decode(plain))
        drafter = TranslatedDrafter(oracle, foreign, pair.tokenizer, mode)
        config = pair.decoder("ngram").config
        out = SpeculativeDecoder(pair.target, drafter, config).generate(task.inputs, task.request)
        assert out.tokens == plain
        assert out.tokens_per_verify > 1.2, (mode, out.tokens_per_verify)
        assert oracle.ended and foreign.decode(oracle.prompt).count("USER") == 1


def test_the_tree_keeps_its_shape_where_tokens_map():
    tokenizer = mini.load_tokenizer()
    drafter = TranslatedDrafter(_Fixed(), tokenizer, tokenizer)
    tree = drafter.propose([10, 11], 8)
    assert tree.tokens == [11, 20, 21, 22] and tree.parent_idx == [-1, 0, 1, 0]


class _Fixed:
    name = "fixed"

    def propose(self, context, rows):
        tree = DraftTree.chain(context[-1], [20, 21])
        tree.add(0, 22, 0.5)
        tree.add(0, mini.VOCAB + 7, 0.4)
        tree.add(4, 23, 0.3)
        return tree


def test_bad_input(tmp_path, monkeypatch, capsys):
    tokenizer = mini.load_tokenizer()
    with pytest.raises(ValueError, match="mode must be one of ids, text"):
        TranslatedDrafter(_Fixed(), tokenizer, tokenizer, "words")
    with pytest.raises(FileNotFoundError, match="tokenizer folder not found"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_command(tmp_path, capsys):
    run = partial(xspec, "vocab")

    other = tmp_path / "other"
    trained(330).save_pretrained(other)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(QUESTIONS))
    ids = mini.load_tokenizer().encode(TEXTS[0])
    foreign = load_tokenizer(str(other)).encode(TEXTS[0])
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps({"results": [{"egpt_tokens": foreign, "vl_tokens": ids}]}))
    out = tmp_path / "vocab.json"
    code = run(other, "mini", "--texts", texts, "--apply", pairs, "--json", out)
    assert code == 0
    record = json.loads(out.read_text())
    assert record["schema"] == "xspec.vocab/1" and 0 < record["shared"] < mini.VOCAB
    assert record["applied"]["after"] > record["applied"]["before"]
    pairs.write_text(json.dumps({"results": [{"egpt_tokens": [5000], "vl_tokens": ids}]}))
    assert run(other, "mini", "--apply", pairs) == 2
    assert "holds id 5000, the draft's vocabulary ends at 329" in capsys.readouterr().err
