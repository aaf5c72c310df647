"""The configuration of LLaVA-ST: all that its parts need to know of each other; nothing is fixed in the code."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from llava_st_ops.nn import CoordinateTokens
from llava_st_ops.nn.lape import AXES

# Names in `token_ids`, and the tokens. Where visual tokens go, the first and last token of a block included:
VISUAL_TOKENS = {
    "im_start": "<im_start>",
    "im_end": "<im_end>",
    "im_patch": "<im_patch>",
    "vid_start": "<vid_start>",
    "vid_end": "<vid_end>",
    "vid_patch": "<vid_patch>",
    "slow_vid_start": "<slow_vid_start>",
    "slow_vid_end": "<slow_vid_end>",
}
# One stands where a coordinate is; the position itself comes beside the ids.
TEMPLATE_TOKENS = {
    "temporal_input": "<TEMP-INPUT>",
    "temporal_output": "<TEMP-OUTPUT>",
    "height_input": "<HEIGHT-INPUT>",
    "height_output": "<HEIGHT-OUTPUT>",
    "width_input": "<WIDTH-INPUT>",
    "width_output": "<WIDTH-OUTPUT>",
}
_ANCHOR_NAMES = {"temporal": "TEMP", "height": "HEIGHT", "width": "WIDTH"}


def anchor_tokens(num_bins: tuple[int, int, int]) -> list[str]:
    """`<TEMP-000>`, ..., in the order of their ids."""
    return [f"<{_ANCHOR_NAMES[axis]}-{k:03d}>" for axis, n in zip(AXES, num_bins, strict=True) for k in range(n)]


class LlavaStConfig(PreTrainedConfig):
    """The configuration of a LLaVA-ST model, of which inputs and weights are both made.

    Args:
        vision_config: of the vision tower, a `SiglipVisionConfig`; `num_hidden_layers` are the layers that are run. The
            published tower is SigLIP so400m/14 at 384 pixels without its last layer: 26. The tower's own last norm and
            head are never used.
        text_config: of any causal language model of transformers. Its `vocab_size` is V, the rows of embedding and
            head; from V on ids are anchors (`<TEMP-000>` has the id V).
        token_ids: name -> id of the tokens in `VISUAL_TOKENS` and `TEMPLATE_TOKENS`.
        compat: `"paper"`, or `"released"`: the arithmetic of the published code, needed by its weights. Stored with a
            checkpoint, never guessed.
        lape: whether there are positions; False in the first training stage.
        num_bins: anchors of time, height and width.
        num_frames: frames that are sampled from a video unless told otherwise. Any number works.
        packer_dim: width of the packer's attention.
        packer_heads: its heads.
        spatial_factor: see `nn.SpatialTemporalPacker`.
        temporal_factor: likewise.
        fast_factor: likewise.
        pack_images: images are packed by the first packer as a video's frames are (the published
            `use_downsample_image`), and do not keep all their tokens.
        packer_execution: `"folded"` or `"direct"`, see `nn.VisualTokenizer`.
        vision_chunk_frames: frames that the vision tower takes at a time.
        tie_word_embeddings: the head's weight is the embedding's; also where `text_config` says so.

    Raises:
        ValueError: another word for `compat`, or `token_ids` without one of the tokens.
    """

    model_type = "llava_st"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    token_ids: dict | None = None
    compat: str = "paper"
    lape: bool = True
    num_bins: tuple | list = (100, 100, 100)
    num_frames: int = 100
    packer_dim: int = 1024
    packer_heads: int = 8
    spatial_factor: int = 3
    temporal_factor: int = 5
    fast_factor: int = 3
    pack_images: bool = False
    packer_execution: str = "folded"
    vision_chunk_frames: int = 8
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.compat not in ("paper", "released"):
            raise ValueError(f"compat must be 'paper' or 'released', got {self.compat!r}")
        self.num_bins = tuple(self.num_bins)
        names = {**VISUAL_TOKENS, **TEMPLATE_TOKENS}
        if self.token_ids is None:  # the published order, at the end of the vocabulary
            first = self.text_config.vocab_size - len(names)
            self.token_ids = {name: first + i for i, name in enumerate(names)}
        if missing := [name for name in names if name not in self.token_ids]:
            raise ValueError(f"token_ids has no {', '.join(missing)}")
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    @property
    def vocab_size(self) -> int:
        """V, without anchors."""
        return self.text_config.vocab_size

    @property
    def coordinate_tokens(self) -> CoordinateTokens:
        """The ids that `nn.LanguageAlignedPositionalEmbedding` needs."""
        template = {name: self.token_ids[name] for name in TEMPLATE_TOKENS}
        return CoordinateTokens(self.vocab_size, **template, visual=tuple(self.token_ids[n] for n in VISUAL_TOKENS))

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of a picture, rows and columns."""
        return (self.vision_config.image_size // self.vision_config.patch_size,) * 2

    def image_grid(self) -> tuple[int, int]:
        """Visual tokens of an image.

        Returns:
            Rows and columns.
        """
        return tuple(-(-n // self.spatial_factor) for n in self.patch_grid) if self.pack_images else self.patch_grid

    def video_grids(self, frames: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Visual tokens of a video.

        Args:
            frames: how many are sampled.

        Returns:
            `(fast, slow)`, of each stream its frames, rows and columns.
        """
        packed = [-(-n // self.spatial_factor) for n in self.patch_grid]
        fast = (frames, *(-(-n // self.fast_factor) for n in packed))
        return fast, (-(-frames // self.temporal_factor), *packed)


__all__ = ["LlavaStConfig"]
