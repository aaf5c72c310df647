"""Folded matrices are those of the parameters as they are now, and what cannot be folded runs direct."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from llava_st_ops.nn import PointToRegionPacker
from tests.nn.tokenizers import (
    EMBED,
    VISION,
    WIDTH,
    assert_up_to_date,
    directly,
    edit_in_place,
    features_of,
    make,
    outputs,
)

# Matrices that are kept ----------------------------------------------------------------------------------------------


def optimizer_step(tokenizer):
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=0.1)
    sum(stream.square().sum() for stream in tokenizer(features_of(1, 5, 9, 9))).backward()
    optimizer.step()


def fused_optimizer_step(tokenizer):
    """Which raises no version."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=0.1, fused=True)
    for parameter in tokenizer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def change_eps(tokenizer):
    for norm in (tokenizer.packer.slow.key_norm, tokenizer.packer.slow.value_norm):
        norm.eps = 3.0


def load_other_weights(tokenizer):
    tokenizer.load_state_dict({name: value + 0.1 for name, value in tokenizer.state_dict().items()})


@torch.no_grad()
def edit_a_table(tokenizer):
    tokenizer.lape.temporal_output.mul_(3)


@torch.no_grad()
def edit_the_slow_packer(tokenizer):
    tokenizer.packer.slow.in_proj_weight.mul_(2)


def replace_a_parameter(tokenizer):
    weight = tokenizer.projector[2].weight
    tokenizer.projector[2].weight = nn.Parameter(weight.detach() * 2)


def round_the_packer(tokenizer):
    tokenizer.packer.half().double()


def round_a_layer(tokenizer):
    """Its memory may be that of the old weight again."""
    tokenizer.packer.spatial.key_mlp[0].half().double()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_optimizer_step,
        change_eps,
        load_other_weights,
        edit_in_place,
        edit_a_table,
        edit_the_slow_packer,
        replace_a_parameter,
        round_the_packer,
        round_a_layer,
    ],
)
def test_changes_are_seen(change):
    tokenizer = make()
    before = outputs(tokenizer)
    change(tokenizer)
    assert not torch.equal(outputs(tokenizer), before)
    assert_up_to_date(tokenizer)


def test_matrices_are_computed_once():
    tokenizer = make()
    outputs(tokenizer)
    with torch.no_grad():
        kept = tokenizer._path()
        assert tokenizer._path().spatial is kept.spatial
        assert tokenizer._path().slow is kept.slow
        with torch.autocast("cpu", torch.bfloat16):
            assert tokenizer._path().spatial is not kept.spatial


def test_writes_through_data_need_refresh():
    for weight in ("packer.spatial.value_mlp.2.weight", "packer.fast.in_proj_weight", "projector.2.bias"):
        tokenizer = make()
        before = outputs(tokenizer)
        tokenizer.get_parameter(weight).data.mul_(2)
        tokenizer.refresh()
        assert not torch.equal(outputs(tokenizer), before)
        assert_up_to_date(tokenizer)


def test_inference_mode_before_training():
    """What is kept from inference mode must not reach autograd."""
    tokenizer = make()
    with torch.inference_mode():
        tokenizer(features_of(1, 5, 9, 9))
    tokenizer.packer.requires_grad_(False)
    tokenizer.projector.requires_grad_(False)
    features = features_of(1, 5, 9, 9).requires_grad_()
    sum(stream.sum() for stream in tokenizer(features)).backward()
    tokenizer.lape.requires_grad_(False)
    sum(stream.sum() for stream in tokenizer(features)).backward()
    assert features.grad.any()


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        tokenizer = make()
        assert_up_to_date(tokenizer)
        tokenizer.packer.spatial.out_proj.bias += 1
        assert_up_to_date(tokenizer)


