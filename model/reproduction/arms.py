"""What each idea of LLaVA-ST is worth: the recipe with one of them changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..modeling_llava_st import LlavaStForConditionalGeneration

Model = LlavaStForConditionalGeneration

_NO_TOKEN = -1


@dataclass(frozen=True)
class Arm:
    """A change of the recipe.

    Attributes:
        meaning: in a few words.
        settings: `name=value`, of the settings of all stages.
        configuration: changes of the model's configuration.
        adapt: changes a model that was loaded, before it trains and before it is asked.
    """

    meaning: str
    settings: tuple[str, ...] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Model], None] | None = None


def without_positions(model: Model) -> None:
    """Visual tokens get no positions; coordinates in text stay as they are."""
    tokenizer = model.model.visual_tokenizer
    tokenizer.images = tokenizer.projector.forward
    tokenizer.forward = lambda features: tokenizer.packer(tokenizer.images(features))


def with_average_pooling(model: Model) -> None:
    """Means of the same regions in place of attention."""
    tokenizer, packer = model.model.visual_tokenizer, model.model.visual_tokenizer.packer

    def forward(features: Tensor) -> tuple[Tensor, Tensor]:
        packed = _means(tokenizer.images(features), packer.spatial.region)
        return _means(packed, packer.slow.region), _means(packed, packer.fast.region)

    tokenizer.forward = forward


def _means(tokens: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Of windows of `[B, T, H, W, C]`; the last ones may be smaller."""
    pooled = nn.functional.avg_pool3d(tokens.movedim(-1, 1), window, ceil_mode=True, count_include_pad=False)
    return pooled.movedim(1, -1)


def with_placeholders(model: Model) -> None:
    """Fast tokens are there, and say nothing."""
    tokenizer = model.model.visual_tokenizer
    forward, token = tokenizer.forward, model.config.token_ids["vid_patch"]

    def placeholders(features: Tensor) -> tuple[Tensor, Tensor]:
        slow, fast = forward(features)
        return slow, model.get_input_embeddings().weight[token].expand_as(fast) + 0 * fast

    tokenizer.forward = placeholders


def without_fast_tokens(model: Model) -> None:
    """Nothing attends to fast tokens."""
    ids = model.config.token_ids
    kept: list[Tensor] = []  # of the prompt that is being answered

    def hide(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        tokens, mask, cache = (options.get(name) for name in ("input_ids", "attention_mask", "cache"))
        before = 0 if cache is None else cache.get_seq_length()
        if before == 0:
            starts, ends = ((tokens == ids[name]).long().cumsum(dim=1) for name in ("vid_start", "vid_end"))
            kept[:] = [(starts == ends) & (tokens != ids["vid_end"])]
        mask = tokens.new_ones(len(tokens), before + tokens.shape[1]) if mask is None else mask.clone()
        mask[:, : kept[0].shape[1]] *= kept[0].to(mask)
        return arguments, {**options, "attention_mask": mask}

    model.register_forward_pre_hook(hide, with_kwargs=True)


def without_width_input(model: Model) -> None:
    """`<WIDTH-INPUT>` is a word like any other, as in the published code by mistake."""
    lape = model.model.lape
    lape.tokens = dataclasses.replace(lape.tokens, width_input=_NO_TOKEN)


def with_hard_targets(model: Model) -> None:
    """The nearest anchor is the target, not the two around a coordinate."""
    losses, steps = model.token_losses, max(model.config.num_bins) - 1
    model.token_losses = lambda hidden, labels, positions: losses(hidden, labels, (positions * steps).round() / steps)


ARMS = {
    "baseline": Arm("nothing changed"),
    "no positions": Arm("LAPE adds nothing to visual tokens", adapt=without_positions),
    "average pooling": Arm("means instead of attention, as many tokens", adapt=with_average_pooling),
    "fast tokens dropped": Arm("nothing attends to the fast stream", adapt=without_fast_tokens),
    "fast placeholders": Arm("fast tokens that say nothing", adapt=with_placeholders),
    "no width input": Arm("`<WIDTH-INPUT>` carries no position", adapt=without_width_input),
    "packer reset": Arm("a new packer in each stage", settings=("packer_between_stages=reset",)),
    "hard targets": Arm("the nearest anchor is the target", adapt=with_hard_targets),
    "direct": Arm("layer by layer, not folded", configuration={"packer_execution": "direct"}),
}
