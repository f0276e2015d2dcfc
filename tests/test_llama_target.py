"""LlamaTarget: transformers' answers on every family, and the law, end to end on torch."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from tiny import SIZES, VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.targets import llama
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_batch import LlamaBatchTarget
from xspec_runtime.targets.llama_decoder import flash_attention
from xspec_runtime.workloads import MiniPair, Settings

NEW = 32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "smollm2": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def family(name: str, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A tiny random model; biases and norms are random too, so that a lost one shows."""
    config_class, model_class, options = FAMILIES[name]
    torch.manual_seed(seed)
    config = config_class(**SIZES, num_hidden_layers=layers, **options)
    model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def decode(target, ids: torch.Tensor, rows: int, drafter=None, new: int = NEW) -> list[int]:
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(rows, new))
    return decoder.generate({"input_ids": ids}).tokens


def random_rows(rng: random.Random, root: int, spine: list[int], rows: int) -> DraftTree:
    """A tree that holds `spine` below its root, among garbage, in random topological order."""
    parent, token, known = [-1], [root], [{}]
    for i, right in enumerate(spine):
        parent.append(i)
        token.append(right)
        known[i][right] = i + 1
        known.append({})
    while len(token) < rows:
        above = rng.randrange(len(token))
        wrong = rng.randrange(VOCAB)
        if wrong not in known[above] and not (above == len(spine) and wrong == 0):
            known[above][wrong] = len(token)
            known.append({})
            parent.append(above)
            token.append(wrong)
    order, ready = [], [0]
    while ready:
        node = ready.pop(rng.randrange(len(ready)))
        order.append(node)
        ready += [i for i, p in enumerate(parent) if p == node]
    place = {-1: -1} | {node: i for i, node in enumerate(order)}
    return DraftTree(
        [token[node] for node in order],
        [place[parent[node]] for node in order],
        [1.0] * len(order),
    )


def path_tokens(tree: DraftTree, node: int) -> list[int]:
    tokens = []
    while node >= 0:
        tokens.append(tree.tokens[node])
        node = tree.parent_idx[node]
    return tokens[::-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_generate(name: str, seed: int) -> None:
    model = family(name, seed)
    ids = prompt(seed, 21)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 21 + NEW - 1)
    assert decode(target, ids, 1) == truth
    assert decode(target, ids, 6, OracleDrafter(truth, seed, 0.9)) == truth
    assert decode(target, ids, 16, OracleDrafter(truth, seed)) == truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_as_close_to_float64_as_transformers(name: str, dtype, rng: random.Random) -> None:
    model = family(name, rng.randrange(1 << 30)).to(dtype)
    ids = prompt(rng.randrange(1 << 30), 40)
    tree = random_rows(rng, 7, [rng.randrange(VOCAB) for _ in range(4)], 9)
    target = LlamaTarget(model, 80)
    target.prefill({"input_ids": ids})
    ours = target.decoder.logits(target.forward(tree).hidden).double()

    paths = [torch.tensor([path_tokens(tree, node)]) for node in range(len(tree))]
    theirs = torch.stack([model(torch.cat([ids, path], 1)).logits[0, -1] for path in paths])
    exact = model.double()
    truth = torch.stack([exact(torch.cat([ids, path], 1)).logits[0, -1] for path in paths])
    error = (ours - truth).square().mean().sqrt()
    allowed = (theirs.double() - truth).square().mean().sqrt()
    assert error <= 2 * allowed, f"{error:.3g}, transformers {allowed:.3g}"


@pytest.fixture(scope="module")
def pair() -> MiniPair:
    return MiniPair(Settings(gamma=5, rows=16))


