"""A computation by the native CPU library, of an installed package or of a kernel that Hugging Face's `kernels` loads:

python smoke.py llava_st_ops
python smoke.py --kernel FOLDER

It needs nothing but torch and what it tests, and runs away from the source.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch


def check(ops: ModuleType) -> None:
    library = ops.backends.library
    assert library.CPU.loaded, library.CPU.reason
    query, key, value = (torch.randn(1, 4, n, n, 2, 16, requires_grad=True) for n in (2, 6, 6))
    found, expected = {}, {}
    for backend, results in (("cpu", found), ("reference", expected)):
        with ops.use_backend(backend):
            output = ops.point_to_region_attention(query, key, value, region=(1, 3, 3))
        results["output"] = output
        results["gradients"] = torch.autograd.grad(output.square().sum(), (query, key, value))
    torch.testing.assert_close(found, expected)
    namespace = getattr(torch.ops, library.NAMESPACE)
    raw = namespace.point_to_region_attention(query, key, value, [1, 3, 3])
    torch.testing.assert_close(raw, expected["output"])
    packer = torch.compile(ops.nn.SpatialTemporalPacker(16, 32, 4), backend="eager", fullgraph=True)
    slow, fast = packer(torch.randn(1, 10, 9, 9, 16))
    assert (slow.shape, fast.shape) == ((1, 2, 3, 3, 16), (1, 10, 1, 1, 16))


def main() -> None:
    name, *folder = sys.argv[1:]
    if name == "--kernel":
        from kernels import get_local_kernel

        ops = get_local_kernel(Path(folder[0]), backend="cpu")
    else:
        ops = importlib.import_module(name)
        assert "site-packages" in ops.__file__, f"not the installed package: {ops.__file__}"
    check(ops)
    print(f"{ops.__name__} {ops.__version__}: {ops.backends.library.CPU.reason}")


if __name__ == "__main__":
    main()
