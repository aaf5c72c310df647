"""Chat templates: where what is said goes, which of it the model learns to say, and what nobody can say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS
from ..coordinate_text import CoordinateText
from .content import Shown

# ChatML with LLaVA-ST's default system prompt.
CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# Characters that no text has: what is said takes their places, and no template can change it on the way.
_MARK = "\ufdd0"
_ANCHOR = re.compile(r"<(?:TEMP|HEIGHT|WIDTH)-\d+>")


def text_around(tokenizer: PreTrainedTokenizerBase, template: str, roles: Sequence[str], **options: Any) -> list[str]:
    """What a chat template puts before the first message, between messages, and behind the last."""
    messages = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    around = re.split(f"{_MARK}([0-9]+){_MARK}", rendered)
    if around[1::2] != [str(i) for i in range(len(roles))]:
        raise ValueError(
            f"chat_template: expected each of the {len(roles)} messages once and in order, got {around[1::2]}"
        )
    return around[::2]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches tokens with a meaning of their own, such as `<|im_end|>` and `<vid_patch>`, template tokens excepted."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or _ANCHOR.fullmatch(token.content)}
    names = names.union(VISUAL_TOKENS.values()).difference(TEMPLATE_TOKENS.values(), [""])
    # By first character, so that most places of a text are passed at once; longest first.
    ordered = sorted(names, key=lambda name: (name[0], -len(name)))
    return re.compile(
        "|".join(
            f"{re.escape(first)}(?:{'|'.join(re.escape(name[1:]) for name in group)})"
            for first, group in groupby(ordered, key=lambda name: name[0])
        )
    )


@dataclass
class Prompt:
    """A conversation as one text, in which a video or an image is the first token of each of its blocks.

    Attributes:
        text: the text.
        positions: of its template tokens.
        shown: its videos and images.
        cuts: places where no token may reach across: behind the first character of what looks like a control token in
            what somebody said.
        targets: first and last place (exclusive) of what the model learns to say.
    """

    text: str = ""
    positions: list[float] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)

    def say(self, pieces: Iterable[CoordinateText | Shown], control: re.Pattern[str]) -> None:
        """Adds what somebody said."""
        for piece in pieces:
            if isinstance(piece, Shown):
                self.text += first_tokens(piece.media.kind)
                self.shown.append(piece)
            else:
                # Looks ahead, so that overlapping ones are found, too.
                found = re.finditer(f"(?={control.pattern})", piece.text)
                self.cuts += [len(self.text) + match.start() + 1 for match in found]
                self.text += piece.text
                self.positions += piece.positions

    def chunks(self) -> list[str]:
        """The text, cut."""
        return [self.text[a:b] for a, b in pairwise([0, *self.cuts, len(self.text)])]


def first_tokens(kind: str) -> str:
    """What stands for the blocks of an image or a video until they are filled in."""
    names = ("im_start",) if kind == "image" else ("vid_start", "slow_vid_start")
    return "".join(VISUAL_TOKENS[name] for name in names)


def target_of(text: str, start: int, end: int, after: str, control: re.Pattern[str], released: bool) -> tuple[int, int]:
    """First and last place (exclusive) of what an assistant's message teaches.

    Args:
        text: of the conversation up to the message, which reaches from `start` to `end`.
        after: what the chat template puts behind it.
        control: see `control_tokens`.
        released: the header, and the new line behind the end, belong to it.
    """
    turn_end = control.match(after)
    length = turn_end.end() if turn_end else 0
    if not released:
        return start, end + length
    header = text.rfind(TURN_START, 0, start)
    return (header if header >= 0 else start), end + length + after.startswith("\n", length)
