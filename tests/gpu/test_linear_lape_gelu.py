"""The MLP's ops on a GPU: products by CUTLASS give what torch's products do, and run where they should."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import library, reference
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DTYPES = (torch.bfloat16, torch.float16)
FUSED = {"linear_lape_gelu": "linear_gelu_sm", "gelu_linear_gradient": "gelu_gradient_sm"}
# Samples, grid, inputs, channels: whole tiles, rows and channels that end inside of one, and few numbers to sum.
SHAPES = [
    pytest.param((2, (16, 16, 16), 256, 512), id="whole tiles"),
    pytest.param((1, (20, 27, 27), 1152, 648), id="parts of tiles"),
    pytest.param((3, (7, 13, 29), 8, 1160), id="few inputs"),
]


@pytest.fixture
def fused(monkeypatch):
    """Products by CUTLASS are on, where this GPU has any."""
    if not library.CUDA.loaded:
        pytest.skip(library.CUDA.reason)
    built = library.CUDA.text("llava_st_cutlass")
    major = torch.cuda.get_device_capability()[0]
    needed = {8: "sm_80", 9: "sm_90a", 12: "sm_80"}.get(major)
    if needed is None or needed not in built:
        pytest.skip(f"no product by CUTLASS for compute capability {major}: {built}")
    monkeypatch.setenv("LLAVA_ST_CUTLASS", "1")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def forward_arguments(shape, dtype):
    samples, grid, inputs, channels = shape
    features = random(samples, *grid, inputs, seed=1, dtype=dtype)
    weight = (random(channels, inputs, seed=2) / inputs**0.5).to(dtype)
    bias = random(channels, seed=3, dtype=dtype)
    tables = [random(n, channels, seed=4 + n, dtype=dtype) for n in grid]
    return [features, weight, bias, *tables]


def backward_arguments(shape, dtype):
    samples, (t, h, w), inputs, channels = shape
    tokens = samples * t * h * w
    both = random(tokens, 2 * channels, seed=5, dtype=dtype)
    weight = (random(inputs, channels, seed=7) / inputs**0.5).to(dtype)
    return [random(tokens, inputs, seed=6, dtype=dtype), weight, both[:, channels:]]


def kernels_of(run) -> list[str]:
    """The names of the kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def check(name, arguments, same, monkeypatch):
    """With CUTLASS and without, against float64 in both cases, and twice alike."""
    op = getattr(torch.ops.llava_st, name)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    exact = getattr(reference, name)(*wide)
    ours = op(*arguments)
    assert any(FUSED[name] in kernel for kernel in kernels_of(lambda: op(*arguments)))
    for again, first in zip(op(*arguments), ours, strict=True):
        assert torch.equal(again, first)
    monkeypatch.delenv("LLAVA_ST_CUTLASS")
    assert not any(FUSED[name] in kernel for kernel in kernels_of(lambda: op(*arguments)))
    plain = op(*arguments)
    for *each, what in zip(ours, plain, exact, same, ("first", "second"), strict=True):
        fused_result, plain_result, wanted, like = each
        assert_accurate(fused_result, wanted, like, f"{what} with CUTLASS")
        assert_accurate(plain_result, wanted, like, f"{what} without")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_forward_parity(fused, monkeypatch, shape, dtype, keep):
    arguments = [*forward_arguments(shape, dtype), keep]
    check("linear_lape_gelu", arguments, reference.linear_lape_gelu(*arguments), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_parity(fused, monkeypatch, shape, dtype):
    """The preactivations are a slice of columns."""
    arguments = backward_arguments(shape, dtype)
    check("gelu_linear_gradient", arguments, reference.gelu_linear_gradient(*arguments), monkeypatch)


def test_what_does_not_fit_takes_the_product_of_torch(fused):
    features, weight, bias, *tables = forward_arguments((1, (16, 16, 16), 256, 512), torch.bfloat16)
    ops = torch.ops.llava_st
    unaligned = torch.cat([features.new_zeros(1), features.flatten()])[1:].view(features.shape)
    odd = [features, weight[:509], bias[:509], *(table[:, :509] for table in tables)]
    for arguments in (
        [unaligned, weight, bias, *tables],
        odd,
        [features[..., :250], weight[:, :250], bias, *tables],
        [features[:, :1, :2], weight, bias, tables[0][:1], tables[1][:2], tables[2]],  # too few tiles
        [x.float() for x in (features, weight, bias, *tables)],
    ):
        names = kernels_of(lambda arguments=arguments: ops.linear_lape_gelu(*arguments))
        assert not any(FUSED["linear_lape_gelu"] in name for name in names)
        assert any("position_gelu" in name for name in names)


def test_the_host_waits_for_nothing(fused):
    forward = forward_arguments((2, (16, 16, 16), 256, 512), torch.bfloat16)
    backward = backward_arguments((2, (16, 16, 16), 256, 512), torch.bfloat16)
    ops = torch.ops.llava_st
    ops.linear_lape_gelu(*forward, True), ops.gelu_linear_gradient(*backward)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear_lape_gelu(*forward, True), ops.gelu_linear_gradient(*backward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(fused):
    forward = forward_arguments((2, (16, 16, 16), 256, 512), torch.bfloat16)
    backward = backward_arguments((2, (16, 16, 16), 256, 512), torch.bfloat16)

    def step():
        return *torch.ops.llava_st.linear_lape_gelu(*forward, True), *torch.ops.llava_st.gelu_linear_gradient(*backward)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
