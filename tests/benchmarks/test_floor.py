"""The floor's kernels read every byte and write every byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import floor


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    try:
        floor.load_library()
    except floor.FloorError as error:
        pytest.skip(str(error))


def random_bytes(size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def sum_of_words(*tensors: torch.Tensor) -> int:
    return sum(int(x.numpy().view(np.uint64).sum(dtype=np.uint64)) for x in tensors) % 2**64


@pytest.mark.parametrize("variant", floor.VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(64,), (64 * 7, 64 * 1001), (0, 64 * 5000, 64 * 33)])
def test_all_is_read_and_all_is_written(variant, threads, sizes):
    inputs = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    output_sizes = [64, 64 * 999, (2 << 20) + 64]
    outputs = floor.move(inputs, output_sizes, variant, threads)
    assert outputs.checksum == sum_of_words(*inputs)
    for content, size in zip(outputs.contents(), output_sizes, strict=True):
        assert content == floor.PATTERN.to_bytes(8, "little") * (size // 8)


def test_every_single_line_of_an_input_is_read():
    for line in range(0, 64 * 40, 64):
        data = torch.zeros(64 * 40, dtype=torch.uint8)
        data[line + 8] = 1
        assert floor.move([data], [64], floor.VARIANTS[0], threads=2).checksum == 1


def test_sizes_that_are_no_whole_lines_are_refused():
    with pytest.raises(ValueError, match="64"):
        floor.move([random_bytes(100, 0)], [64], floor.VARIANTS[0], threads=1)
    with pytest.raises(ValueError, match="64"):
        floor.move([random_bytes(128, 0)], [65], floor.VARIANTS[0], threads=1)


def test_outputs_are_freed():
    """A hundred outputs of 64 MB would not fit if they were kept."""
    for _ in range(100):
        floor.move([random_bytes(64, 0)], [64 << 20], floor.VARIANTS[-1], threads=2)


def test_variants_differ():
    assert len({variant.name for variant in floor.VARIANTS}) == 8
