"""Hidden-state adapters: published sizes, what they read, and published checkpoints."""

from __future__ import annotations

import pytest
import torch

from xspec_runtime.adapters.eagle import EagleConfig, EagleFusion
from xspec_runtime.adapters.hidden import (
    LEVELS,
    READS_DRAFT,
    READS_TARGET,
    HiddenAdapter,
    HiddenAdapterConfig,
)
from xspec_runtime.adapters.published import TYPES, read_published
from xspec_runtime.adapters.token_adapter import TokenAdapter, TokenAdapterConfig

# Parameters of the published checkpoints.
PUBLISHED = {
    "L1": 2_113_537,
    "L2": 6_324_227,
    "L3": 25_188_355,
    "L4": 100_714_497,
    "L5": 102_819_841,
    "B1": 102_819_841,
    "L5F": 169_936_897,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(level: str, **values) -> HiddenAdapter:
    sizes = {"width": 32, "draft_width": 32, "bottleneck": 8, "wide": 16, "intermediate": 24}
    adapter = HiddenAdapter(HiddenAdapterConfig(level, **(sizes | values)))
    return adapter.eval().requires_grad_(False)


def states(level: str, batch: int = 2, length: int = 5, draft_width: int = 32) -> dict:
    out = {}
    if level in READS_DRAFT:
        out["draft"] = torch.randn(batch, length, draft_width)
    if level in READS_TARGET:
        out["target"] = torch.randn(batch, length, 32)
    return out


@pytest.mark.parametrize("level", LEVELS)
def test_published_sizes(level):
    with torch.device("meta"):
        assert count(HiddenAdapter(HiddenAdapterConfig(level))) == PUBLISHED[level]


def test_published_sizes_of_the_others():
    with torch.device("meta"):
        # The documents say 16.8 M of L3, which is that of two blocks.
        assert count(HiddenAdapter(HiddenAdapterConfig("L3", blocks=2))) == 16_797_698
        assert count(TokenAdapter(TokenAdapterConfig())) == 45_486_346
        assert count(TokenAdapter(TokenAdapterConfig(32000))) == 45_476_096
        # The published EAGLE network has no table of positions.
        one = EagleFusion(EagleConfig(layers=1))
        assert count(one) - count(one.position) == pytest.approx(189e6, rel=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_shapes_and_start(level, seed):
    adapter = small(level)
    read = states(level)
    out = adapter(**read)
    assert out.shape == (2, 5, 32) and out.isfinite().all()
    if level in ("L1", "L2"):
        # What goes up starts at zero: a state passes, normalized.
        assert torch.allclose(out, torch.nn.functional.layer_norm(read["draft"], (32,)), atol=1e-5)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "L4"])
def test_no_state_looks_ahead(level, seed):
    adapter = small(level)
    read = states(level)
    before = adapter(**read)
    for value in read.values():
        value[:, 3:] = torch.randn(2, 2, 32)
    assert torch.equal(adapter(**read)[:, :3], before[:, :3])


def test_l4_looks_ahead_but_not_at_padding(seed):
    adapter = small("L4")
    draft = torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    before = adapter(draft, mask=mask)
    changed = draft.clone()
    changed[0, 3:] = 7.0
    assert torch.equal(adapter(changed, mask=mask)[0, :3], before[0, :3])
    changed[1, 4] = 7.0
    assert not torch.equal(adapter(changed, mask=mask)[1, :3], before[1, :3])


def test_drafts_of_another_width(seed):
    adapter = small("L5F", draft_width=20)
    assert adapter(**states("L5F", draft_width=20)).shape == (2, 5, 32)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_eagle_fusion_of_any_depth(layers, seed):
    config = EagleConfig(50, 32, 16, 24, layers, 4, positions=8, dropout=0.0)
    network = EagleFusion(config).eval()
    tokens, draft = torch.randint(0, 50, (2, 6)), torch.randn(2, 6, 24)
    before = network(tokens, draft)
    assert before.shape == (2, 6, 50)
    tokens[:, 4:], draft[:, 4:] = 1, 0.0
    assert torch.equal(network(tokens, draft)[:, :4], before[:, :4])
    assert not torch.equal(network(tokens, torch.zeros_like(draft))[:, :4], before[:, :4])


