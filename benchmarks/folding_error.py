"""Whether folding costs accuracy: the errors of the folded and the direct execution against float64, in low precision.

`python -m benchmarks.folding_error` draws weights and features again and again, in several regimes of weights, and
writes `benchmarks/results/folding_error.json` with every draw. Products are those of torch on a CPU, which sums in
float32 and rounds once, as tensor cores do.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer

from .environment import ROOT, describe

RECORD = ROOT / "benchmarks" / "results" / "folding_error.json"
DRAWS = 20
VISION, WIDTH, EMBED, HEADS = 96, 256, 128, 8
FEATURES = (1, 5, 9, 9, VISION)


def initial(tokenizer: VisualTokenizer) -> None:
    """As training begins."""


def trained_gains(tokenizer: VisualTokenizer) -> None:
    """LayerNorms with gains from 1/4 to 4 and shifts of about 1."""
    for module in tokenizer.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.copy_(4 ** torch.empty_like(module.weight).uniform_(-1, 1))
            module.bias.normal_()


def large_tables(tokenizer: VisualTokenizer) -> None:
    """Positions ten times as large as features."""
    for table in tokenizer.lape.parameters():
        table.mul_(10)


def correlate(tokenizer: VisualTokenizer, share: float) -> None:
    """Adds the same direction to all rows of a matrix: sums that cancel, and means far from zero."""
    for name, weight in tokenizer.named_parameters():
        if weight.dim() == 2 and "lape" not in name:
            weight.add_(torch.randn(weight.shape[1]) * weight.std() * share)


def correlated_rows(tokenizer: VisualTokenizer) -> None:
    """Rows that share a direction of 0.3 times what is their own."""
    correlate(tokenizer, 0.3)


def alike_rows(tokenizer: VisualTokenizer) -> None:
    """Rows that share as much as is their own: more than trained weights do."""
    correlate(tokenizer, 1)


REGIMES: dict[str, Callable[[VisualTokenizer], None]] = {
    "initial": initial,
    "trained gains": trained_gains,
    "large tables": large_tables,
    "correlated rows": correlated_rows,
    "alike rows": alike_rows,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(regime: str, seed: int) -> tuple[VisualTokenizer, Tensor]:
    """A tokenizer with random weights, in float32, and features."""
    torch.manual_seed(seed)
    projector = nn.Sequential(nn.Linear(VISION, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    lape = LanguageAlignedPositionalEmbedding(20, WIDTH)
    tokenizer = VisualTokenizer(projector, lape, SpatialTemporalPacker(WIDTH, EMBED, HEADS))
    with torch.no_grad():
        for name, parameter in tokenizer.packer.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # so that it matters at these widths
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        REGIMES[regime](tokenizer)
    return tokenizer, torch.randn(FEATURES)


def error_ratio(regime: str, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """The relative errors, root mean square over both streams, of the folded and of the direct execution."""
    tokenizer, features = draw(regime, seed)
    tokenizer, features = tokenizer.to(dtype), features.to(dtype)
    exact = copy.deepcopy(tokenizer).double()
    exact.execution = "direct"
    errors = []
    with torch.no_grad():
        wanted = exact(features.double())
        for execution in ("folded", "direct"):
            tokenizer.execution = execution
            found = tokenizer(features)
            # What the packers add to the centres, so that these do not hide it.
            errors.append(sum(relative_error(*pair) for pair in zip(found, wanted, strict=True)) / 2)
    return errors[0], errors[1]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def measure(draws: int = DRAWS) -> list[dict[str, Any]]:
    rows = []
    for regime in REGIMES:
        for name, dtype in DTYPES.items():
            errors = [error_ratio(regime, dtype, seed) for seed in range(draws)]
            ratios = [folded / direct for folded, direct in errors]
            rows.append(
                {
                    "regime": regime,
                    "dtype": name,
                    "folded": [folded for folded, _ in errors],
                    "direct": [direct for _, direct in errors],
                    "median_ratio": statistics.median(ratios),
                    "largest_ratio": max(ratios),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    arguments = parser.parse_args()
    record = {"environment": describe(torch.device("cpu")), "rows": measure(arguments.draws)}
    for row in record["rows"]:
        print(
            f"{row['regime']:16} {row['dtype']:9} median {row['median_ratio']:.3f}, largest {row['largest_ratio']:.3f}"
        )
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
