"""Answers as text, word by word while they are generated."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import BaseStreamer

from .configuration_llava_st import LlavaStConfig
from .generation import CoordinateRecorder
from .media import Media


class AnswerWriter:
    """Writes an answer token by token: coordinates in seconds and pixels, or as fractions where there are no media.

    Args:
        config: the model's.
        tokenizer: the model's.
        media: what the coordinates are about.
        silent: ids that are not written: the end of the answer, padding.
    """

    def __init__(
        self, config: LlavaStConfig, tokenizer: PreTrainedTokenizerBase, media: Media | None, silent: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._media = media
        self._silent = silent
        times, heights, _ = config.num_bins
        self._first_anchor = config.vocab_size
        self._heights, self._widths = config.vocab_size + times, config.vocab_size + times + heights
        self._words: list[int] = []  # since the last coordinate
        self._written = 0  # of their text
        self._behind_coordinate = False

    def add(self, token: int, position: float) -> str:
        """The text that a token adds; "" for half a letter. `position` is a fraction, of anchors."""
        if token in self._silent:
            return ""
        if token < self._first_anchor:
            self._words.append(token)
            return self._words_since(complete=False)
        words = self.end()
        comma = ", " if self._behind_coordinate and not words else ""
        self._behind_coordinate = True
        return words + comma + self._number(token, position)

    def end(self) -> str:
        """What is left when no token follows."""
        rest = self._words_since(complete=True)
        self._words, self._written = [], 0
        return rest

    def _words_since(self, complete: bool) -> str:
        # All words at once: some tokenizers take blanks for the beginning of a text away.
        text = self._tokenizer.decode(self._words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not complete:
            return ""
        new, self._written = text[self._written :], len(text)
        self._behind_coordinate &= not new
        return new

    def _number(self, token: int, position: float) -> str:
        if self._media is None:
            return f"{position:.3f}"
        if token < self._heights:
            return f"{self._media.seconds(position):.2f}"
        return f"{position * (self._media.height if token < self._widths else self._media.width):.1f}"

    def write(self, tokens: Tensor, positions: Tensor) -> str:
        """The text of all tokens `[n]` with their positions `[n]`."""
        pieces = [self.add(*each) for each in zip(tokens.tolist(), positions.tolist(), strict=True)]
        return "".join([*pieces, self.end()])


class AnswerStream(BaseStreamer):
    """The text of one answer, piece by piece, from a `generate` in another thread.

    Args:
        writer: a new one.
        recorder: the one that `generate` has as a processor.
        decoder: see `CoordinateRecorder.positions`.
    """

    def __init__(self, writer: AnswerWriter, recorder: CoordinateRecorder, decoder: str) -> None:
        self._writer = writer
        self._recorder = recorder
        self._decoder = decoder
        self._pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self._steps: int | None = None

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each new token `[1]`."""
        if self._steps is None:
            self._steps = 0
            return
        position = self._recorder.positions(value[None], decoder=self._decoder, first_step=self._steps)
        self._steps += 1
        self._pieces.put(self._writer.add(int(value), float(position)))

    def end(self) -> None:
        """Called by `generate` behind the last token."""
        self._pieces.put(self._writer.end())

    def close(self, error: BaseException | None = None) -> None:
        """No piece follows; whoever iterates gets the error."""
        self._pieces.put(error)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece


class Cancelled(StoppingCriteria):
    """Ends a generation once `event` is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
