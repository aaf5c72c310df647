"""What the model costs at inference beside the published way of computing it: a decode step, and the vision tower.

`python -m benchmarks.model_costs` measures on the CPU, writes `benchmarks/results/model_costs.json`, and makes the
tables of docs/model.md anew from it (`--report` does that alone).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llava_st import LlavaStConfig, LlavaStForConditionalGeneration
from llava_st.tiny import tiny_config
from llava_st.vision_tower import vision_features
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, SiglipVisionConfig, SiglipVisionModel

from .environment import ROOT, describe
from .measure import CpuTimer, Rounds, interleave, summarise
from .memory import peak_memory
from .pages import measure_command, replace_part

RECORD = ROOT / "benchmarks" / "results" / "model_costs.json"
PAGE = ROOT / "docs" / "model.md"
# Qwen2-0.5B's widths, of which a few layers, and SigLIP so400m's, of which the frames are few.
VOCABULARY, WIDTH, LAYERS, PROMPT = 151_660, 896, 4, 600
FRAMES, CHUNK = 4, 1


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        storages = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in storages:
                self.total += tensor.untyped_storage().nbytes()
        return result


def decoding_model(layers: int = LAYERS) -> LlavaStForConditionalGeneration:
    text = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4864,
        "num_hidden_layers": layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    config: LlavaStConfig = tiny_config(text_config=text, token_ids=None, compat="released")
    torch.manual_seed(0)
    return LlavaStForConditionalGeneration(config).eval()


def published_step(model: LlavaStForConditionalGeneration, token: Tensor, cache: DynamicCache) -> Tensor:
    """A step as published: embedding and head are joined with the anchors' tables anew, after these were propagated
    by products with 100 x 100 matrices."""
    lape = model.model.lape

    def joined(weight: Tensor, side: str, propagate: bool) -> Tensor:
        tables = []
        for axis in ("temporal", "height", "width"):
            table = getattr(lape, f"{axis}_{side}")
            distance = (torch.arange(len(table))[:, None] - torch.arange(len(table))).abs()
            propagated = 0.5**distance @ table
            tables.append((table + propagated) - propagated if propagate else table)
        return torch.cat([weight, *tables])

    embeddings = torch.nn.functional.embedding(token, joined(model.get_input_embeddings().weight, "input", True))
    hidden = model.model.language_model(inputs_embeds=embeddings, cache=cache).last_hidden_state
    return hidden @ joined(model.lm_head.weight, "output", False).T


def our_step(model: LlavaStForConditionalGeneration, token: Tensor, cache: DynamicCache) -> Tensor:
    return model(input_ids=token, cache=cache).logits


@torch.no_grad()
def measure_decoding(rounds: Rounds) -> dict[str, Any]:
    model = decoding_model()
    token = torch.tensor([[VOCABULARY + 17]])
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.randint(0, 1000, (1, PROMPT)), cache=cache, logits_to_keep=1)

    def step(way: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            logits = way(model, token, cache)
            cache.crop(-1)  # so that every step is the same
            return logits

        return call

    ways = {"published": step(published_step), "ours": step(our_step)}
    difference = (ways["published"]() - ways["ours"]()).abs().max().item()
    samples = interleave(ways, CpuTimer(), rounds)
    found: dict[str, Any] = {"largest_difference_of_logits": difference}
    for name, call in ways.items():
        with AllocatedBytes() as allocated:
            call()
        found[name] = {**summarise(samples[name]), "allocated_bytes": allocated.total}
    matrix = model.lm_head.weight
    found["head_bytes"] = matrix.numel() * matrix.element_size()
    return found


@torch.no_grad()
def measure_tower() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,  # the published tower's, without its last
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    tower = SiglipVisionModel(config).eval()
    pixels = torch.randn(FRAMES, 3, 384, 384)
    features = {}

    def ours() -> Tensor:
        features["ours"] = vision_features(tower, pixels, CHUNK)
        return features["ours"]

    def all_states() -> Tensor:
        states = tower(pixels, output_hidden_states=True).hidden_states
        features["published"] = states[-1]
        return states

    found: dict[str, Any] = {}
    for name, call in (("published", all_states), ("ours", ours)):
        peak, how = peak_memory(call, torch.device("cpu"))
        found[name] = {"peak_bytes": peak, "how": how}
    wanted = features["published"]
    found["largest_difference"] = (features["ours"].flatten(1, 2) - wanted).abs().max().item()
    return found


def tables(record: dict[str, Any]) -> str:
    environment, decoding, tower = record["environment"], record["decoding"], record["tower"]
    rows = [
        f"**{environment['device']}**, {environment['cpu']['torch_threads']} threads, torch "
        f"{environment['versions']['torch']}, commit {environment['commit'][:12]}, {environment['date'][:10]}; "
        f"`benchmarks/results/{RECORD.name}`.",
        "",
        f"A decode step, {VOCABULARY:,} words of width {WIDTH}, {LAYERS} layers, after {PROMPT} tokens, float32; the "
        f"head alone has {decoding['head_bytes'] / 2**20:.0f} MiB:",
        "",
        "| | median, ms | p10..p90 | new tensors, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name in ("published", "ours"):
        found = decoding[name]
        rows.append(
            f"| {name} | {found['median_ms']:.1f} | {found['p10_ms']:.1f}..{found['p90_ms']:.1f} | "
            f"{found['allocated_bytes'] / 2**20:.1f} |"
        )
    rows += [
        "",
        f"SigLIP so400m on {FRAMES} frames, float32; ours takes {CHUNK} at a time:",
        "",
        "| | peak above the weights, MiB |",
        "|---|---:|",
        *(f"| {name} | {tower[name]['peak_bytes'] / 2**20:.0f} |" for name in ("published", "ours")),
    ]
    return "\n".join(rows)


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "costs", tables(record))


def measure() -> dict[str, Any]:
    rounds = Rounds(fewest=15, most=60, seconds=60)
    return {
        "environment": describe(torch.device("cpu")),
        "decoding": measure_decoding(rounds),
        "tower": measure_tower(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
