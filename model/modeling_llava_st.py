"""LLaVA-ST: a frozen vision tower, llava_st_ops' visual tokenizer, and any causal language model of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, Cache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from llava_st_ops.nn import (
    LanguageAlignedPositionalEmbedding,
    PointToRegionPacker,
    SpatialTemporalPacker,
    VisualTokenizer,
)
from llava_st_ops.ops.checks import can_read

from .configuration_llava_st import LlavaStConfig
from .packed_rows import padding_follows, places_in_samples, without_first_tokens
from .vision_tower import vision_features

_IMAGE_PLACES = ("im_start", "im_patch", "im_end")
_VIDEO_PLACES = ("vid_start", "vid_patch", "vid_end", "slow_vid_start", "slow_vid_end")
# Inputs without a row per sample: pictures of all samples one after the other, or what became of them.
_MEDIA_INPUTS = ("pixel_values", "pixel_values_videos", "video_frames", "visual_tokens")
# Modules of `LlavaStForConditionalGeneration` that stay as they are when the language model is quantized.
NOT_QUANTIZED = ("lm_head", "model.vision_tower", "model.visual_tokenizer")
# Settings of language models whose heads do more than a matrix product.
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_PROMPT_INPUTS = (*_MEDIA_INPUTS, "visual_index", "positions")


@dataclass
class LlavaStOutput(ModelOutput):
    """
    Attributes:
        loss: a scalar, where labels were given.
        logits: `[B, kept, V + anchors]`: words, then anchors of time, height and width.
        cache: keys and values of the language model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LlavaStPreTrainedModel(PreTrainedModel):
    """What both models share: loading, saving and initialisation, as in transformers."""

    config_class = LlavaStConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("VisualTokenizer",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As in transformers. `quantization_config` of bitsandbytes is for the language model's layers alone."""
        if isinstance(quantization := options.get("quantization_config"), BitsAndBytesConfig):
            quantization = options["quantization_config"] = copy.deepcopy(quantization)
            skipped = {*(quantization.llm_int8_skip_modules or ()), *NOT_QUANTIZED}
            quantization.llm_int8_skip_modules = sorted(skipped)
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.vision_tower.requires_grad_(False)  # loading makes new parameters
        if model.can_generate() and model.generation_config.suppress_tokens is None:
            model.suppress_placeholders()  # a checkpoint without generation_config.json
        tokenizer = model.base_model.visual_tokenizer
        if hasattr(model, "hf_device_map") and not any(p.is_meta for p in tokenizer.parameters()):
            # accelerate's hooks would only move inputs, which `encode` does, and keep the tokenizer from folding.
            remove_hook_from_module(tokenizer, recurse=True)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        # Called from the leaves up, with torch's initialisers replaced by ones that leave alone what was loaded.
        super()._init_weights(module)
        if isinstance(module, LanguageAlignedPositionalEmbedding | PointToRegionPacker):
            module.reset_parameters()


class LlavaStModel(LlavaStPreTrainedModel):
    """Everything but the head: pictures to visual tokens, tokens to input embeddings, the language model.

    Args:
        config: what the model is made of; its weights are random.

    Raises:
        ValueError: the language model has no plain embedding.
    """

    def __init__(self, config: LlavaStConfig) -> None:
        super().__init__(config)
        features, width = config.vision_config.hidden_size, config.text_config.hidden_size
        projector = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        lape = None
        if config.lape:
            lape = LanguageAlignedPositionalEmbedding(
                config.num_bins, width, tokens=config.coordinate_tokens, compat=config.compat
            )
        packer = SpatialTemporalPacker(
            width,
            config.packer_dim,
            config.packer_heads,
            config.spatial_factor,
            config.temporal_factor,
            config.fast_factor,
        )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_tower.requires_grad_(False)
        self.visual_tokenizer = VisualTokenizer(projector, lape, packer, execution=config.packer_execution)
        self.language_model = AutoModel.from_config(config.text_config)
        self.trainable_rows: nn.Module | None = None  # training's, in place of rows of a frozen embedding
        embedding = self.language_model.get_input_embeddings()
        if type(embedding) is not nn.Embedding:
            raise ValueError(f"text_config: its model has no plain embedding, but a {type(embedding).__name__}")
        self.post_init()

    @property
    def lape(self) -> LanguageAlignedPositionalEmbedding | None:
        """The positions; None where the configuration has none."""
        return self.visual_tokenizer.lape

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The visual tokens of images.

        Args:
            pixel_values: `[N, 3, S, S]` with values in [-1, 1], S the tower's `image_size`.

        Returns:
            `[N, rows * columns, C]`, row by row.

        Raises:
            ValueError: another size of pictures.
        """
        features = self._vision_features(pixel_values)
        images = self.visual_tokenizer.images(features.unsqueeze(1))
        if self.config.pack_images:
            images = self.visual_tokenizer.packer.spatial(images)
        return images.flatten(1, 3)

    def get_video_features(self, pixel_values_videos: Tensor, video_frames: Tensor) -> list[Tensor]:
        """The visual tokens of videos.

        Args:
            pixel_values_videos: the frames of all videos, one after the other, `[frames, 3, S, S]` in [-1, 1].
            video_frames: int64 `[videos]`, how many frames each has.

        Returns:
            `[places, C]` of each video, the fast stream frame by frame, then the slow one.

        Raises:
            ValueError: another size of pictures, or another number of frames than video_frames says.
        """
        counts = [int(count) for count in video_frames]
        if sum(counts) != len(pixel_values_videos):
            raise ValueError(f"video_frames: expected {len(pixel_values_videos)} frames in all, got {counts}")
        videos = self._vision_features(pixel_values_videos).split(counts)
        tokens: dict[int, Tensor] = {}
        for count in set(counts):  # videos of the same length together
            which = [i for i, other in enumerate(counts) if other == count]
            slow, fast = self.visual_tokenizer(torch.stack([videos[i] for i in which]))
            tokens.update(zip(which, torch.cat([fast.flatten(1, 3), slow.flatten(1, 3)], 1), strict=True))
        return [tokens[i] for i in range(len(counts))]

    def encode(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
    ) -> Tensor | None:
        """The visual tokens of a batch.

        Args:
            pixel_values: `[images, 3, S, S]`, see `get_image_features`.
            pixel_values_videos: `[frames, 3, S, S]`, see `get_video_features`.
            video_frames: int64 `[videos]`, see `get_video_features`.

        Returns:
            `[places, C]`, of all images, then of all videos; None where there are neither.

        Raises:
            ValueError: another size of pictures; videos without `video_frames`, or with another number of frames.
        """
        tokens = []
        if pixel_values is not None and len(pixel_values):
            tokens.append(self.get_image_features(pixel_values).flatten(0, 1))
        if pixel_values_videos is not None and len(pixel_values_videos):
            if video_frames is None:
                raise ValueError("pixel_values_videos needs video_frames, the number of frames of each video")
            tokens += self.get_video_features(pixel_values_videos, video_frames)
        return torch.cat(tokens) if tokens else None

    def visual_index(self, input_ids: Tensor, shared: bool = False) -> Tensor:
        """Which row of `encode`'s result goes where.

        Args:
            input_ids: `[B, L]`.
            shared: every sample shows the same images and videos, which were encoded once.

        Returns:
            int64 `[B, L]`; -1 where none does.
        """

        def places(names: tuple[str, ...]) -> Tensor:
            found = torch.zeros_like(input_ids, dtype=torch.bool)
            for name in names:
                found = found | (input_ids == self.config.token_ids[name])
            return found

        def count(mask: Tensor) -> Tensor:
            return mask.cumsum(1) if shared else mask.flatten().cumsum(0).view_as(mask)

        image, video = places(_IMAGE_PLACES), places(_VIDEO_PLACES)
        images = image.sum(1, keepdim=True) if shared else image.sum()
        index = torch.where(video, images + count(video) - 1, count(image) - 1)
        index = index.masked_fill(~(image | video), -1)
        if self.config.compat == "released":  # there the places of the fast stream keep their placeholders
            fast, slow = (places((name,)).cumsum(1) for name in ("vid_start", "slow_vid_start"))
            index = index.masked_fill(video & (fast > slow), -1)
        return index

    def embed(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_index: Tensor | None = None,
    ) -> Tensor:
        """The input embeddings of a batch, in one pass.

        Args:
            input_ids: `[B, L]`; ids from V on are anchors.
            positions: float64 `[B, L]`, fractions at template tokens, NaN elsewhere.
            visual_tokens: what `encode` gives, `[places, C]`.
            visual_index: what `visual_index` gives, `[B, L]`; computed from the ids where it is None.

        Returns:
            `[B, L, C]`, in the dtype of the embedding.

        Raises:
            ValueError: on the CPU, ids out of range, a template token without a position, or another number of places
                than of visual tokens; on a GPU these rows are NaN. Also an adapter on the embedding, or one offloaded.
            TypeError: positions in 16 bits.
        """
        weight = _plain_weight(self.get_input_embeddings(), "the embedding")
        if weight.is_meta and not input_ids.is_meta:
            raise ValueError("the embedding matrix is offloaded; device_map may offload layers, but not this")
        if visual_tokens is not None:
            visual_tokens = visual_tokens.to(weight)
            if visual_index is None:
                visual_index = self.visual_index(input_ids)
                _check_places(visual_index, len(visual_tokens))
        if self.lape is not None:
            embeds = self.lape.embed(input_ids, weight, positions, visual=visual_tokens, visual_index=visual_index)
        else:
            embeds = nn.functional.embedding(input_ids, weight)
            if visual_tokens is not None:
                visual = visual_tokens[visual_index.clamp(min=0)]
                embeds = torch.where(visual_index.unsqueeze(-1) >= 0, visual, embeds)
        if self.trainable_rows is not None:
            embeds = self.trainable_rows(embeds, input_ids, visual_index)
        return embeds

    def _vision_features(self, pixels: Tensor) -> Tensor:
        features = vision_features(self.vision_tower, pixels, self.config.vision_chunk_frames)
        return features.to(self.visual_tokenizer.projector[0].weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model without its head.

        Args:
            input_ids: `[B, L]`; or `inputs_embeds` in their place.
            attention_mask: `[B, L]`, as in any model of transformers.
            position_ids: `[B, L]`, likewise.
            cache: likewise.
            inputs_embeds: `[B, L, C]`.
            positions: float64 `[B, L]`, as in `embed`.
            pixel_values: `[images, 3, S, S]`, as in `encode`.
            pixel_values_videos: `[frames, 3, S, S]`, as in `encode`.
            video_frames: int64 `[videos]`, as in `encode`.
            visual_tokens: `[places, C]`, what `encode` gave, in place of pictures.
            visual_index: `[B, L]`, as in `embed`.
            kwargs: further arguments of the language model.

        Returns:
            The language model's outputs; `last_hidden_state` is `[B, L, C]`.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; else as `embed` and `encode`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            if visual_tokens is None:
                visual_tokens = self.encode(pixel_values, pixel_values_videos, video_frames)
            inputs_embeds = self.embed(input_ids, positions, visual_tokens, visual_index)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )


def _plain_weight(module: nn.Module, name: str) -> Tensor:
    """The weight of a module of which no more than that is used."""
    if any(hasattr(module, adapter) for adapter in ("lora_A", "lora_embedding_A")):
        raise ValueError(f"{name} has an adapter, which would be ignored; train it whole (modules_to_save), or in rows")
    return module.weight


def _check_places(visual_index: Tensor, visual_tokens: int) -> None:
    """On the CPU; on a GPU, where this would be waited for, places without a token become NaN."""
    if can_read(visual_index):
        places = int(visual_index.max()) + 1
        if places != visual_tokens:
            raise ValueError(
                f"input_ids has places for {places} visual tokens, but the images and videos have {visual_tokens}"
            )


class LlavaStForConditionalGeneration(LlavaStPreTrainedModel, GenerationMixin):
    """LLaVA-ST with its head: logits over words and anchors, the loss, and `generate`.

    Args:
        config: what the model is made of; its weights are random.

    Raises:
        ValueError: a language model that changes its logits, or has no plain embedding.
    """

    def __init__(self, config: LlavaStConfig) -> None:
        super().__init__(config)
        self.model = LlavaStModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        for scale in _SCALED_LOGITS:
            if getattr(config.text_config, scale, None) not in (None, 1, 1.0):
                raise ValueError(f"text_config: models that change their logits ({scale}) are not supported")
        # What transformers' Trainer asks: whether the loss is divided by num_items_in_batch here, or by the Trainer.
        self.accepts_loss_kwargs = config.compat == "paper"
        self.suppress_placeholders()
        self.post_init()

    def suppress_placeholders(self) -> None:
        """Template and visual tokens do not stand for themselves: they are never an answer."""
        self.generation_config.suppress_tokens = sorted(self.config.token_ids.values())

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def enable_input_require_grads(self) -> None:
        """Gradients for the language model's input, which re-entrant checkpointing of a frozen model needs."""

        def require(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if not options["inputs_embeds"].requires_grad:
                options["inputs_embeds"].requires_grad_(True)

        self.disable_input_require_grads()
        self._require_grads = self.model.language_model.register_forward_pre_hook(require, with_kwargs=True)

    def disable_input_require_grads(self) -> None:
        if getattr(self, "_require_grads", None) is not None:
            self._require_grads.remove()
            self._require_grads = None

    def encode(self, *arguments: Any, **options: Any) -> Tensor | None:
        """As `LlavaStModel.encode`.

        Args:
            arguments: its arguments.
            options: likewise.

        Returns:
            `[places, C]`; None where there are no pictures.
        """
        return self.model.encode(*arguments, **options)

    def visual_index(self, input_ids: Tensor, shared: bool = False) -> Tensor:
        """As `LlavaStModel.visual_index`.

        Args:
            input_ids: `[B, L]`.
            shared: every sample shows the same images and videos, which were encoded once.

        Returns:
            int64 `[B, L]`; -1 where no visual token goes.
        """
        return self.model.visual_index(input_ids, shared)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_index: Tensor | None = None,
        sample: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaStOutput:
        """Logits of a batch, or its loss.

        Args:
            input_ids: `[B, L]`, with a block of placeholders for each image and video; ids from V on are anchors.
            attention_mask: `[B, L]`, as in any model of transformers. Several samples packed in one row have none.
            position_ids: `[B, L]`; those of packed samples start again.
            cache: keys and values of what came before.
            inputs_embeds: `[B, L, C]`, in place of input_ids.
            labels: `[B, L]`, not shifted, -100 where there is none.
            positions: float64 `[B, L]`, fractions at template tokens, of labels as well as inputs; NaN elsewhere.
            pixel_values: the images of all samples in reading order, `[images, 3, S, S]`.
            pixel_values_videos: the frames of all videos in reading order, `[frames, 3, S, S]`.
            video_frames: int64 `[videos]`, the number of frames of each.
            visual_tokens: `[places, C]`, what `encode` gave, in place of pictures.
            visual_index: `[B, L]`, see `visual_index`.
            sample: int64 `[B, L]`, which sample each token of packed rows belongs to. Packed rows need it: position_ids
                follow from it where there are none, no cache is made, no sample's first token is a target, and the loss
                of `compat="released"` averages over each sample first.
            num_items_in_batch: what the sum of losses is divided by, where several batches make a step
                (`compat="paper"`); by default the number of targets.
            logits_to_keep: as in transformers: the last so many, or those at these indices; 0: all. By default all, or,
                where there are labels, none: the loss does not need them.
            kwargs: further arguments of the language model; `return_dict`.

        Returns:
            `LlavaStOutput`; with `return_dict=False` a tuple of what it has.

        Raises:
            ValueError, TypeError: as `LlavaStModel.embed`; of pictures, as `LlavaStModel.get_video_features`.
        """
        return_dict = kwargs.pop("return_dict", True)
        if sample is not None:
            kwargs["use_cache"] = False  # with one transformers takes a packed row for one sample
            position_ids = places_in_samples(sample) if position_ids is None else position_ids
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=None if self._mask_is_idle(labels, attention_mask) else attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            positions=positions,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            visual_tokens=visual_tokens,
            visual_index=visual_index,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = without_first_tokens(labels.to(hidden.device), attention_mask, sample)
            loss = self._loss(hidden, labels, positions, sample, num_items_in_batch)
        if labels is None or logits_to_keep is not None:
            kept = logits_to_keep or 0 if not isinstance(logits_to_keep, Tensor) else logits_to_keep
            logits = self.logits(hidden[:, slice(-kept, None) if isinstance(kept, int) else kept])
        output = LlavaStOutput(loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions)
        return output if return_dict is not False else output.to_tuple()

    def _mask_is_idle(self, labels: Tensor | None, attention_mask: Tensor | None) -> bool:
        """Whether the loss is the same without the mask, and sooner there: given one, torch's attention computes what
        it hides as well, and on a GPU does not take its fastest kernel."""
        if labels is None or attention_mask is None or torch.compiler.is_compiling():
            return False
        sdpa = self.model.language_model.config._attn_implementation == "sdpa"
        return sdpa and padding_follows(attention_mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over words, then anchors of time, height and width. No matrix of head and tables together is made.

        Args:
            hidden: last hidden states, `[..., C]`.

        Returns:
            `[..., V + anchors]`.
        """
        words = self.lm_head(hidden)
        if self.model.lape is None:
            return words
        return torch.cat([words, *(hidden @ table.to(hidden).T for table in self.model.lape.output_tables())], -1)

    def token_losses(self, hidden: Tensor, labels: Tensor, positions: Tensor | None) -> Tensor:
        """What each token loses that predicts the next.

        Args:
            hidden: last hidden states, `[B, L, C]`.
            labels: `[B, L]`, not shifted, -100 where there is none.
            positions: float64 `[B, L]`, fractions at template tokens of labels, NaN elsewhere.

        Returns:
            `[B, L]`, in float32 or better; 0 where the next is no target.
        """
        if self.model.lape is not None:
            head = _plain_weight(self.lm_head, "the head")
            return self.model.lape.loss(hidden, labels, positions, head, reduction="none")
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # the first stage: words alone
        active = targets != -100
        logits = self.lm_head(hidden[active]).float()
        losses = nn.functional.cross_entropy(logits, targets[active], reduction="none")
        return losses.new_zeros(targets.shape).masked_scatter(active, losses)

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        sample: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        if self.model.lape is None:
            targets = (labels[:, 1:] != -100).sum().clamp(min=1)
            losses = self.token_losses(hidden, labels, positions).sum()
            return losses / (targets if num_items_in_batch is None else num_items_in_batch)
        if self.config.compat == "released":
            options = {"reduction": "per_sample_sum", "sample": sample}
        else:
            options = {"reduction": "mean", "normalizer": num_items_in_batch}
        head = _plain_weight(self.lm_head, "the head")
        return self.model.lape.loss(hidden, labels, positions, head, **options)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers, greedy by default; without assisted decoding, which knows no anchors."""
        settings = options.get("generation_config") or self.generation_config
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if options.get(name) is not None or getattr(settings, name, None) is not None:
                raise ValueError(
                    f"generate: {name} is not supported, since the ids of anchors are beyond the vocabulary"
                )
        return super().generate(*arguments, **options)

    def compute_transition_scores(self, *arguments: Any, **options: Any) -> Tensor:
        """As in transformers."""
        wide = copy.copy(self)  # transformers takes the number of scores from the config
        wide.config = copy.deepcopy(self.config)
        wide.config.text_config.vocab_size += sum(self.config.num_bins) if self.config.lape else 0
        return GenerationMixin.compute_transition_scores(wide, *arguments, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if kwargs.get("sample") is not None:
            raise ValueError("generate: packed rows cannot be continued; pad the samples on the left")
        prompt = {name: kwargs.pop(name, None) for name in _PROMPT_INPUTS}
        # Without a cache the prompt comes again in every step.
        shows_prompt = is_first_iteration or not kwargs.get("use_cache", True)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not shows_prompt or inputs.get("inputs_embeds") is not None:
            return inputs
        if prompt["visual_index"] is None and any(prompt[name] is not None for name in _MEDIA_INPUTS):
            prompt["visual_index"] = self.visual_index(input_ids)
        # What has a column per token follows the ids: tokens were added to the prompt, or some of it is in the cache.
        length, kept = input_ids.shape[1], inputs["input_ids"].shape[1]
        for name, fill in (("visual_index", -1), ("positions", float("nan"))):
            if (given := prompt[name]) is not None:
                missing = length - given.shape[1]
                prompt[name] = nn.functional.pad(given, (0, missing), value=fill)[:, length - kept :]
        return {**inputs, **prompt}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Pictures have no row per sample: the copies of a sample point to the same ones.
        media = {name: kwargs.pop(name) for name in _MEDIA_INPUTS if kwargs.get(name) is not None}
        if media and input_ids is not None and kwargs.get("visual_index") is None:
            kwargs["visual_index"] = self.visual_index(input_ids)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **media}

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """As in transformers; coordinates then begin at the new vocabulary size.

        The config is copied first: one that other models share stays as it is.
        """
        self.config = self.model.config = copy.deepcopy(self.config)
        self.model.language_model.config = self.config.text_config
        embedding = super().resize_token_embeddings(*arguments, **options)
        if self.model.lape is not None:
            self.model.lape.tokens = self.config.coordinate_tokens
        return embedding


__all__ = ["LlavaStForConditionalGeneration", "LlavaStModel", "LlavaStPreTrainedModel"]