def test_bad_input(seed):
    with pytest.raises(ValueError, match="level must be one of L1, "):
        HiddenAdapterConfig("L9")
    with pytest.raises(ValueError, match="multiple of 7 heads"):
        HiddenAdapterConfig(heads=7)
    with pytest.raises(ValueError, match="bottleneck must be an int"):
        HiddenAdapterConfig(bottleneck=0)
    with pytest.raises(ValueError, match="B1 needs target states"):
        small("B1")()
    with pytest.raises(ValueError, match="L4 does not read target states"):
        small("L4")(torch.randn(1, 2, 32), torch.randn(1, 2, 32))
    with pytest.raises(ValueError, match=r"draft states must be \[B, S, 32\], got \[1, 2, 31\]"):
        small("L1")(torch.randn(1, 2, 31))
    with pytest.raises(ValueError, match="at most 4 states"):
        small("L5", positions=4)(torch.randn(1, 5, 32))
    with pytest.raises(ValueError, match="draft states must be"):
        EagleFusion(EagleConfig(50, 32, 16, 24, 1, 4))(
            torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, 24)
        )


def save_published(adapter: HiddenAdapter, path, kind: str) -> None:
    config = adapter.config
    torch.save(
        {
            "model_state_dict": {f"net.{k}": v for k, v in adapter.state_dict().items()},
            "adapter_type": kind,
            "config": {
                "hidden_dim": config.width,
                "bottleneck_dim": config.bottleneck,
                "num_blocks": config.blocks,
                "num_heads": config.heads,
                "ffn_dim": config.intermediate,
            },
            "epoch": 3,
        },
        path,
    )


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_published_checkpoints(kind, tmp_path, seed):
    level = TYPES[kind]
    adapter = small(level, wide=1024, positions=512)
    folder = tmp_path / ("B1" if level == "B1" else level)
    folder.mkdir()
    save_published(adapter, folder / "best_model.pt", kind)
    again = read_published(folder / "best_model.pt")
    assert again.config.level == level
    read = states(level)
    assert torch.equal(again(**read), adapter(**read))


def test_published_token_adapter(tmp_path, seed):
    adapter = TokenAdapter(TokenAdapterConfig(60, 32, 2, 8, 48, positions=16))
    adapter.eval().requires_grad_(False)
    state = {"token_embedding." + k: v for k, v in adapter.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 1, "val_acc": 0.2}, tmp_path / "t.pt")
    again = read_published(tmp_path / "t.pt")
    assert again.config.layers == 2 and again.config.positions == 16
    ids = torch.randint(0, 60, (2, 7))
    assert torch.equal(again(ids), adapter(ids))


def test_b1_is_told_by_its_folder(tmp_path, seed):
    (tmp_path / "B1_20260206").mkdir()
    path = tmp_path / "B1_20260206" / "best_model.pt"
    save_published(small("L5", positions=512), path, "L5_EAGLE")
    assert read_published(path).config.level == "B1"


def test_refused_checkpoints(tmp_path, seed):
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": {"a": torch.ones(2)}, "adapter_type": "L9"}, path)
    with pytest.raises(ValueError, match="adapter_type must be one of"):
        read_published(path)
    save_published(small("L4"), path, "L2_MultiLayerBottleneck")
    with pytest.raises(ValueError, match="tensors with"):
        read_published(path)

    class HiddenAdapterConfig:
        pass

    HiddenAdapterConfig.__qualname__ = "HiddenAdapterConfig"
    globals()["HiddenAdapterConfig"], kept = HiddenAdapterConfig, globals()["HiddenAdapterConfig"]
    HiddenAdapterConfig.__module__ = __name__
    torch.save({"model_state_dict": {}, "config": HiddenAdapterConfig()}, path)
    globals()["HiddenAdapterConfig"] = kept
    with pytest.raises(ValueError, match="configuration as a pickled class"):
        read_published(path)
    path.write_bytes(b"junk")
    with pytest.raises(RuntimeError, match="no file of tensors"):
        read_published(path)
    with pytest.raises(FileNotFoundError, match="checkpoint not found"):
        read_published(tmp_path / "absent.pt")