def generated(model: PreTrainedModel, inputs, new: int) -> list[int]:
    options = {"eos_token_id": mini.EOS, "pad_token_id": mini.PAD, "max_new_tokens": new}
    out = model.generate(**inputs, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("arm", ["target", "draft", "tree"])
def test_embedded_pair(pair: MiniPair, arm: str) -> None:
    plain = pair.decoder(arm)
    target = LlamaTarget(mini.load("target"), 320)
    decoder = SpeculativeDecoder(target, plain.drafter, plain.config)
    model = mini.load("target")
    for task in pair.scene_tasks(1):
        expected = generated(model, task.inputs, plain.config.max_new_tokens)
        out = decoder.generate(task.inputs, task.request)
        assert out.tokens == expected
        assert arm == "target" or out.tokens_per_verify > 1


def test_event_model_as_target(pair: MiniPair) -> None:
    model = mini.load("draft")
    target = LlamaTarget(mini.load("draft"), 128)
    config = SpecConfig(6, NEW, (mini.EOS,))
    for task in pair.scene_tasks(2):
        inputs = task.request.draft_inputs
        expected = generated(model, inputs, NEW)
        drafter = OracleDrafter(expected, 1)
        assert SpeculativeDecoder(target, drafter, config).generate(inputs).tokens == expected


class Plain:
    """Plain decoding: the head's input after every token, and all K/V at the end."""

    def __init__(self, target: LlamaTarget, ids: torch.Tensor, new: int) -> None:
        tokens = target.prefill({"input_ids": ids}).tokens
        poison(target)
        self.hidden = []
        for _ in range(new):
            tree = DraftTree.root(tokens[-1])
            scored = target.forward(tree)
            self.hidden.append(scored.hidden[0].clone())
            verdict = target.accept(tree, scored, tokens)
            target.commit(verdict)
            tokens += verdict.tokens
        self.tokens = tokens
        self.kv = committed(target)


@torch.inference_mode()
def poison(target: LlamaTarget) -> None:
    """NaN in every slot that holds nothing yet."""
    for layer in target.cache.layers:
        layer.keys[:, :, target.cache.length :] = torch.nan
        layer.values[:, :, target.cache.length :] = torch.nan


def committed(target: LlamaTarget) -> list[torch.Tensor]:
    rows = target.cache.length
    return [
        t[:, :, :rows].clone() for layer in target.cache.layers for t in (layer.keys, layer.values)
    ]


def differences(
    target: LlamaTarget, ids: torch.Tensor, plain: Plain, rng: random.Random
) -> list[str]:
    """What changes when random trees verify the answer of `plain`, rounds cut at random."""
    found = []
    target.prefill({"input_ids": ids})
    poison(target)
    done = 0
    while done < len(plain.hidden):
        left = len(plain.hidden) - done - 1
        spine = plain.tokens[done + 1 :][: rng.randrange(min(left, 9) + 1)]
        tree = random_rows(rng, plain.tokens[done], spine, rng.randrange(len(spine) + 1, 33))
        scored = target.forward(tree, rng.choice((0, 33)))
        for node in range(len(tree)):
            path = path_tokens(tree, node)
            step = done + len(path) - 1
            same = path == plain.tokens[done : step + 1] and step < len(plain.hidden)
            if same and not torch.equal(scored.hidden[node], plain.hidden[step]):
                found.append(f"row {node} of {len(tree)} at position {ids.shape[1] + step}")
        verdict = target.accept(tree, scored, plain.tokens[: done + 1])
        target.commit(verdict)
        done += verdict.accepted + 1
    for i, (ours, theirs) in enumerate(zip(committed(target), plain.kv, strict=True)):
        if not torch.equal(ours[:, :, : theirs.shape[2]], theirs):
            found.append(f"{'kv'[i % 2]} of layer {i // 2}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "length"), [("llama", 20), ("llama", 265), ("qwen3", 50)])
def test_exact_trees_have_the_bits_of_plain_decoding(
    name: str, length: int, dtype, rng: random.Random, monkeypatch
) -> None:
    monkeypatch.setenv("XSPEC_EXACT", "1")
    model = family(name, rng.randrange(1 << 30)).to(dtype)
    ids = prompt(rng.randrange(1 << 30), length)
    plain = Plain(LlamaTarget(model, length + 200), ids, 36)
    other = LlamaTarget(model, length + 70)
    for _ in range(2):
        assert differences(other, ids, plain, rng) == []


def test_a_tree_at_speed_has_other_bits(rng: random.Random, monkeypatch) -> None:
    monkeypatch.setenv("XSPEC_EXACT", "0")
    model = family("llama", rng.randrange(1 << 30))
    ids = prompt(rng.randrange(1 << 30), 20)
    plain = Plain(LlamaTarget(model, 120), ids, 24)
    assert differences(LlamaTarget(model, 120), ids, plain, rng)


def test_exact_rows_do_not_depend_on_other_requests(rng: random.Random, monkeypatch) -> None:
    monkeypatch.setenv("XSPEC_EXACT", "1")
    target = LlamaTarget(family("llama", rng.randrange(1 << 30)), 96)
    batch = LlamaBatchTarget(target, 3)
    prompts = [prompt(i, length) for i, length in enumerate((9, 33, 20))]
    trees = [random_rows(rng, 5 + i, [3, 4], rows) for i, rows in enumerate((4, 17, 9))]
    for ids in prompts:
        batch.prefill({"input_ids": ids})
    hidden = batch.forward(trees).hidden.view(3, 17, -1)
    for together, ids, tree in zip(hidden, prompts, trees, strict=True):
        target.prefill({"input_ids": ids})
        alone = target.forward(tree).hidden
        assert torch.equal(together[: len(tree)], alone)


@pytest.mark.parametrize("penalty", [0.0, 1.3])
def test_batches(penalty: float, seed: int) -> None:
    model = family("qwen2", seed)
    ids = [prompt(seed + i, length) for i, length in enumerate((5, 31, 12, 1))]
    prompts, truth = [], {}
    for i, one in enumerate(ids):
        options, processor = {}, None
        if penalty and i % 2:
            options = {"repetition_penalty": penalty}
            processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
        out = model.generate(
            one, attention_mask=torch.ones_like(one), max_new_tokens=NEW, do_sample=False, **options
        )
        truth[i] = out[0, one.shape[1] :].tolist()
        prompts.append(BatchPrompt({"input_ids": one}, Request([i]), processor))

    class Knows(OracleDrafter):
        def begin(self, request: Request) -> None:
            self.answer = truth[request.prompt_ids[0]]

    target = LlamaTarget(model, 31 + NEW)
    decoder = BatchDecoder(target, lambda: Knows([], seed), SpecConfig(8, NEW), batch=3)
    assert isinstance(decoder.target, LlamaBatchTarget)
    answers = decoder.generate(prompts)
    assert [answer.tokens for answer in answers] == list(truth.values())
    assert max(answer.tokens_per_verify for answer in answers) > 1.5


def test_logits_processors(seed: int) -> None:
    model, ids = family("llama", seed), prompt(seed)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        repetition_penalty=1.3,
    )  # fmt: skip
    truth = out[0, ids.shape[1] :].tolist()
    target = LlamaTarget(model, 128)
    decoder = SpeculativeDecoder(target, OracleDrafter(truth, seed), SpecConfig(16, NEW))
    found = decoder.generate({"input_ids": ids}, logits_processor=processors)
    assert found.tokens == truth
    assert found.tokens_per_verify > 1


def test_drafts_ride_in_the_prefill(seed: int) -> None:
    model, ids = family("llama", seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 128)
    config = SpecConfig(16, NEW, prefill_fused="fast")
    wrong = [*truth[:5], (truth[5] + 1) % VOCAB, *truth[6:]]
    out = SpeculativeDecoder(target, None, config).generate({"input_ids": ids}, drafted=wrong)
    assert out.tokens == truth
    assert (out.prefill_drafted, out.prefill_accepted) == (15, 5)


def test_rows_behind_the_prompt_touch_nothing(seed: int) -> None:
    target = LlamaTarget(family("qwen2", seed), 128)
    rows = torch.randn(64, 64)
    kept = []
    for padding in (0.0, 1e3):
        rows[40:] = padding * torch.randn(24, 64)
        caches = target._storage(target.cache)
        hidden = target.decoder.prefill(rows, caches)
        kept.append([hidden[:40], *(t[:, :, :40].clone() for pair in caches for t in pair)])
    assert all(map(torch.equal, *kept))


def test_flash_attention_contract(seed: int, monkeypatch) -> None:
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append((q.shape, k.shape, v.shape))
        assert dropout_p == 0.0
        assert causal
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=softmax_scale,
            enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert flash_attention() is None
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)

    model, ids = family("llama", seed), prompt(seed)
    target = LlamaTarget(model, 128)
    assert target.decoder._flash is None, "flash-attn has no CPU kernel"
    target.decoder._flash = flash_attention()
    assert decode(target, ids, 1) == reference(model, ids, NEW)
    assert calls == [((1, 64, 4, 16), (1, 64, 2, 16), (1, 64, 2, 16))] * 2