def test_copies():
    tokenizer = make()
    before = outputs(tokenizer)
    saved = io.BytesIO()
    torch.save(tokenizer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(outputs(other), before)
        edit_in_place(other)
        assert_up_to_date(other)
    assert torch.equal(outputs(tokenizer), before)


def test_one_state_dict():
    folded, direct = make(execution="folded"), make(execution="direct")
    outputs(folded)
    assert folded.state_dict().keys() == direct.state_dict().keys()
    direct.load_state_dict(folded.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(folded.state_dict().values(), direct.state_dict().values(), strict=True)
    )


# Where it cannot be folded -------------------------------------------------------------------------------------------


class Adapter(nn.Linear):
    """As adapters do, a subclass of the layer that adds something."""

    def forward(self, x):
        return super().forward(x) + 1


def adapt(layer: nn.Linear) -> Adapter:
    adapter = Adapter(layer.in_features, layer.out_features).to(layer.weight.dtype)
    adapter.load_state_dict(layer.state_dict())
    return adapter


def adapt_the_projector(tokenizer):
    tokenizer.projector[2] = adapt(tokenizer.projector[2])


def adapt_a_packer(tokenizer):
    tokenizer.packer.slow.value_mlp[0] = adapt(tokenizer.packer.slow.value_mlp[0])


def adapt_an_output(tokenizer):
    tokenizer.packer.fast.out_proj = adapt(tokenizer.packer.fast.out_proj)


def approximate_the_gelu(tokenizer):
    tokenizer.projector[1] = nn.GELU("tanh")


def add_a_hook(tokenizer):
    tokenizer.packer.spatial.key_norm.register_forward_hook(lambda module, inputs, output: output * 2)


def parametrize(tokenizer):
    nn.utils.parametrizations.weight_norm(tokenizer.projector[0])


def another_projector(tokenizer):
    tokenizer.projector = nn.Linear(VISION, WIDTH).double()


def differing_eps(tokenizer):
    tokenizer.packer.spatial.value_norm.eps = 0.1


def replace_a_forward(tokenizer):
    layer = tokenizer.projector[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) * 2


def hook_a_packer(tokenizer):
    tokenizer.packer.fast.register_forward_hook(lambda module, inputs, output: output + 1)


def give_the_output_a_bias(tokenizer):
    tokenizer.packer.slow.output = nn.Linear(EMBED, WIDTH).double()


def take_a_bias(tokenizer):
    tokenizer.packer.slow.key_norm = nn.LayerNorm(EMBED, bias=False).double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_a_forward, "projector: not a Sequential|projector: a layer is not a plain Linear"),
        (hook_a_packer, "packer.fast is not a plain PointToRegionPacker"),
        (give_the_output_a_bias, "packer.slow.output has a bias"),
        (take_a_bias, "packer.slow.key_norm has no bias"),
        (adapt_the_projector, "projector: a layer is not a plain Linear, but .*Adapter"),
        (adapt_a_packer, "packer.slow.value_mlp: a layer is not a plain Linear, but .*Adapter"),
        (adapt_an_output, "packer.fast.out_proj is not a plain Linear, but .*Adapter"),
        (approximate_the_gelu, "projector: its GELU is approximate, 'tanh'"),
        (add_a_hook, "packer.spatial.key_norm is not a plain LayerNorm"),
        (parametrize, "projector: a layer is not a plain Linear, but .*ParametrizedLinear"),
        (another_projector, "projector: not a Sequential of Linear, GELU and Linear, but Linear"),
        (differing_eps, "packer.spatial.key_norm and value_norm differ in eps"),
    ],
)
def test_what_is_not_plain_runs_direct(change, reason):
    tokenizer = make()
    outputs(tokenizer)
    change(tokenizer)
    with pytest.warns(UserWarning, match=f"VisualTokenizer runs direct, not folded: {reason}"):
        found = outputs(tokenizer)
    assert torch.equal(found, directly(tokenizer))
    with pytest.raises(ValueError, match=f"cannot freeze: {reason}"):
        tokenizer.freeze()


def test_a_packer_alone_runs_direct_where_it_must():
    packer = make().packer.spatial
    packer.execution = "folded"
    packer.query_mlp[0] = adapt(packer.query_mlp[0])
    with pytest.warns(UserWarning, match="PointToRegionPacker runs direct, not folded: query_mlp"):
        packer(torch.randn(1, 1, 3, 3, WIDTH, dtype=torch.float64))


def test_executions_are_checked():
    with pytest.raises(ValueError, match="execution must be 'direct' or 'folded', got 'fast'"):
        make(execution="fast")
    with pytest.raises(ValueError, match="execution must be"):
        make().packer.execution = "Folded"
    with pytest.raises(ValueError, match="execution must be"):
        PointToRegionPacker(8, 16, 2, (1, 3, 3), execution="")
    with pytest.raises(ValueError, match="chunk_tokens must not be negative"):
        make(chunk_tokens=-1)
    with pytest.raises(ValueError, match=r"features must have 5 dimensions .*, got shape \[9, 12\]"):
        make()(features_of(9))
