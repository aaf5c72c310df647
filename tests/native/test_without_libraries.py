"""The package where no native library was built: everything works, by the reference."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_without_libraries(code):
    """Runs code in a fresh interpreter in which no native library is found."""
    setup = """
        import importlib.util, pathlib, sys, warnings
        find = pathlib.Path.exists
        pathlib.Path.exists = lambda self, **kw: self.suffix != ".so" and find(self, **kw)
        import torch
        import llava_st_ops
        from llava_st_ops import library
        pathlib.Path.exists = find
        assert not library.CPU.loaded and "was not built" in library.CPU.reason
    """
    program = textwrap.dedent(setup) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_functions_and_raw_ops_work_and_say_so_once():
    result = run_without_libraries("""
        query, key, value = torch.randn(1, 1, 1, 1, 2, 8), torch.randn(1, 1, 3, 3, 2, 8), torch.randn(1, 1, 3, 3, 2, 8)
        leaves = [x.double().requires_grad_() for x in (query, key, value)]
        public = llava_st_ops.point_to_region_attention(*leaves, (1, 3, 3))
        llava_st_ops.point_to_region_attention(*leaves, (1, 3, 3))
        raw = torch.ops.llava_st.point_to_region_attention(*leaves, [1, 3, 3])
        torch.testing.assert_close(raw, public)
        torch.testing.assert_close(torch.autograd.grad(raw.sum(), leaves), torch.autograd.grad(public.sum(), leaves))
        flat = [x.flatten(0, 3) for x in (query, key, value)]
        grids = torch.tensor([[1, 3, 3]])
        packed = torch.ops.llava_st.point_to_region_attention_packed(*flat, grids, [1, 3, 3])
        torch.testing.assert_close(packed, public.float().flatten(0, 3))
    """)
    assert result.stderr.count("takes the PyTorch reference for float64 on cpu") == 1


def test_info_works():
    result = run_without_libraries("""
        from llava_st_ops import info
        print(info.report())
    """)
    assert "reference (plain PyTorch); not cpu: libllava_st_cpu.so was not built" in result.stdout


def test_forcing_the_kernel_is_an_error():
    run_without_libraries("""
        x = torch.randn(1, 1, 1, 1, 1, 8)
        try:
            with llava_st_ops.use_backend("cpu"):
                llava_st_ops.point_to_region_attention(x, x, x, (1, 1, 1))
        except llava_st_ops.BackendError as error:
            assert "was not built" in str(error)
        else:
            raise SystemExit("no error")
    """)