class Calls(TorchDispatchMode):
    """Counts operators, as seen from outside of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_our_ops_and_nothing_else(seed: int) -> None:
    target = LlamaTarget(family("llama", seed), 64)
    target.prefill({"input_ids": prompt(seed)})
    tree = DraftTree.chain(3, [4, 5])
    target.forward(tree)
    at = target._rounds.place([tree], [20])
    with torch.inference_mode(), Calls() as calls:
        target.decoder.score(target.decoder.step(at, target._caches), at)
    ours = {name.split(".")[1]: n for name, n in calls.seen.items() if name.startswith("xspec.")}
    layers = target.num_layers
    assert ours == {
        "embed": 1,
        "norm_act": 1,
        "skinny_linear": 4 * layers,
        "rope_append": layers,
        "tree_attention": layers,
        "lm_head_argmax": 1,
    }
    others = {name for name in calls.seen if not name.startswith("xspec.")}
    assert others <= {"aten.view.default", "aten.slice.Tensor"}


@pytest.mark.interpreter
def test_a_layer_is_seven_launches(seed: int, monkeypatch) -> None:
    launched: list[str] = []

    def count(kernel, *arguments, **options):
        launched.append(kernel.fn.__name__)
        return triton_launch(kernel, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("xspec_kernels.kernels.") and hasattr(module, "launch"):
            triton_launch = module.launch
            monkeypatch.setattr(module, "launch", count)
    target = LlamaTarget(triton_model(), 48, "triton")
    target.prefill({"input_ids": prompt(seed, 5)})
    at = target._rounds.place([DraftTree.chain(3, [4])], [5])
    launched.clear()
    with torch.inference_mode():
        target.decoder.score(target.decoder.step(at, target._caches), at)
    layer = [
        "_skinny_linear_kernel", "_rope_append_kernel", "_partials_kernel", "_merge_kernel",
        *3 * ["_skinny_linear_kernel"],
    ]  # fmt: skip
    assert launched == [
        "_embed_kernel", "_row_squares_kernel", *target.num_layers * layer, "_norm_act_kernel",
        "_lm_head_tiles_kernel", "_lm_head_join_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama_bias"])
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_from_files(name: str, size: str, seed: int, tmp_path) -> None:
    model, ids = family(name, seed), prompt(seed)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "60KB")
    target = LlamaTarget.from_pretrained(tmp_path, 128)
    assert decode(target, ids, 1) == reference(model, ids, NEW)
    half = LlamaTarget.from_pretrained(tmp_path, 128, dtype=torch.bfloat16)
    assert half.cache.capacity == 128
    assert half.dtype == half.decoder.weights.layers[0].qkv.dtype == torch.bfloat16


def test_text_of_a_vision_model_from_files(pair: MiniPair, tmp_path) -> None:
    model = mini.load("target")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([pair.tokenizer.encode("What happens?")])
    target = LlamaTarget.from_pretrained(tmp_path, 64)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert decode(target, ids, 1, new=8) == expected[0, ids.shape[1] :].tolist()
    with pytest.raises(ValueError, match="no use for pixel_values_videos"):
        target.prefill({"input_ids": ids, "pixel_values_videos": torch.zeros(1)})


def test_shared_weights(seed: int) -> None:
    model, ids = family("qwen2", seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 128, share_weights=True)
    attention = model.model.layers[1].self_attn
    fused = target.decoder.weights.layers[1].qkv
    assert attention.q_proj.weight.data_ptr() == fused.data_ptr()
    assert decode(target, ids, 1) == truth == reference(model, ids, NEW)


REFUSED = {
    "model_type 'gpt2'": {"model_type": "gpt2"},
    "rope_type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "mlp_bias": {"mlp_bias": True},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "multiples of 64": {"intermediate_size": 100},
    "names no model_type": {"model_type": None},
    "weight model.embed_tokens.weight is [128, 64]": {"vocab_size": 130},
    "weight model.layers.2.self_attn.q_proj.weight is missing": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_configurations(message: str, seed: int, tmp_path) -> None:
    family("llama", seed).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | REFUSED[message]
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError) as error:
        LlamaTarget.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_refused_models() -> None:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="full attention in every layer"):
        LlamaTarget(MistralForCausalLM(config))
    with pytest.raises(ValueError, match="float64"):
        LlamaTarget(family("llama").double())
    with pytest.raises(ValueError, match="max_depth must be 32 or 64, got 33"):
        LlamaTarget(family("llama"), max_depth=33)


def test_damaged_files(seed: int, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LlamaTarget.from_pretrained(tmp_path)
    family("llama", seed).save_pretrained(tmp_path)
    whole, index = (tmp_path / f"model.safetensors{end}" for end in ("", ".index.json"))
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="not a readable safetensors file"):
        LlamaTarget.from_pretrained(tmp_path)
    whole.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="safetensors weights not found"):
        LlamaTarget.from_pretrained(tmp_path)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "a file beside it"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            LlamaTarget.from_pretrained(tmp_path)


def test_bad_inputs(seed: int) -> None:
    target, ids = LlamaTarget(family("llama", seed), 40), prompt(seed)
    masked = torch.ones_like(ids)
    masked[0, 0] = 0
    for inputs, message in (
        ({"input_ids": ids[0]}, r"\[1, length\]"),
        ({"input_ids": ids + VOCAB}, "input_ids must be in 0..127"),
        ({"input_ids": ids, "attention_mask": masked}, "attention_mask hides rows"),
        ({"input_ids": ids, "position_ids": ids * 0}, "position_ids must be 0..19"),
        ({"input_ids": ids, "inputs_embeds": masked}, "no use for inputs_embeds"),
        ({"input_ids": ids, "pixel_values": masked}, "no get_image_features"),
    ):
        with pytest.raises(ValueError, match=message):
            target.prefill(inputs)
    target.prefill({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with pytest.raises(RuntimeError, match="KV cache is full"):
        target.forward(DraftTree.chain(1, [2] * 20))


def test_deep_trees(seed: int) -> None:
    model, ids = family("llama", seed), prompt(seed)
    truth = reference(model, ids, 70)
    deep = DraftTree.chain(truth[0], truth[1:41])
    shallow = LlamaTarget(model, 128)
    shallow.prefill({"input_ids": ids})
    with pytest.raises(ValueError, match=r"40 deep, expected at most 31.*max_depth=64"):
        shallow.forward(deep)
    target = LlamaTarget(model, 128, max_depth=64)
    target.prefill({"input_ids": ids})
    verdict = target.accept(deep, target.forward(deep), truth[:1])
    assert verdict.tokens == truth[1:42]


def test_inert_rows_are_never_accepted(seed: int) -> None:
    target = LlamaTarget(tiny_llama(seed), 64)
    target.prefill({"input_ids": prompt(seed)})
    at = target._rounds.place([DraftTree.root(3)], [20], height=4)
    # An inert row holds token 0 below the root, which is what this target wants.
    ids, flags = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int32)
    assert target._rounds.decide(at, ids, flags, target._caches)[0].tokens == [0]


@pytest.mark.parametrize("rows", [1, 6])
def test_nan_is_an_error(rows: int, seed: int) -> None:
    target = LlamaTarget(tiny_llama(seed), 64)
    target.prefill({"input_ids": prompt(seed)})
    target.decoder.weights.norm[3] = torch.nan
    tree = DraftTree.chain(3, [4] * (rows - 1))
    with pytest.raises(RuntimeError, match="logits are NaN"):
        target.accept(tree, target.forward(tree), [3])
    with pytest.raises(RuntimeError, match="logits are NaN"):
        target.prefill({"input_ids": prompt(seed)})


def triton_model() -> PreTrainedModel:
    """Two layers whose heads have a size that the kernels take."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.25, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.interpreter
def test_triton_end_to_end(rng: random.Random) -> None:
    model = triton_model()
    ids = prompt(rng.randrange(1 << 30), 5)
    target = LlamaTarget(model, 48, "triton")
    plain = Plain(target, ids, 4)
    assert plain.tokens == decode(LlamaTarget(model, 48, "torch"), ids, 1, new=5)
    assert differences(target, ids, plain, rng) == []


@pytest.mark.interpreter
def test_triton_wants_its_head_sizes() -> None:
    with pytest.raises(ValueError, match="heads of 16"):
        LlamaTarget(tiny_llama(0), 64, "triton")
    assert llama.HEAD_DIMS == (32, 64, 128, 256)
