"""Exported programs: the native ops are in the graph, and any number of frames gives what the module gives."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops.export import export_program
from llava_st_ops.nn import PointToRegionPacker
from tests.export.modules import FRAMES, MAX_FRAMES, MODULES, clip, module_of, run_python, save_expected

OPS = {
    "tokenizer": {"lape_add", "linear_lape_gelu", "normalized_region_attention"},
    "packer": {"point_to_region_attention"},
}


def native_ops(program):
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return {target.split(".")[1] for target in targets if target.startswith("llava_st.")}


@pytest.fixture(scope="module", params=MODULES)
def exported(request):
    module, width = module_of(request.param)
    program = export_program(module, clip(width, 10), max_frames=MAX_FRAMES)
    return request.param, module, width, program


def test_the_ops_are_in_the_graph(exported):
    name, *_, program = exported
    assert native_ops(program) == OPS[name]


def test_any_number_of_frames(exported):
    _, module, width, program = exported
    run = program.module()
    for frames in FRAMES:
        features = clip(width, frames)
        with torch.no_grad():
            torch.testing.assert_close(run(features), module(features), rtol=0, atol=0)


@pytest.mark.parametrize("frames", [5, MAX_FRAMES + 1])
def test_other_numbers_of_frames_are_an_error(exported, frames):
    _, _, width, program = exported
    with pytest.raises(AssertionError, match=r"size\(\)\[1\]"):
        program.module()(clip(width, frames))


def test_saved_and_loaded_in_another_process(exported, tmp_path):
    name, *_, program = exported
    torch.export.save(program, tmp_path / "program.pt2")
    save_expected(name, tmp_path / "expected.pt")
    run_python(
        """
import sys, torch, llava_st_ops
run = torch.export.load(sys.argv[1]).module()
for features, expected in zip(*torch.load(sys.argv[2]), strict=True):
    torch.testing.assert_close(run(features), expected, rtol=0, atol=0)
""",
        tmp_path / "program.pt2",
        tmp_path / "expected.pt",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    module, width = module_of("tokenizer", dtype)
    run = export_program(module, clip(width, 10, dtype), max_frames=MAX_FRAMES).module()
    for frames in (7, 20):
        features = clip(width, frames, dtype)
        torch.testing.assert_close(run(features), module(features), rtol=0, atol=0)


def test_regions_of_even_sizes():
    """Their centres lie between samples, but for those of partial regions with an odd number of them."""
    packer = PointToRegionPacker(16, 32, 4, region=(4, 2, 3)).requires_grad_(False)
    run = export_program(packer, torch.randn(1, 8, 6, 6, 16), max_frames=MAX_FRAMES).module()
    for frames in (5, 6, 7, 8, 12):
        features = torch.randn(1, frames, 6, 6, 16)
        torch.testing.assert_close(run(features), packer(features), rtol=0, atol=1e-6)


def test_a_fixed_number_of_frames_keeps_the_chunks():
    module, width = module_of("tokenizer")
    module.chunk_tokens = 405  # two chunks
    features = clip(width, 10)
    program = export_program(module, features)
    calls = [node for node in program.graph.nodes if "normalized_region_attention" in str(node.target)]
    assert len(calls) == 6  # three packers, twice
    torch.testing.assert_close(program.module()(features), module(features), rtol=0, atol=0)
    export_program(module, features, max_frames=MAX_FRAMES)
    assert module.chunk_tokens == 405


def test_errors():
    module, width = module_of("packer")
    with pytest.raises(ValueError, match=r"features must have 5 dimensions \[B, T, H, W, C\], got shape \[3\]"):
        export_program(module, torch.ones(3))
    for frames in (1, MAX_FRAMES + 1):
        with pytest.raises(ValueError, match=f"2 to max_frames = {MAX_FRAMES} frames, got {frames}"):
            export_program(module, clip(width, frames), max_frames=MAX_FRAMES)
