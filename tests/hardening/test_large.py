"""More than 2^31 elements in one argument, without the memory for them: strides of zero, and rows far apart."""

from __future__ import annotations

import psutil
import pytest
import torch

import llava_st_ops
from llava_st_ops import reference

FAR = 2**31 + 8


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values, with more than 2^31 elements between the first two entries of dimension 0."""
    try:
        memory = torch.empty(FAR * (len(values) - 1) + values[0].numel(), dtype=values.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    apart = memory.as_strided(values.shape, (FAR, *values[0].contiguous().stride()))
    return apart.copy_(values)


@pytest.fixture(params=["cpu-avx2", "cpu-baseline", "reference"])
def backend(request, monkeypatch):
    """Each way on a CPU; those of a GPU are in tests/gpu, emulator and triton."""
    name, _, instruction_set = request.param.partition("-")
    if instruction_set == "baseline":
        monkeypatch.setenv("LLAVA_ST_CPU_ISA", instruction_set)
    with llava_st_ops.use_backend(name):
        yield name


@pytest.mark.parametrize("name", ["features", "key", "embed", "weight"])
def test_offsets_beyond_32_bits(name, backend):
    """Rows, frames and classes that lie further apart than 32 bits count."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).bfloat16()  # noqa: E731
    tables = [random(n, 16) for n in (5, 4, 3)]
    ids = torch.tensor([0, 1, 2, 2])
    nothing = (torch.full((4,), -1, dtype=torch.int8), torch.full((4,), float("nan"), dtype=torch.float64))
    if name == "features":
        call, x = lambda x: llava_st_ops.lape_add(x, *tables), random(2, 2, 3, 3, 16)
    elif name == "key":
        query = random(2, 1, 1, 1, 2, 16)
        call, x = lambda x: llava_st_ops.normalized_region_attention(query, x, x, (2, 3, 3)), random(2, 2, 3, 3, 16)
    elif name == "embed":
        others = (torch.full((4,), -1), random(0, 16))
        call, x = lambda x: llava_st_ops.lape_scatter(x, *tables, ids, *nothing, *others), random(3, 16)
    else:
        hidden = random(4, 16)
        call, x = lambda x: llava_st_ops.coordinate_cross_entropy(hidden, x, *tables, ids, *nothing), random(3, 16)
    assert torch.equal(call(far_apart(x)), call(x))


def test_more_than_2_to_31_elements(backend):
    """The last frames of a video of as many numbers as 32 bits do not count."""
    frames = 2**31 // (16 * 16 * 512) + 3
    # The reference keeps float32 copies.
    if psutil.virtual_memory().available < (8 if backend == "reference" else 2.5) * frames * 16 * 16 * 512 * 2:
        pytest.skip("not enough memory")
    x = torch.zeros(1, frames, 16, 16, 512, dtype=torch.bfloat16)
    x[:, -2:] = torch.randn(2, 16, 16, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = [torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (7, 5, 3)]
    assert x.numel() > 2**31
    found = llava_st_ops.lape_add(x, *tables)[:, -2:]
    # Times far from the end are another matter: the reference of the last frames has the positions of all.
    temporal = reference.lape.resize_table(tables[0].float(), frames, "ends")[-2:]
    expected = reference.lape_add(x[:, -2:], temporal.bfloat16(), *tables[1:])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    queries = x.new_ones(1, frames, 1, 1, 2, 256)
    heads = x.view(1, frames, 16, 16, 2, 256)
    pooled = llava_st_ops.point_to_region_attention(queries, heads, heads, (1, 16, 16))[:, -2:]
    plain = reference.point_to_region_attention(queries[:, -2:], heads[:, -2:], heads[:, -2:], (1, 16, 16))
    torch.testing.assert_close(pooled, plain, rtol=2e-2, atol=2e-2)
