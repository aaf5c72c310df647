"""Conversations to the model's inputs, and the model's ids back to text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llava_st_ops.nn.lape import AXES

from .configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, LlavaStConfig, anchor_tokens
from .coordinate_text import CoordinateText, literal, spell_out
from .image import load_image
from .media import Media
from .prompting.chat import CHATML, ROLES, Prompt, control_tokens, first_tokens, target_of, text_around
from .prompting.content import KINDS, Shown, check_unchanged, read_content
from .prompting.inputs import LlavaStInputs, pack, pad, pictures
from .prompting.tokenizing import to_rows
from .video import load_video

# Settings that a processor and the configuration have under the same name.
_SHARED = ("num_frames", "spatial_factor", "temporal_factor", "fast_factor", "pack_images", "compat")


class LlavaStProcessor(ProcessorMixin):
    """The tokenizer of a LLaVA-ST, and what of its configuration inputs depend on (see `LlavaStConfig`).

    Args:
        tokenizer: with all tokens of LLaVA-ST; a fast one.
        chat_template: by default the tokenizer's, or ChatML where it has none.
        image_size: height and width of the pictures that the vision tower takes.
        patch_grid: its patches, rows and columns.
        num_frames: frames of a video unless told otherwise.
        num_bins: anchors of time, height and width.
        spatial_factor: as in `LlavaStConfig`.
        temporal_factor: likewise.
        fast_factor: likewise.
        pack_images: likewise.
        compat: `"released"`: labels include headers and new lines, as in the published training.

    Raises:
        ValueError: the tokenizer has not all tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_size: int = 384,
        patch_grid: Sequence[int] = (27, 27),
        num_frames: int = 100,
        num_bins: Sequence[int] = (100, 100, 100),
        spatial_factor: int = 3,
        temporal_factor: int = 5,
        fast_factor: int = 3,
        pack_images: bool = False,
        compat: str = "paper",
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHATML)
        self.image_size = image_size
        self.patch_grid = tuple(patch_grid)
        self.num_frames = num_frames
        self.num_bins = tuple(num_bins)
        self.spatial_factor = spatial_factor
        self.temporal_factor = temporal_factor
        self.fast_factor = fast_factor
        self.pack_images = pack_images
        self.compat = compat
        names = {**VISUAL_TOKENS, **TEMPLATE_TOKENS}
        vocabulary = tokenizer.get_vocab()
        anchors = anchor_tokens(self.num_bins)
        if missing := [token for token in (*names.values(), *anchors) if token not in vocabulary]:
            raise ValueError(f"tokenizer: lacks {len(missing)} tokens of LLaVA-ST, {', '.join(missing[:3])} ...")
        self.token_ids = {name: vocabulary[token] for name, token in names.items()}
        self.first_anchor = vocabulary[anchors[0]]
        if [vocabulary[token] for token in anchors] != [*range(self.first_anchor, self.first_anchor + len(anchors))]:
            raise ValueError("tokenizer: expected the anchors to have ids in a row, in the order of anchor_tokens()")

    # Of the same settings as the model's.
    image_grid = LlavaStConfig.image_grid
    video_grids = LlavaStConfig.video_grids

    @classmethod
    def from_config(
        cls, config: LlavaStConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
    ) -> LlavaStProcessor:
        """The processor of a model.

        Args:
            config: the model's.
            tokenizer: with all tokens of LLaVA-ST; a fast one.
            chat_template: by default the tokenizer's, but ChatML for released weights and where it has none.

        Returns:
            A processor with the settings of the configuration.

        Raises:
            ValueError: the tokenizer gives LLaVA-ST's tokens other ids than the configuration.
        """
        if chat_template is None and config.compat == "released":
            chat_template = CHATML
        processor = cls(
            tokenizer,
            chat_template,
            image_size=config.vision_config.image_size,
            patch_grid=config.patch_grid,
            num_bins=config.num_bins,
            **{name: getattr(config, name) for name in _SHARED},
        )
        processor.check_model(config)
        return processor

    def check_model(self, config: LlavaStConfig) -> None:
        """That this is the processor of a model with this config.

        Args:
            config: the model's.

        Raises:
            ValueError: a setting or an id of a token differs; the message says which.
        """
        if self.first_anchor != config.vocab_size:
            raise ValueError(
                f"tokenizer: expected the first anchor to have the config's vocab_size as id, {config.vocab_size}, got "
                f"{self.first_anchor}"
            )
        for name, token_id in self.token_ids.items():
            if token_id != config.token_ids[name]:
                raise ValueError(
                    f"tokenizer: expected the id {config.token_ids[name]} for {name}, as in the config, got {token_id}"
                )
        wanted = {name: getattr(config, name) for name in (*_SHARED, "patch_grid", "num_bins")}
        del wanted["num_frames"]  # any number works
        for name, value in {**wanted, "image_size": config.vision_config.image_size}.items():
            if getattr(self, name) != value:
                raise ValueError(f"processor: expected {name} {value!r}, as in the config, got {getattr(self, name)!r}")

    @property
    def model_input_names(self) -> list[str]:
        pictures = ("pixel_values", "pixel_values_videos", "video_frames")
        return ["input_ids", "attention_mask", "positions", *pictures]

    def __call__(self, conversation: Any, **kwargs: Any) -> LlavaStInputs | Tensor | str | list[str]:
        """`apply_chat_template`."""
        return self.apply_chat_template(conversation, **kwargs)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool = True,
        padding_side: str | None = None,
        return_labels: bool = False,
        num_frames: int | None = None,
        max_length: int | None = None,
        packed: bool = False,
        **template_options: Any,
    ) -> LlavaStInputs | Tensor | str | list[str]:
        """The model's inputs for a conversation or a batch of them.

        A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": ...}`, and a content
        a string or a list of

        - strings, `{"type": "text", "text": ...}`, or an `Answer`: what the model wrote. Coordinates in them are
          fractions, in LLaVA-ST's forms (see `from_text`); with `"coordinates": False`, and in system prompts, nothing
          in them is one, nor is `<image>` or `<video>` the place of one. `CoordinateText` is taken as it is.
        - `{"type": "video", "video": source}`, with `"clip": (first, last)`, `"num_frames"` and `"fps"` if wanted, and
          `{"type": "image", "image": source}`: what `load_video` and `load_image` take, what they gave, or something
          already encoded, which has `tokens` and `media`.
        - `Instant`, `TimeSpan`, `Box` and `Tube`, in seconds and pixels of the last video or image before them, or
          `{"type": "instant", "time": ...}`, `{"type": "span", "start": ..., "end": ...}`, `{"type": "box", "box":
          [left, top, right, bottom]}`, `{"type": "tube", "times": [...], "boxes": [[...], ...]}`, with `"unit":
          "fraction"` if they are fractions.

        `"unit"` and `"coordinates"` beside `"content"` are for all parts of the message that do not say.

        Args:
            conversation: one, or several.
            chat_template: other than the processor's.
            add_generation_prompt: whether the assistant is to go on; by default where it did not speak last.
            tokenize: False: the text, with numbers in the template tokens and `<image>` or `<video>` where these are.
            return_dict: False: `input_ids` alone.
            return_tensors: `"pt"`.
            padding: False: conversations must be equally long.
            padding_side: `"left"` or `"right"`; by default right with labels, and left without.
            return_labels: adds `labels`.
            num_frames: of videos that do not say; by default the model's.
            max_length: longer conversations lose their ends.
            packed: conversations one after another in one row, which `position_ids` and `sample` tell apart, and no
                attention mask.
            template_options: variables of the template.

        Returns:
            `LlavaStInputs` with `input_ids` and `attention_mask` int64 `[B, L]`, `positions` float64 `[B, L]`, NaN
            where a token has none, `labels` int64 `[B, L]`, -100 where there is nothing to learn, `pixel_values`
            `[images, 3, S, S]`, `pixel_values_videos` `[frames of all videos, 3, S, S]` and `video_frames` int64
            `[videos]`; without what does not occur.

        Raises:
            ValueError: the conversation makes no sense; the message says where.
        """
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding: expected True or False, got {padding!r}")
        for name, value in (("max_length", max_length), ("num_frames", num_frames)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt', got {return_tensors!r}")
        batched = bool(conversation) and isinstance(conversation[0], Sequence)
        conversations = conversation if batched else [conversation]
        template = self._resolve_chat_template(chat_template)
        options = {"add_generation_prompt": add_generation_prompt, **template_options}
        control = control_tokens(self.tokenizer)
        prompts = [self._prompt(each, template, control, num_frames, options) for each in conversations]
        if not tokenize:
            texts = [self._spelled_out(prompt) for prompt in prompts]
            return texts if batched else texts[0]
        labels = self.compat if return_labels else None
        rows = to_rows(prompts, self.tokenizer, self.token_ids, labels, max_length)
        lengths = {len(row["input_ids"]) for row in rows}
        if packed:
            data = pack(rows)
        elif padding or len(lengths) == 1:
            pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
            data = pad(rows, pad_id or 0, padding_side or ("right" if return_labels else "left"))
        else:
            raise ValueError(f"padding: conversations of {', '.join(map(str, sorted(lengths)))} tokens need padding")
        if not return_dict:
            return data["input_ids"]
        data |= pictures([each for prompt in prompts for each in prompt.shown])
        return LlavaStInputs(data, media=[[each.media for each in prompt.shown] for prompt in prompts])

    def read_ids(
        self, ids: Tensor | Sequence[int], positions: Tensor | Sequence[float] | None = None
    ) -> CoordinateText:
        """Text and positions of ids, of an answer or a prompt; the ends of turns and visual tokens are left out.

        Args:
            ids: `[N]`. Anchor k of n is at k / (n - 1).
            positions: `[N]`, where they are numbers they count, and not the anchors.

        Returns:
            Text with template tokens, and their positions as fractions.

        Takes whatever a model says; ids that nothing is known of are left out.
        """
        ids = np.asarray(torch.as_tensor(ids).cpu(), dtype=np.int64)
        given = np.full(len(ids), math.nan)
        if positions is not None:
            given = np.asarray(torch.as_tensor(positions).cpu(), dtype=np.float64)
        tokens = np.full(len(ids), "", dtype=object)  # template tokens
        values = given.copy()
        first = self.first_anchor
        for axis, bins in zip(AXES, self.num_bins, strict=True):
            anchors = (ids >= first) & (ids < first + bins)
            tokens[anchors] = TEMPLATE_TOKENS[f"{axis}_output"]
            exact = (ids - first) / max(bins - 1, 1)
            values = np.where(anchors & np.isnan(given), exact, values)
            first += bins
        for name, token in TEMPLATE_TOKENS.items():
            tokens[(ids == self.token_ids[name]) & ~np.isnan(given)] = token
        is_coordinate = tokens != ""
        is_word = (ids >= 0) & (ids < self.first_anchor) & ~np.isin(ids, list(self.token_ids.values()))
        places = np.flatnonzero(is_coordinate)
        runs = [ids[a + 1 : b][is_word[a + 1 : b]].tolist() for a, b in pairwise([-1, *places.tolist(), len(ids)])]
        words = self.tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        written = [literal(run).text + token for run, token in zip(words, [*tokens[places], ""], strict=True)]
        return CoordinateText("".join(written), tuple(values[places].tolist()))

    def _prompt(
        self,
        conversation: Sequence[Mapping[str, Any]],
        template: str,
        control: re.Pattern[str],
        num_frames: int | None,
        options: dict[str, Any],
    ) -> Prompt:
        """The conversation as one text."""
        _check(conversation)
        roles = [message["role"] for message in conversation]
        if options["add_generation_prompt"] is None:
            options = {**options, "add_generation_prompt": roles[-1] != "assistant"}
        around = text_around(self.tokenizer, template, roles, **options)
        prompt = Prompt(around[0])
        for number, (message, after) in enumerate(zip(conversation, around[1:], strict=True)):
            answers = message["role"] == "assistant"
            try:
                pieces = read_content(
                    message["content"],
                    side="output" if answers else "input",
                    load=lambda part: self._load(part, num_frames),
                    current=prompt.shown[-1].media if prompt.shown else None,
                    unit=message.get("unit", "absolute"),
                    coordinates=message.get("coordinates", message["role"] != "system"),
                )
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from error
            if answers and any(isinstance(piece, Shown) for piece in pieces):
                raise ValueError(f"message {number}: the assistant says words and items, got a video or an image")
            start = len(prompt.text)
            prompt.say(pieces, control)
            if answers:
                end = len(prompt.text)
                released = self.compat == "released"
                prompt.targets.append(target_of(prompt.text, start, end, after, control, released))
            prompt.text += after
        return prompt

    def _load(self, part: Mapping[str, Any], num_frames: int | None) -> Shown:
        """The video or image of a part."""
        kind = part["type"]
        source = part[kind]
        if hasattr(source, "tokens") and hasattr(source, "media"):
            check_unchanged(kind, part)
            pixels, media = None, source.media
        elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Media):
            check_unchanged(kind, part)
            pixels, media = source
        elif kind == "image":
            pixels, media = load_image(source, self.image_size)
        else:
            frames = part.get("num_frames") or num_frames or self.num_frames
            pixels, media = load_video(source, frames, self.image_size, part.get("clip"), part.get("fps"))
        if media.kind != kind:
            raise ValueError(f"content: a part of type {kind!r} has {media.kind} data")
        frames = len(media.timestamps)
        if pixels is not None and pixels.shape != (frames, 3, self.image_size, self.image_size):
            raise ValueError(
                f"content: expected pixels [{frames}, 3, {self.image_size}, {self.image_size}] of a {kind}, got "
                f"{list(pixels.shape)}"
            )
        grids = [self.image_grid()] if kind == "image" else self.video_grids(frames)
        streams = tuple(math.prod(grid) for grid in grids)
        if pixels is None and len(source.tokens) != sum(streams):
            raise ValueError(f"content: expected {sum(streams)} visual tokens of a {kind}, got {len(source.tokens)}")
        return Shown(media, pixels, streams)

    def _spelled_out(self, prompt: Prompt) -> str:
        text = spell_out(CoordinateText(prompt.text, tuple(prompt.positions)))
        for kind in KINDS:
            text = text.replace(first_tokens(kind), f"<{kind}>")
        return text


def _check(conversation: Sequence[Mapping[str, Any]]) -> None:
    if not conversation:
        raise ValueError("conversation: expected at least one message, got none")
    for number, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number}: expected a dict with 'role' and 'content', got {message!r:.80}")
        if message["role"] not in ROLES:
            raise ValueError(f"message {number}: role must be one of {', '.join(ROLES)}, got {message['role']!r}")


__all__ = ["LlavaStInputs", "LlavaStProcessor"]
