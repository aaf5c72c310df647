"""The folded execution is the direct one, whatever the shapes and whatever happens to the parameters."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_memory
from llava_st_ops import use_backend
from llava_st_ops.nn import (
    LanguageAlignedPositionalEmbedding,
    PointToRegionPacker,
    SpatialTemporalPacker,
    VisualTokenizer,
)

VISION, WIDTH, EMBED, HEADS = 12, 24, 32, 4
NO_NOTICE = pytest.mark.filterwarnings("error:.*runs direct")


def make(dtype=torch.float64, lape=True, bias=True, std=0.3, factors=(3, 5, 3), **options) -> VisualTokenizer:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(VISION, WIDTH, bias=bias), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=bias))
    text_aligned, compat = options.pop("text_aligned", False), options.pop("compat", "paper")
    tables = LanguageAlignedPositionalEmbedding((12, 10, 11), WIDTH, text_aligned=text_aligned, compat=compat)
    packer = SpatialTemporalPacker(WIDTH, EMBED, HEADS, *factors)
    tokenizer = VisualTokenizer(projector, tables if lape else None, packer, **options).to(dtype)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=std)
    return tokenizer


def features_of(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, VISION, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(module, features, execution):
    """Both streams, and the gradients of features and parameters."""
    module.execution = execution
    features = features.clone().requires_grad_()
    leaves = [features, *(p for p in module.parameters() if p.requires_grad)]
    streams = module(features)
    loss = sum((stream * torch.linspace(-1, 1, stream.numel()).view_as(stream).cos()).sum() for stream in streams)
    return streams, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(module, features):
    (direct, grads), (folded, folded_grads) = (run(module, features, execution) for execution in ("direct", "folded"))
    for found, wanted in zip(folded, direct, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    scale = max(grad.abs().max() for grad in grads if grad is not None)
    names = ["features", *(name for name, p in module.named_parameters() if p.requires_grad)]
    for name, found, wanted in zip(names, folded_grads, grads, strict=True):
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            # Sums that cancel are compared with what they are sums of.
            size = max(wanted.abs().max(), 1e-3 * scale)
            assert (found - wanted).abs().max() <= 1e-12 * size, name


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 10, 9, 9), {}),
        ((1, 1, 9, 9), {}),  # a single frame
        ((1, 7, 8, 10), {}),  # partial regions everywhere
        ((1, 5, 9, 9), {"lape": False}),
        ((1, 5, 9, 9), {"bias": False}),
        ((1, 5, 9, 9), {"bias": False, "lape": False}),
        ((1, 6, 6, 9), {"text_aligned": True}),
        ((1, 5, 9, 9), {"compat": "released"}),  # in float64 there is nothing to round
        ((1, 8, 10, 7), {"factors": (2, 4, 2)}),  # centres between samples
        ((2, 13, 6, 6), {"chunk_tokens": 360}),  # two chunks and a rest
        ((2, 13, 6, 6), {"chunk_tokens": 1}),
        ((2, 13, 6, 6), {"chunk_tokens": 0}),
        ((2, 13, 6, 6), {"chunk_tokens": 360, "recompute": True}),
    ],
    ids=str,
)
@NO_NOTICE
def test_folded_is_direct(shape, options):
    assert_same(make(**options), features_of(*shape))


@NO_NOTICE
def test_folded_is_direct_with_a_frozen_projector():
    for recompute in (False, True):
        tokenizer = make(recompute=recompute)
        tokenizer.projector.requires_grad_(False)
        assert_same(tokenizer, features_of(1, 10, 9, 9))


@NO_NOTICE
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_gradients(backend):
    tokenizer, features = make(), features_of(1, 10, 9, 9)
    with torch.no_grad(), use_backend(backend):
        folded = tokenizer(features)
        tokenizer.execution = "direct"
        torch.testing.assert_close(folded, tokenizer(features), rtol=1e-12, atol=1e-12)


@NO_NOTICE
@pytest.mark.parametrize("shape", [(2, 7, 8, 9), (1, 1, 3, 3)])
def test_packers_alone(shape):
    packer = make().packer
    generator = torch.Generator().manual_seed(2)
    assert_same(packer, torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64))


def test_gradients_that_cancel_are_zero():
    """Where the direct execution has rounding errors, and None would break DistributedDataParallel."""
    tokenizer = make()
    run(tokenizer, features_of(1, 5, 9, 9), "folded")
    streams = tokenizer(features_of(1, 5, 9, 9))
    sum(stream.square().sum() for stream in streams).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("key_norm.bias"):
            assert not parameter.grad.any(), name
        elif name.endswith("in_proj_bias"):
            assert not parameter.grad[EMBED : 2 * EMBED].any(), name
            assert parameter.grad[:EMBED].any(), name
        else:
            assert parameter.grad.any(), name


def test_images_keep_all_tokens():
    tokenizer = make()
    features = features_of(3, 1, 9, 9)
    expected = tokenizer.lape.inject(tokenizer.projector(features))
    assert torch.equal(tokenizer.images(features), expected)
    assert torch.equal(make(lape=False).images(features), make(lape=False).projector(features))


@pytest.mark.parametrize("lape", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_low_precision(how, bias, lape):
    tokenizer, features = make(torch.float32, std=0.2, bias=bias, lape=lape), features_of(1, 5, 9, 9)
    exact = copy.deepcopy(tokenizer).double()
    if how != "autocast":
        tokenizer.to(getattr(torch, how))
        exact = copy.deepcopy(tokenizer).double()
    features = features.to(next(tokenizer.parameters()).dtype)
    wanted = exact(features.double())
    found = {}
    for execution in ("folded", "direct"):
        tokenizer.execution = execution
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found[execution] = tokenizer(features)
        sum(stream.float().square().sum() for stream in found[execution]).backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        tokenizer.execution = "folded"
        without_gradients = tokenizer(features)
    for folded, same, direct, right in zip(found["folded"], without_gradients, found["direct"], wanted, strict=True):
        error, other, allowed = ((x.double() - right).norm() for x in (folded, same, direct))
        assert folded.dtype == same.dtype == direct.dtype
        assert max(error, other) <= 1.3 * allowed


# Matrices that are kept ----------------------------------------------------------------------------------------------


def outputs(tokenizer, features=None):
    features = features_of(1, 5, 9, 9, dtype=next(tokenizer.parameters()).dtype) if features is None else features
    with torch.no_grad():
        return torch.cat([stream.flatten() for stream in tokenizer(features)])


def directly(tokenizer):
    tokenizer.execution = "direct"
    result = outputs(tokenizer)
    tokenizer.execution = "folded"
    return result


def assert_up_to_date(tokenizer):
    torch.testing.assert_close(outputs(tokenizer), directly(tokenizer), rtol=1e-12, atol=1e-12)


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
def edit_in_place(tokenizer):
    tokenizer.packer.spatial.key_mlp[0].weight[0, 0] += 5


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


def test_no_frames():
    slow, fast = make()(features_of(2, 0, 9, 9))
    assert slow.shape == (2, 0, 3, 3, WIDTH)
    assert fast.shape == (2, 0, 1, 1, WIDTH)


def test_recomputation_sees_changes_in_place():
    for change in ("features", "query_mlp"):
        tokenizer = make(recompute=True)
        tokenizer.projector.requires_grad_(False)
        features = features_of(1, 5, 9, 9)
        streams = tokenizer(features)
        with torch.no_grad():
            (features if change == "features" else tokenizer.packer.spatial.query_mlp[2].weight).mul_(2)
        with pytest.raises(RuntimeError, match="changed in place"):
            sum(stream.sum() for stream in streams).backward()


# Frozen ---------------------------------------------------------------------------------------------------------------


def test_frozen():
    tokenizer, features = make(chunk_tokens=500), features_of(2, 10, 9, 9)
    expected = tokenizer(features)
    frozen = tokenizer.freeze()
    assert not list(frozen.parameters())
    edit_in_place(tokenizer)
    for module in (frozen, copy.deepcopy(frozen), torch.compile(frozen, fullgraph=True)):
        torch.testing.assert_close(module(features), expected, rtol=1e-12, atol=1e-12)
    other = make().freeze()
    other.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(other(features), expected, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(frozen, (features,)).module()
    torch.testing.assert_close(exported(features), expected, rtol=1e-12, atol=1e-12)
    assert frozen.half()(features.half())[0].dtype == torch.float16


def test_frozen_without_positions_and_biases():
    tokenizer, features = make(lape=False, bias=False), features_of(1, 5, 9, 9)
    torch.testing.assert_close(tokenizer.freeze()(features), tokenizer(features), rtol=1e-12, atol=1e-12)


def test_compile():
    tokenizer, features = make(), features_of(1, 5, 9, 9)
    expected, grads = run(tokenizer, features, "folded")
    compiled = torch.compile(tokenizer, fullgraph=True)
    leaf = features.requires_grad_()
    found = compiled(leaf)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x).cos()).sum() for x in found)
    found_grads = torch.autograd.grad(loss, [leaf, *tokenizer.parameters()])
    torch.testing.assert_close(list(found_grads), list(grads), rtol=1e-9, atol=1e-9)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_video():
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256))
    packer = SpatialTemporalPacker(256, 128, 8)
    tokenizer = VisualTokenizer(projector, LanguageAlignedPositionalEmbedding(20, 256), packer, chunk_tokens=4096)

    def peak(frames: int) -> int:
        features = torch.randn(1, frames, 9, 9, 16)
        with torch.no_grad():
            result = sum(stream.numel() * 4 for stream in tokenizer(features))
            found, _ = peak_memory(lambda: tokenizer(features), torch.device("cpu"))
        if found is None:
            pytest.skip("peak memory cannot be measured here")
        return found - result

    short, long = peak(50), peak(1600)
    all_at_once = 1600 * 81 * 256 * 4  # the hidden activation alone
    assert all_at_once > 120 << 20
    assert long < short + (24 << 20)
    assert math.isfinite(short)
