"""Small modules to export, with what they make of clips of several lengths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.nn.tokenizers import VISION, WIDTH, make

FRAMES = (6, 10, 13, 40)  # from one more than the region of the slow stream on: whole regions, and partial ones
MAX_FRAMES = 64
MODULES = ("tokenizer", "packer")


def module_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, int]:
    """A module and the width of its features."""
    tokenizer = make(dtype, std=0.2, chunk_tokens=0)
    return (tokenizer.freeze(), VISION) if name == "tokenizer" else (tokenizer.packer, WIDTH)


def clip(width: int, frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, frames, 9, 9, width, generator=torch.Generator().manual_seed(frames), dtype=dtype)


def save_expected(name: str, path: Path) -> None:
    """Clips, and what the module itself makes of them: for another process."""
    module, width = module_of(name)
    clips = [clip(width, frames) for frames in FRAMES]
    with torch.no_grad():
        torch.save((clips, [module(features) for features in clips]), path)


def run_python(program: str, *arguments: Path) -> None:
    """Runs a program in a fresh interpreter."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
