"""The folded execution is the direct one, whatever the shapes and whatever happens to the parameters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_memory
from llava_st_ops import use_backend
from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer
from tests.nn.tokenizers import EMBED, WIDTH, edit_in_place, features_of, make

NO_NOTICE = pytest.mark.filterwarnings("error:.*runs direct")


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
