"""The choice of a backend, and what `info` says of it."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from llava_st_ops import BackendError, backends, info, point_to_region_attention, use_backend

X = torch.randn(1, 1, 1, 1, 1, 8)
CPU = torch.device("cpu")


def chosen():
    return backends.choose("point_to_region_attention", X)


def test_the_native_kernel_is_the_default():
    assert chosen() == "cpu"


def test_nesting_and_errors_restore_the_choice():
    with use_backend("reference"):
        with use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_the_choice_is_local_to_the_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_the_choice_is_local_to_the_task():
    async def forced():
        with use_backend("reference"):
            await asyncio.sleep(0.01)
            return chosen()

    async def free():
        await asyncio.sleep(0.005)
        return chosen()

    async def both():
        return await asyncio.gather(forced(), free())

    assert asyncio.run(both()) == ["reference", "cpu"]


def test_leaving_in_another_order_than_entering_leaves_nothing_behind():
    """As threads and tasks do, each in a context of its own."""
    first, second = use_backend("reference"), use_backend("cpu")
    one, other = contextvars.copy_context(), contextvars.copy_context()
    one.run(first.__enter__)
    other.run(second.__enter__)
    assert backends._forced_for_compiled == ["reference", "cpu"]
    one.run(first.__exit__, None, None, None)
    assert backends._forced_for_compiled == ["cpu"]
    other.run(second.__exit__, None, None, None)
    assert backends._forced_for_compiled == []
    assert chosen() == "cpu"


def test_one_instance_may_be_entered_again():
    forced = use_backend("reference")
    with forced, forced:
        assert chosen() == "reference"
    assert chosen() == "cpu"
    assert backends._forced_for_compiled == []


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of cpu, cuda, triton, reference, got 'gpu'"):
        use_backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    verdict = backends.can_run(backend, "point_to_region_attention", CPU, torch.float32)
    assert not verdict.ok
    assert verdict.reason
    backends._choose_cached.cache_clear()
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run here: "), use_backend(backend):
        point_to_region_attention(X, X, X, (1, 1, 1))


def test_a_dtype_without_a_kernel_takes_the_reference_and_says_so_once():
    eight = X.to(torch.float8_e4m3fn)
    assert not backends.can_run("cpu", "point_to_region_attention", CPU, eight.dtype).ok
    backends._choose_cached.cache_clear()
    backends._announce_once.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        choices = [backends.choose("point_to_region_attention", eight) for _ in range(3)]
    assert choices == ["reference"] * 3
    assert len(warned) == 1
    assert "takes the PyTorch reference for float8_e4m3fn on cpu" in str(warned[0].message)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 6), True),  # the same major version
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("80-virtual", (9, 0), True),  # PTX runs on all that follow
        ("80-virtual", (12, 0), True),
        ("80-virtual", (7, 5), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a-virtual", (10, 0), False),
        ("100-real", (12, 0), False),
        ("120-real,80-virtual", (12, 1), True),
        ("90", (10, 0), True),  # both kinds
        ("", (8, 0), False),
    ],
)
def test_architectures(architectures, capability, expected):
    assert backends.covers(architectures, capability) is expected


def test_info_reports_every_op_and_backend():
    report = info.report()
    for text in ("torch", "native libraries", "cpu:", *info.OPS, "float64", "instruction set"):
        assert text in report


def test_info_is_a_command():
    result = subprocess.run([sys.executable, "-m", "llava_st_ops.info"], capture_output=True, text=True, check=True)
    assert "native libraries" in result.stdout


def test_info_knows_every_op():
    names = {schema.partition("(")[0].removesuffix("_backward") for schema in backends.library.read_schemas()}
    assert set(info.OPS) == names
