"""What the thin layer becomes: on every architecture the instruction that it promises, in the kernels of the zoo."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict

import pytest

from scripts.kernel_report import cuobjdump
from tests.gpu.zoo import ARCHITECTURES, build

# Right twins of the zoo, and how the instructions begin that they must have.
_PROMISED = {
    "missing_barrier": ["BAR.SYNC"],
    "wrong_shuffle_mask": ["SHFL.BFLY"],
    "shuffle_from_absent_lane": ["SHFL.IDX"],
    "vote_of_strangers": ["VOTE"],
    "lost_update": ["RED"],
    "unwaited_copy": ["LDGSTS.E", "LDGDEPBAR", "DEPBAR.LE"],
    "copy_without_barrier": ["LDGSTS.E.BYPASS.128", "BAR.SYNC"],
    "wrong_fragments_bfloat16": ["HMMA.16816.F32.BF16"],
    "wrong_fragments_float16": ["HMMA.16816.F32"],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    return build(tmp_path_factory.mktemp("zoo") / "libzoo.so")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions(library, architecture):
    instructions = defaultdict(set)
    kernel = ""
    for line in cuobjdump(library, "--dump-sass", "--gpu-architecture", f"sm_{architecture}"):
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = found[1]
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line):
            instructions[kernel].add(found[1])
    for name, promised in _PROMISED.items():
        (right,) = (kernel for kernel in instructions if f"{len(name)}{name}ILb1E" in kernel)
        for beginning in promised:
            assert any(x.startswith(beginning) for x in instructions[right]), (name, beginning, instructions[right])
