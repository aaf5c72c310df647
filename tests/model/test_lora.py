"""Stages of training that left adapters: what is merged, and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llava_st import LlavaStForConditionalGeneration
from llava_st.checkpoints.lora import Adapted, GrownRows
from llava_st.checkpoints.reading import CheckpointError, open_folder
from llava_st.convert import from_published, main
from torch import Tensor

from .published_layout import (
    SMALL,
    TABLES,
    VISUAL_TOKENS,
    published_tensors,
    write_checkpoint,
    write_stage,
    write_weights,
)

LINEAR = [
    f"model.layers.{i}.{name}_proj.weight"
    for i in range(SMALL.layers)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
EMBEDDING = "model.embed_tokens.weight"
RANK, ALPHA = 4, 8


def random_adapters(seed: int, targets: list[str] = LINEAR) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in published_tensors(SMALL, "released").items()}
    return {
        name: (
            torch.randn(RANK, shapes[name][1], generator=generator).bfloat16(),
            torch.randn(shapes[name][0], RANK, generator=generator).bfloat16(),
        )
        for name in targets
    }


def trained_with(seed: int) -> dict[str, Tensor]:
    """What a stage trains besides adapters: the embedding, the packers and the tables."""
    tensors = published_tensors(SMALL, "released")
    trained = {n: x for n, x in tensors.items() if "vision_resampler" in n or n in (*TABLES, EMBEDDING)}
    return {
        name: x if "token_packer_fast" in name or name == EMBEDDING else torch.roll(x.flatten(), seed).view_as(x)
        for name, x in trained.items()
    }


@pytest.fixture
def stages(tmp_path) -> tuple[Path, Path, Path]:
    base = write_checkpoint(
        tmp_path / "stage1", published_tensors(SMALL, "released", lape=False), added=VISUAL_TOKENS, shards=2
    )
    second = write_stage(tmp_path / "stage2", random_adapters(2), trained_with(2), alpha=ALPHA)
    third = write_stage(tmp_path / "stage3", random_adapters(3), trained_with(3), alpha=ALPHA, pickled=False)
    return base, second, third


def test_stages_are_merged_in_their_order(stages, tmp_path):
    base, second, third = stages
    conversion = from_published(base, [second, third], allow_pickle=True)
    assert conversion.config.compat == "released"
    assert conversion.config.lape
    before = published_tensors(SMALL, "released", lape=False)
    for name in LINEAR:
        # Rounded after each stage: the next one was trained on top of that.
        expected = before[name]
        for seed in (2, 3):
            a, b = random_adapters(seed)[name]
            expected = (expected.double() + ALPHA / RANK * (b.double() @ a.double())).bfloat16()
        difference = (conversion.tensors.read(name).double() - expected.double()).abs()
        # A sum may fall to the other side of a rounding, in float32 and float64.
        assert (difference <= 2**-7 * expected.double().abs()).all()
        assert (difference == 0).float().mean() > 0.99
    for name, tensor in trained_with(3).items():
        assert torch.equal(conversion.tensors.read(name), tensor), name
    for name in before.keys() - set(LINEAR) - trained_with(3).keys() - {"lm_head.weight"}:
        assert torch.equal(conversion.tensors.read(name), before[name]), name


def test_the_heads_new_rows_are_the_mean_of_those_before(stages):
    base, second, third = stages
    conversion = from_published(base, [second, third], allow_pickle=True)
    head = published_tensors(SMALL, "released", lape=False)["lm_head.weight"]
    got = conversion.tensors.read("lm_head.weight")
    assert torch.equal(got[:-6], head)
    assert torch.equal(got[-6:], head.double().mean(0, keepdim=True).bfloat16().expand(6, -1))
    assert torch.equal(conversion.tensors.rows("lm_head.weight", [0, len(head), 3]), got[[0, len(head), 3]])
    assert "rows added: 6" in conversion.report


def test_merged_stages_are_a_checkpoint_that_loads(stages, tmp_path, capsys):
    base, second, third = stages
    arguments = [str(base), str(tmp_path / "out"), "--allow-pickle", "--lora", str(second), "--lora", str(third)]
    assert main(arguments) == 0
    assert f"merged: {third}: {len(trained_with(3))} tensors replaced, {len(LINEAR)} adapted" in capsys.readouterr().out
    model, info = LlavaStForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.model.lape.width_output, trained_with(3)[TABLES[-1]])


def test_the_order_matters(stages):
    base, second, third = stages
    turned = from_published(base, [third, second], allow_pickle=True)
    for name, tensor in trained_with(2).items():
        assert torch.equal(turned.tensors.read(name), tensor), name


def test_adapters_are_pickles_too(stages, tmp_path, capsys):
    base, second, _ = stages
    assert main([str(base), str(tmp_path / "out"), "--lora", str(second)]) == 1
    assert "is a pickle" in capsys.readouterr().err


def test_other_tensors_take_the_dtype_of_the_base(tmp_path):
    write_weights(tmp_path, {EMBEDDING: torch.randn(9, 4).bfloat16()}, 1)
    wide = {EMBEDDING: torch.randn(9, 4), "model.new": torch.randn(3)}
    stage = write_stage(tmp_path / "stage", {}, wide)
    adapted = Adapted(open_folder(tmp_path), stage, allow_pickle=True)
    for name in wide:
        assert adapted.specs[name].dtype == torch.bfloat16
        assert torch.equal(adapted.read(name), wide[name].bfloat16())
    assert torch.equal(adapted.rows(EMBEDDING, [2, 2]), wide[EMBEDDING][[2, 2]].bfloat16())


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha": 3}, 0.75), ({"use_rslora": False}, 2.0)],
)
def test_adapters_are_scaled_by_alpha_over_rank(tmp_path, settings, scaling):
    write_weights(tmp_path, {EMBEDDING: torch.zeros(9, 4), "model.w.weight": torch.zeros(3, 4)}, 1)
    a, b = torch.randn(RANK, 4), torch.randn(3, RANK)
    stage = write_stage(tmp_path / "stage", {"model.w.weight": (a, b)}, {}, **{"alpha": ALPHA, **settings})
    adapted = Adapted(open_folder(tmp_path), stage, allow_pickle=True)
    torch.testing.assert_close(adapted.read("model.w.weight"), scaling * b @ a)
    assert torch.equal(adapted.rows("model.w.weight", [1]), adapted.read("model.w.weight")[[1]])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "use_dora is True; only False is supported"),
        ({"bias": "all"}, "bias is 'all'; only 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r >= 1"),
        ({"lora_alpha": None}, "lora_alpha, got 4 and None"),
        ({"r": 8}, r"lora_A.weight: expected shape \[8, 4\], got \[4, 4\]"),
    ],
)
def test_settings_that_mean_something_else_are_refused(tmp_path, settings, problem):
    write_weights(tmp_path, {EMBEDDING: torch.zeros(9, 4), "model.w.weight": torch.zeros(3, 4)}, 1)
    adapters = {"model.w.weight": (torch.randn(RANK, 4), torch.randn(3, RANK))}
    stage = write_stage(tmp_path / "stage", adapters, {}, **settings)
    with pytest.raises(CheckpointError, match=problem):
        Adapted(open_folder(tmp_path), stage, allow_pickle=True)


def test_a_stage_that_does_not_fit_is_refused(tmp_path):
    write_weights(tmp_path, {EMBEDDING: torch.zeros(9, 4), "model.w.weight": torch.zeros(3, 4)}, 1)
    base = open_folder(tmp_path)
    pair = (torch.randn(RANK, 4), torch.randn(3, RANK))

    def adapt(name: str, *contents: dict) -> None:
        Adapted(base, write_stage(tmp_path / name, *contents), allow_pickle=True)

    with pytest.raises(CheckpointError, match="adapts model.x.weight, of which the base has no matrix"):
        adapt("no-target", {"model.x.weight": pair}, {})
    with pytest.raises(CheckpointError, match=r"lora_B.weight: expected shape \[3, 4\], got \[2, 4\]"):
        adapt("rows", {"model.w.weight": (pair[0], pair[1][:2])}, {})
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING}: expected shape \[9, 4\], got \[8, 4\]"):
        adapt("other", {}, {EMBEDDING: torch.zeros(8, 4)})
    stage = write_stage(tmp_path / "half", {"model.w.weight": pair}, {})
    saved = torch.load(stage / "adapter_model.bin")
    torch.save(dict([saved.popitem()]), stage / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="model.w.weight: has a lora_B without its counterpart"):
        Adapted(base, stage, allow_pickle=True)
    torch.save({"base_model.model.w.bias": torch.ones(1)}, stage / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is not the A or B"):
        Adapted(base, stage, allow_pickle=True)
    torch.save({"w.lora_A.weight": torch.ones(1)}, stage / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="names that begin with 'base_model.model.'"):
        Adapted(base, stage, allow_pickle=True)
    (stage / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"expected non_lora_trainables.safetensors or non_lora_trainables.bin"):
        Adapted(base, stage, allow_pickle=True)
    (stage / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json: no such file"):
        Adapted(base, stage, allow_pickle=True)


def test_grown_rows_are_the_mean_of_many(tmp_path):
    """Summed in parts, and exactly: bfloat16 sums would be far off."""
    matrix = (torch.rand(10_000, 3) + 1).bfloat16()
    write_weights(tmp_path, {"x": matrix, "y": torch.ones(2)}, 1)
    grown = GrownRows(open_folder(tmp_path), ["x"], 2)
    assert grown.specs["x"].shape == (10_002, 3)
    assert torch.equal(grown.read("x")[-2:], matrix.double().mean(0, keepdim=True).bfloat16().expand(2, -1))
    assert torch.equal(grown.read("y"), torch.ones(2))


def test_a_full_model_needs_no_more_rows(tmp_path):
    """Adapters on a model that knows the template tokens."""
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"))
    stage = write_stage(tmp_path / "stage", random_adapters(5, LINEAR[:1]), trained_with(5), alpha=ALPHA)
    conversion = from_published(source, [stage], allow_pickle=True)
    assert "rows added" not in conversion.report
    assert json.loads((source / "config.json").read_text())["vocab_size"] == conversion.config.vocab_size
