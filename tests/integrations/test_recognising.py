"""Which modules are known by their structure, and what is said of those that look alike."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks.integration_peers import TokenPackerProjector
from llava_st_ops.integrations import (
    accelerate_llava_st,
    accelerate_oryx,
    accelerate_token_packer,
    accelerate_vision_sampler,
)
from llava_st_ops.ops.checks import MAX_HEAD_DIM
from tests.integrations.families import FAMILIES, make


def no_layer(module):
    del module.token_packer.devide_attention.ln_k


def one_more_layer(module):
    module.token_packer.devide_attention.gate = nn.Linear(2, 2)


def approximate_gelu(module):
    module.token_packer.devide_attention.to_v[1] = nn.GELU("tanh")


def no_bias(module):
    module.token_packer.devide_attention.to_k[2] = nn.Linear(32, 32, bias=False)


def no_shift(module):
    module.token_packer.devide_attention.ln_v = nn.LayerNorm(32, bias=False)


def other_width(module):
    module.token_packer.devide_attention.ln_v = nn.LayerNorm(16)


def batch_first(module):
    module.token_packer.devide_attention.attn = nn.MultiheadAttention(32, 4, batch_first=True)


def bias_as_a_key(module):
    module.token_packer.devide_attention.attn = nn.MultiheadAttention(32, 4, add_bias_kv=True)


def own_attention(module):
    class Attention(nn.MultiheadAttention):
        pass

    module.token_packer.devide_attention.attn = Attention(32, 4)


def other_forward(module):
    module.token_packer.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_layer, "devide_attention lacks ln_k"),
        (one_more_layer, "it has more than is known of it: gate"),
        (approximate_gelu, "value_mlp: its GELU is approximate, 'tanh'"),
        (no_bias, "key_mlp has no bias"),
        (no_shift, "value_norm is not a plain LayerNorm with scale and shift, but LayerNorm"),
        (other_width, r"value_mlp and value_norm are \(32, 32, 32, 16\) wide, the attention 32"),
        (batch_first, "attention is batch_first"),
        (bias_as_a_key, "attention has .* a bias as a key"),
        (own_attention, "attention is not a plain MultiheadAttention, but Attention"),
        (other_forward, "another forward was set on it"),
    ],
)
def test_near_misses_of_llava_st(change, reason):
    module = make(FAMILIES["llava_st"])
    change(module)
    report = accelerate_llava_st(module)
    assert [entry.name for entry in report.replaced] == ["token_packer_slow", "token_packer_fast"]
    (entry,) = report.skipped
    assert entry.name == "token_packer"
    assert re.match(reason, entry.text), entry.text


class Renamed(nn.Module):
    """A projector with layers by other names."""

    def __init__(self, names):
        super().__init__()
        projector = TokenPackerProjector(24, 64, 32, 4, 40, 2)
        for (_, layer), name in zip(projector.named_children(), names, strict=True):
            self.add_module(name, layer)
        self.scale_factor = 2


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj", "ln_q", "ln_k", "ln_v", "attention", "mlp"),
        ("to_q", "to_k", "to_v", "norm_q_1", "norm_k_1", "norm_v_1", "attn", "to_llm"),
        ("query_proj", "key_proj", "value_proj", "query_norm", "key_norm", "value_norm", "mha", "out"),
    ],
)
def test_layers_of_token_packer_are_known_by_role(names):
    assert len(accelerate_token_packer(Renamed(names)).replaced) == 1


def test_near_misses_of_token_packer():
    def skipped(change):
        module = TokenPackerProjector(24, 64, 32, 4, 40, 2)
        change(module)
        report = accelerate_token_packer(module)
        assert not report.replaced
        return report.skipped[0].text

    def forget_the_scale(module):
        del module.scale_factor

    def two_scales(module):
        module.logit_scale = 3

    def a_parameter(module):
        module.queries = nn.Parameter(torch.zeros(2))

    def no_mlp(module):
        del module.mlp

    def another_query(module):
        module.q_proj = nn.Conv1d(24, 32, 1)

    assert "pass scale=" in skipped(forget_the_scale)
    assert "pass scale=" in skipped(two_scales)
    assert skipped(a_parameter) == "it has more than is known of it: queries"
    assert skipped(no_mlp) == "no MLP follows its attention"
    assert skipped(another_query) == "queries are not made by linear layers, but by Conv1d"

    module = TokenPackerProjector(24, 64, 32, 4, 40, 2)
    del module.scale_factor
    assert len(accelerate_token_packer(module, scale=2).replaced) == 1
    with pytest.raises(ValueError, match="scale must be a positive integer, got 0"):
        accelerate_token_packer(module, scale=0)


def test_near_misses_of_oryx():
    def skipped(change, width=48):
        module = nn.Module()
        module.vlm_query_projector, module.vlm_key_projector = nn.Linear(width, 16), nn.Linear(width, 16)
        change(module)
        report = accelerate_oryx(module)
        assert not report.replaced
        return report.skipped[0].text

    def normalise(module):
        module.norm = nn.LayerNorm(48)

    def add_layers(module):
        module.vlm_key_projector = nn.Sequential(nn.Linear(48, 16), nn.GELU())

    def widen(module):
        module.vlm_key_projector = nn.Linear(48, 32)

    assert skipped(normalise) == "it has more than is known of it: norm"
    assert skipped(add_layers) == "vlm_key_projector is not a plain Linear, but Sequential"
    assert skipped(widen) == "its projections differ in size, [16, 48] and [32, 48]"
    width = MAX_HEAD_DIM + 1
    assert skipped(lambda module: None, width) == f"features have {width} channels, more than {MAX_HEAD_DIM}"


def test_near_misses_of_the_vision_sampler():
    def skipped(change):
        module = make(FAMILIES["vision_sampler"])
        change(module.cross_attn)
        report = accelerate_vision_sampler(module)
        assert not report.replaced
        return report.skipped[0].text

    def forget_the_heads(attention):
        del attention.num_heads

    def forget_a_tower(attention):
        del attention.k_proj_1

    def gate(attention):
        attention.gate = nn.Linear(2, 2)

    def other_eps(attention):
        attention.v_proj_1[0].eps = 1.0

    def no_shift(attention):
        attention.v_proj_2[0] = nn.LayerNorm(16, bias=False)

    def longer(attention):
        attention.k_proj_0.append(nn.GELU())

    assert skipped(forget_the_heads) == "it has no attribute num_heads"
    assert skipped(forget_a_tower) == "it lacks, or has beyond what is known of it: k_proj_1, k_proj_2, v_proj_2"
    assert skipped(gate) == "it lacks, or has beyond what is known of it: gate"
    assert skipped(other_eps) == "k_proj_1 and its values differ in eps or in size"
    assert skipped(no_shift).startswith("v_proj_2[0] is not a plain LayerNorm with scale and shift")
    assert skipped(longer) == "k_proj_0 is not a plain Sequential of LayerNorm and Linear"


def test_attentions_of_language_models_are_no_near_misses():
    attention = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, nn.Linear(8, 8))
    for accelerate in (
        accelerate_llava_st,
        accelerate_oryx,
        accelerate_token_packer,
        accelerate_vision_sampler,
    ):
        report = accelerate(nn.ModuleDict({"attention": attention, "mha": nn.MultiheadAttention(8, 2)}))
        assert not report.replaced
        assert not report.skipped


def test_scripted_modules_are_left_alone():
    module = nn.Module()
    module.vlm_query_projector, module.vlm_key_projector = nn.Linear(8, 4), nn.Linear(8, 4)
    report = accelerate_oryx(nn.ModuleList([torch.jit.script(module)]))
    assert not report.replaced
    assert not report.skipped
