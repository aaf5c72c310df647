"""Modules of any sizes: what is folded gives what is not, what is accelerated gives what it gave before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import integration_peers as peers
from llava_st_ops import integrations
from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer
from tests.hardening.profiles import fuzz
from tests.integrations.families import cast, results, tensors

SIZES = st.integers(1, 9)
WIDTHS = st.integers(1, 24)
HEADS = st.sampled_from([1, 2, 3, 4])
SEEDS = st.integers(0, 2**31)


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = 1 + tensor.abs().max().item() if tensor.numel() else 1
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10 * size, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def tokenizers(draw) -> tuple[Callable[[str], VisualTokenizer], Tensor]:
    """A function that makes the same tokenizer in either execution, and features."""
    features, hidden, channels, heads = draw(WIDTHS), draw(WIDTHS), draw(WIDTHS), draw(HEADS)
    embed = heads * draw(st.integers(1, 6))
    factors = [draw(st.integers(1, 4)) for _ in range(3)]
    bins = tuple(draw(st.integers(2, 7)) for _ in range(3))
    positions, recompute, chunk = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 1, 40]))
    batch, frames, rows, columns = draw(st.integers(1, 2)), draw(SIZES), draw(SIZES), draw(SIZES)
    seed = draw(SEEDS)

    def make(execution: str) -> VisualTokenizer:
        torch.manual_seed(seed)
        projector = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, channels))
        lape = LanguageAlignedPositionalEmbedding(bins, channels) if positions else None
        packer = SpatialTemporalPacker(channels, embed, heads, *factors)
        module = VisualTokenizer(projector, lape, packer, execution, recompute=recompute, chunk_tokens=chunk)
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.1, 0.5)
        return module.double()

    return make, torch.randn(batch, frames, rows, columns, features, dtype=torch.float64)


def test_folded_is_direct():
    @fuzz(25)
    @given(tokenizers())
    def check(case):
        make, features = case
        direct, folded = make("direct"), make("folded")
        grads = [torch.randn_like(x) for x in tensors(direct(features))]
        inputs = cast((features,), torch.float64)
        expected = results(direct, inputs, grads)
        assert_the_same(results(folded, cast((features,), torch.float64), grads), expected)
        with torch.no_grad():
            frozen = dict(zip(("output 0", "output 1"), folded.freeze()(features), strict=True))
        assert_the_same(frozen, {name: expected[name].detach() for name in frozen})

    check()


@st.composite
def token_packers(draw) -> tuple[nn.Module, Any]:
    width, keys, out, heads, scale = draw(WIDTHS), draw(WIDTHS), draw(WIDTHS), draw(HEADS), draw(st.integers(1, 4))
    side, images = scale * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    module = peers.TokenPackerProjector(width, keys, heads * draw(st.integers(1, 6)), heads, out, scale)
    return module, ((torch.randn(images, side**2, width), torch.randn(images, side**2, keys)),)


@st.composite
def llava_st_packers(draw) -> tuple[nn.Module, Any]:
    channels, heads = draw(WIDTHS), draw(HEADS)
    module = peers.LlavaStResampler(channels, heads * draw(st.integers(1, 6)), heads)
    frames = draw(st.sampled_from([1, 5, 10]))
    return module, (torch.randn(frames, 81, channels),)


@st.composite
def compressors(draw) -> tuple[nn.Module, Any]:
    width, kind = draw(WIDTHS), draw(st.sampled_from(["video", "video_long", "image"]))
    side = {"video": 2, "video_long": 4, "image": 1}[kind]
    height, columns = (side * draw(st.integers(1, 3)) for _ in range(2))
    features = torch.randn(draw(st.integers(1, 3)), height * columns, width)
    return peers.OryxCompressor(width, draw(WIDTHS)), (features, kind, (height, columns))


@st.composite
def samplers(draw) -> tuple[nn.Module, Any]:
    towers = draw(st.integers(1, 3))
    sides = [draw(st.integers(1, 3)) for _ in range(towers)]
    widths = [draw(WIDTHS) for _ in range(towers)]
    width, context, heads, queries = draw(WIDTHS), draw(WIDTHS), draw(HEADS), draw(st.integers(1, 4))
    hidden = heads * draw(st.integers(1, 6))
    module = peers.SamplerLayer(width, context, widths, sides, hidden, heads)
    windows = [torch.randn(queries, side**2, each) for side, each in zip(sides, widths, strict=True)]
    masks = [torch.rand(queries, side, side) > 0.3 for side in sides]
    return module, (torch.randn(queries, 1, width), torch.randn(queries, 1, context), *windows, *masks)


FAMILIES = {
    "token_packer": (token_packers(), integrations.accelerate_token_packer),
    "llava_st": (llava_st_packers(), integrations.accelerate_llava_st),
    "oryx": (compressors(), integrations.accelerate_oryx),
    "vision_sampler": (samplers(), integrations.accelerate_vision_sampler),
}
families = pytest.mark.parametrize(("cases", "accelerate"), FAMILIES.values(), ids=FAMILIES)


def prepared(module: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    return module.double()


@families
def test_accelerated_is_as_before(cases, accelerate):
    @fuzz(25)
    @given(cases, SEEDS)
    def check(case, seed):
        module, inputs = prepared(case[0], seed), cast(case[1], torch.float64)
        after = copy.deepcopy(module)
        accelerate(after)
        grads = [torch.randn_like(x) for x in tensors(module(*inputs))]
        expected = results(module, inputs, grads)
        assume(all(x.isfinite().all() for x in expected.values()))
        for _ in range(2):  # the first call is compared with the module's own forward, and may be left to it
            after.zero_grad()
            assert_the_same(results(after, cast(case[1], torch.float64), grads), expected)

    check()


def damaged(x: Tensor, how: str) -> Tensor:
    return {
        "shorter": lambda: x[:, :-1],
        "narrower": lambda: x[..., :-1],
        "wider": lambda: torch.cat([x, x], -1),
        "flat": lambda: x.flatten(),
        "batched": lambda: x[None],
        "none left": lambda: x[:0],
        "half": lambda: x.half(),
        "integers": lambda: x.long(),
    }[how]()


HOW = ("shorter", "narrower", "wider", "flat", "batched", "none left", "half", "integers")


def outcome(module: nn.Module, inputs: Any) -> tuple[str, list[Tensor]]:
    with torch.no_grad():
        try:
            return "", tensors(module(*inputs))
        except Exception as error:  # whatever the module's own forward makes of it
            return type(error).__name__, []


@families
def test_what_makes_no_sense_is_left_to_the_module(cases, accelerate):
    """The same error, or the same result."""

    @fuzz(25)
    @given(cases, st.sampled_from(HOW), st.data())
    def check(case, how, data):
        module = prepared(case[0], 0)
        after = copy.deepcopy(module)
        accelerate(after)
        inputs = cast(case[1], torch.float64)
        outcome(after, inputs)
        leaves = tensors(inputs)
        chosen = data.draw(st.integers(0, len(leaves) - 1))
        wrong = torch.utils._pytree.tree_map(lambda x: damaged(x.detach(), how) if x is leaves[chosen] else x, inputs)
        (error, expected), (found, output) = outcome(module, wrong), outcome(after, wrong)
        assert found == error
        for one, other in zip(output, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8, equal_nan=True)

    check()
