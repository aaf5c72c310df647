"""`python -m llava_st.prove --seed N`: is a model of moving shapes better than one that does not look?

Renders new clips of pairs of shape and colour that training never had, asks when and where an object moves, and prints
what the answers score: (a) as they are, (b) with another clip's frames, (c) asking about another object. The last line
is JSON. See docs/reproduction.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .pipeline import LlavaStPipeline
from .reproduction import CHECKPOINT
from .reproduction.proving import prove


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava_st.prove", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True, help="of the clips: any that you like")
    parser.add_argument("--clips", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="a folder; default: the one that comes along")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the clips stay; by default nowhere")
    options = parser.parse_args(arguments)
    try:
        pipeline = LlavaStPipeline.from_pretrained(options.model, dtype="float32")
        with tempfile.TemporaryDirectory() as temporary:
            found = prove(pipeline, options.out or Path(temporary), options.seed, options.clips)
    except (OSError, ValueError) as error:
        print(f"prove: {error}", file=sys.stderr)
        return 1
    for name, meaning in (
        ("constant", "the best answer that is the same for all clips"),
        ("a", "the model"),
        ("b", "the model, shown another clip"),
    ):
        print(
            f"{name + ':':<10}" + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()) + f"  {meaning}"
        )
    print(f"c:        new {found['c']['new']:.3f}  old {found['c']['old']:.3f}  the model, asked about another object")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
