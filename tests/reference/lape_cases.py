"""What the tests of the positional references share: golden vectors, random tables, resizing in exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"
AXES = ("temporal", "height", "width")
LOW_PRECISION = [torch.bfloat16, torch.float16]
NAN = float("nan")


def load_golden(name):
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return load_file(path), config


def coordinates(ids, config, kinds=("input", "output"), skip=()):
    """The axis and the position of each template token of one sample: the i-th of a kind takes entry i of its list."""
    axis = torch.full(ids.shape, -1, dtype=torch.int8)
    positions = torch.full(ids.shape, NAN, dtype=torch.float64)
    variables = config["variables"][0]
    for number, name in enumerate(AXES):
        for kind in kinds:
            if f"{name}_{kind}" in skip:
                continue
            at = (ids == config["token_ids"][f"{name}_{kind}"]).nonzero().squeeze(1)
            values = variables[f"{'' if name == 'temporal' else 'spatial_'}{name}_{kind}_locations"]
            axis[at] = number
            positions[at] = torch.tensor(values[: len(at)], dtype=torch.float64)
    return axis, positions


def random_table(rows, channels, seed, dtype=torch.float64):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def anchor_of(i, size, count, alignment):
    """Where row i of `size` sits among `count` anchors: a fraction, exactly."""
    if alignment == "ends":
        return Fraction((count - 1) * i, size - 1) if size > 1 else Fraction(0)
    if alignment == "text":
        return Fraction(2 * i + 1, 2 * size) * (count - 1)
    return min(max(Fraction((2 * i + 1) * count, 2 * size) - Fraction(1, 2), Fraction(0)), Fraction(count - 1))


def resize_matrix(size, count, alignment):
    """`[size, count]`: what each row takes of each anchor."""
    matrix = np.zeros((size, count))
    for i in range(size):
        anchor = anchor_of(i, size, count, alignment)
        ratio = anchor - int(anchor)
        matrix[i, int(anchor)] += 1 - ratio
        if ratio:
            matrix[i, int(anchor) + 1] += ratio
    return matrix


def half_an_ulp(exact, dtype):
    """The largest error of one rounding (and 1e-6 for what is computed in float32)."""
    _, exponent = torch.frexp(exact.abs())
    return torch.ldexp(torch.ones_like(exact), exponent) * torch.finfo(dtype).eps / 4 + 1e-6
