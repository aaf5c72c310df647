"""What LLaVA-ST adds to `generate`: coordinates that are well formed, and positions between anchors."""

from __future__ import annotations

import math
import re
import weakref
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .configuration_llava_st import LlavaStConfig

_GAP = r"[\s,;]*"  # what may stand between coordinates, as `coordinate_text` reads them
# What a token is in the notation of coordinates: bits, since `],[` closes one box and opens another.
_SEPARATOR = 1
_COLON = 2
_COLON_BOX = 4
_OPENS_BOX = 8
_ENDS_BOX = 16  # "]" and nothing but blanks
_ENDS_ENTRY = 32  # "]" and a comma
_OPENS_BRACE = 64
_CLOSES_BRACE = 128
_TIME = 256
_PLACE = 512  # an anchor of height or width
_KINDS = {
    _SEPARATOR: _GAP,
    _COLON: r"\s*:\s*",
    _COLON_BOX: rf"\s*:\s*\[{_GAP}",
    _OPENS_BOX: rf".*\[{_GAP}",
    _ENDS_BOX: r"\]\s*",
    _ENDS_ENTRY: rf"\]\s*[,;]{_GAP}",
    _OPENS_BRACE: rf".*\{{{_GAP}",
    _CLOSES_BRACE: r".*\}.*",
}
# Which words may come next.
_ANY = ".*"
_NONE = r"(?!)"
_OPEN_BOX = rf"\s*\[{_GAP}"
_CLOSE_BOX = r"\].*"
_CLOSE_PLAIN_ENTRY = rf"\](?!{_GAP}\}}).*"
_CLOSE_ENTRY = rf"\]{_GAP}|\]\s*\}}.*"  # in braces
_CLOSE_LAST_ENTRY = r"\]\s*(\}.*)?"
_CLOSE_SPAN = r"\}.*"
_COLONS = rf"\s*:\s*(\[{_GAP})?"
_SEPARATORS = rf"[\s,;]{_GAP}"
_AFTER_ENTRY = rf"\s*\}}.*|{_SEPARATORS}"
_AFTER_LAST_ENTRY = r"\s*\}.*"
_AFTER_PLAIN_ENTRY = rf"(?!{_GAP}\}}).*"  # a brace would belong to the tube
_AFTER_TIME = rf"(?!{_GAP}\}}|\s*:\s*\[{_GAP}[^\s,;]).*"  # and "[" behind a colon would be a box
_AFTER_TIME_AND_GAP = rf"(?!{_GAP}\}}|\s*:).*"
_WORDS = (
    *(_ANY, _NONE, _OPEN_BOX, _CLOSE_BOX, _CLOSE_PLAIN_ENTRY, _CLOSE_ENTRY, _CLOSE_LAST_ENTRY, _CLOSE_SPAN, _COLONS),
    *(_SEPARATORS, _AFTER_ENTRY, _AFTER_LAST_ENTRY, _AFTER_PLAIN_ENTRY, _AFTER_TIME, _AFTER_TIME_AND_GAP),
)
# Where: right behind the ending or behind separators that follow it; outside of braces or within. 0: anywhere.
_DIRECTLY, _LATER, _PLAIN, _BRACED = 1, 2, 4, 8


class _Rule(NamedTuple):
    """What may follow.

    Attributes:
        ending: the kinds of the last tokens, leaving separators at the end aside.
        words: the words that may follow.
        axis: whose anchors may follow, -1 for none.
        after: only those after the anchor so many tokens back; 0: all.
        starts: the last anchor may not follow, so that there is one after it.
        ascends: an entry of a tube: the next one's time comes after its own.
        last_words: the words that may follow where no time comes after its own.
        where: `_DIRECTLY` and so on.
    """

    ending: tuple[int, ...]
    words: str
    axis: int = -1
    after: int = 0
    starts: bool = False
    ascends: bool = False
    last_words: str | None = None
    where: int = 0


_FOUR = (_PLACE, _PLACE, _PLACE, _PLACE)


def _tube(*entry: int) -> list[_Rule]:
    """The rules at the end of a tube's entry, and behind it."""
    behind = {"axis": 0, "after": len(entry) + 1, "ascends": True}
    either = (*entry, _ENDS_BOX | _ENDS_ENTRY)
    return [
        _Rule(entry, _CLOSE_ENTRY, -1, len(entry), ascends=True, last_words=_CLOSE_LAST_ENTRY, where=_BRACED),
        _Rule(entry, _CLOSE_PLAIN_ENTRY),
        _Rule((*entry, _ENDS_BOX), _AFTER_ENTRY, **behind, last_words=_AFTER_LAST_ENTRY, where=_BRACED | _DIRECTLY),
        _Rule(either, _SEPARATORS, **behind, where=_BRACED),
        _Rule(either, _AFTER_PLAIN_ENTRY, **behind),
    ]


# The first one that fits holds.
_RULES = (
    _Rule((_TIME, _COLON), _OPEN_BOX),
    _Rule((_OPENS_BRACE,), _NONE, 0, starts=True),
    _Rule((_OPENS_BRACE, _TIME), _COLONS, 0, after=1),
    _Rule((_OPENS_BRACE, _TIME, _TIME), _CLOSE_SPAN),
    _Rule((_OPENS_BOX,), _NONE, 2, starts=True),
    _Rule((_OPENS_BOX, _PLACE), _NONE, 1, starts=True),
    _Rule((_OPENS_BOX, _PLACE, _PLACE), _NONE, 2, after=2),
    _Rule((_OPENS_BOX, _PLACE, _PLACE, _PLACE), _NONE, 1, after=2),
    *_tube(_TIME, _COLON_BOX, *_FOUR),
    *_tube(_TIME, _COLON, _OPENS_BOX, *_FOUR),
    _Rule((_OPENS_BOX, *_FOUR), _CLOSE_BOX),
    _Rule((_TIME,), _COLONS, where=_BRACED),
    _Rule((_TIME,), _AFTER_TIME, 0, where=_DIRECTLY),
    _Rule((_TIME,), _AFTER_TIME_AND_GAP, 0),
    _Rule((), _ANY, 0),
)
_MEMORY = max(len(rule.ending) for rule in _RULES)

_Vocabulary = tuple[Tensor, Tensor]
_vocabularies: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, _Vocabulary]] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> _Vocabulary:
    """What each word is, int16 `[V]`, and whether it is in each of `_WORDS`, bool `[sets, V]`.

    Reads the whole vocabulary, once for each tokenizer.
    """
    known = _vocabularies.setdefault(tokenizer, {})
    if size not in known:
        texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
        # Most words have none of these signs.
        special = [i for i, text in enumerate(texts) if not text.strip() or any(sign in text for sign in ",;:[]{}")]
        kinds = torch.zeros(size, dtype=torch.int16)
        words = torch.tensor([bool(re.fullmatch(pattern, "word")) for pattern in _WORDS])[:, None].repeat(1, size)
        kind_patterns = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _KINDS.items()}
        word_patterns = [re.compile(pattern, re.DOTALL) for pattern in _WORDS]
        for i in special:
            kinds[i] = sum(kind for kind, pattern in kind_patterns.items() if pattern.fullmatch(texts[i]))
            words[:, i] = torch.tensor([bool(pattern.fullmatch(texts[i])) for pattern in word_patterns])
        known[size] = kinds, words
    return known[size]


class CoordinateSyntax(LogitsProcessor):
    """Lets only well-formed coordinates be generated; for batches, beams and sampling alike.

    - After a word that ends with `[`: width, height, width, height, and a word that begins with `]`. The right edge is
      right of the left one, the bottom below the top. Nowhere else are there anchors of width and height.
    - After a word that ends with `{`: two times, the second later, and a word that begins with `}`; or the first entry
      of a tube in braces, which end when the tube does.
    - After a time and a colon: a box. Times of a tube, whose entries only blanks and commas separate, ascend.
    - Times are free elsewhere (`Ends in <TEMP-040>`), and so are words. Template and visual tokens are not.

    `coordinate_text.read` finds no problems in such answers, unless they are cut off. There always is a choice: a start
    is never the last anchor, and words may follow the last time of a tube.

    Nothing is remembered between calls: all follows from the ids after the prompt, without waiting for a device.

    Args:
        config: the model's.
        tokenizer: any whose vocabulary has the brackets.
        prompt_length: columns of input_ids that are the prompt, whose brackets do not count.
        allow_empty: spans and boxes may end where they start. Such answers overlap nothing, so that by default they
            reach at least to the next anchor; then starts also precede ends after `CoordinateRecorder.positions`.

    Raises:
        ValueError: a vocabulary without brackets or colon.
    """

    def __init__(
        self,
        config: LlavaStConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        *,
        allow_empty: bool = False,
    ) -> None:
        self.prompt_length = prompt_length
        self.vocab_size = config.vocab_size
        self.num_bins = bins = config.num_bins
        kinds, words = _vocabulary(tokenizer, config.vocab_size)
        for name, pattern in {"[": _OPEN_BOX, "]": _CLOSE_LAST_ENTRY, "}": _CLOSE_SPAN, ":": _COLONS}.items():
            if not words[_WORDS.index(pattern)].any():
                raise ValueError(f"tokenizer: expected a word for {name!r} in its vocabulary, found none")
        words = words.clone()
        words[:, list(config.token_ids.values())] = False
        # A window's tokens, then a number that says where it is.
        patterns = [(0,) * (_MEMORY - len(rule.ending)) + rule.ending for rule in _RULES]
        step = 0 if allow_empty else 1
        self._tables = {
            "words": words,
            "kinds": torch.cat([kinds, torch.tensor([_TIME] * bins[0] + [_PLACE] * sum(bins[1:]), dtype=torch.int16)]),
            "axes": torch.tensor([axis for axis, count in enumerate(bins) for _ in range(count)]),
            "numbers": torch.cat([torch.arange(count) for count in bins]),
            "endings": torch.tensor(patterns, dtype=torch.int16),
            "gaps": torch.tensor([rule.where & (_DIRECTLY | _LATER) or _DIRECTLY | _LATER for rule in _RULES]),
            "braces": torch.tensor([rule.where & (_PLAIN | _BRACED) or _PLAIN | _BRACED for rule in _RULES]),
            "rule_words": torch.tensor([_WORDS.index(rule.words) for rule in _RULES]),
            "rule_last_words": torch.tensor([_WORDS.index(rule.last_words or rule.words) for rule in _RULES]),
            "rule_axis": torch.tensor([rule.axis for rule in _RULES]),
            "rule_after": torch.tensor([rule.after for rule in _RULES]),
            "rule_step": torch.tensor([1 if rule.ascends else step for rule in _RULES]),
            "rule_ascends": torch.tensor([rule.ascends for rule in _RULES]),
            "rule_last": torch.tensor([max(bins[rule.axis] - 1 - step * rule.starts, 0) for rule in _RULES]),
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[rows, V + anchors]` with -inf for what may not follow."""
        if scores.shape[1] != self.vocab_size + sum(self.num_bins):
            raise ValueError(
                f"scores: expected {self.vocab_size + sum(self.num_bins)} columns, of words and anchors, got "
                f"{scores.shape[1]}"
            )
        self._tables = {name: table.to(scores.device) for name, table in self._tables.items()}
        words, axis, first, last = self._next(input_ids[:, self.prompt_length :].to(scores.device))
        axes, numbers = self._tables["axes"], self._tables["numbers"]
        anchors = (axes == axis[:, None]) & (numbers >= first[:, None]) & (numbers <= last[:, None])
        return scores.masked_fill(~torch.cat([self._tables["words"][words], anchors], 1), -math.inf)

    def _next(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What may follow ids `[rows, n]`: the words of a set (an index of `_WORDS`), and anchors of an axis (or none,
        -1) from the first to the last one; each `[rows]`."""
        tables = self._tables
        ids = nn.functional.pad(ids, (_MEMORY, 0), value=-1)  # tokens that are nothing
        kinds = torch.where(ids >= 0, tables["kinds"][ids.clamp(min=0)], 0)
        numbers = tables["numbers"][(ids - self.vocab_size).clamp(min=0)]
        places = torch.arange(ids.shape[1], device=ids.device)

        def last_place(mask: Tensor) -> Tensor:
            return torch.where(mask, places, 0).amax(1, keepdim=True)

        end = last_place(kinds & _SEPARATOR == 0)
        gap = torch.where(end == places[-1], _DIRECTLY, _LATER)
        opens = kinds & _OPENS_BRACE != 0
        is_braced = last_place(opens) > last_place((kinds & _CLOSES_BRACE != 0) & ~opens)
        brace = torch.where(is_braced, _BRACED, _PLAIN)

        window = end - _MEMORY + 1 + places[:_MEMORY]
        recent = kinds.gather(1, window)[:, None]
        found = ((recent & tables["endings"] != 0) | (tables["endings"] == 0)).all(-1)
        found &= (tables["gaps"] & gap != 0) & (tables["braces"] & brace != 0)
        rule = found.int().argmax(1)  # the first one

        after, last = tables["rule_after"][rule], tables["rule_last"][rule]
        ascends = tables["rule_ascends"][rule]
        next_one = numbers.gather(1, end + 1 - after[:, None].clamp(min=1))[:, 0] + tables["rule_step"][rule]
        first = torch.where(ascends, next_one, torch.where(after > 0, torch.minimum(next_one, last), 0))
        is_last = ascends & (next_one >= self.num_bins[0])
        words = torch.where(is_last, tables["rule_last_words"][rule], tables["rule_words"][rule])
        return words, tables["rule_axis"][rule], first, last


class CoordinateRecorder(LogitsProcessor):
    """Keeps the scores of anchors, and those alone, in every step of a generation; changes nothing.

    What is kept are `steps x rows x anchors` numbers of 4 bytes. One recorder serves one call of `generate`.

    Processors that come before it count: behind `CoordinateSyntax`, anchors that may not follow have no weight in
    positions, so that an end stays behind its start.

    Args:
        config: the model's.
    """

    def __init__(self, config: LlavaStConfig) -> None:
        self.vocab_size = config.vocab_size
        self.num_bins = config.num_bins
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A copy: a view would keep the scores of all words alive.
        self.steps.append(scores[:, self.vocab_size :].to(torch.float32, copy=True))
        return scores

    def positions(
        self,
        sequences: Tensor,
        beam_indices: Tensor | None = None,
        decoder: Literal["expectation", "anchor"] = "expectation",
        first_step: int = 0,
    ) -> Tensor:
        """Positions of the anchors that were generated.

        Args:
            sequences: the new ids `[rows, n]`, without the prompt.
            beam_indices: `[rows, n]`, of a beam search, from its result: which row of a step each token came from.
            decoder: `"anchor"`: anchor k of n is at k / (n - 1); `"expectation"`: the mean of the anchor and its
                neighbours, weighted by their probabilities, as `LanguageAlignedPositionalEmbedding.decode`.
            first_step: the step of the first column.

        Returns:
            float64 `[rows, n]`, fractions of the anchor's axis; NaN at all other tokens.

        Raises:
            ValueError: another `decoder`, or more tokens than steps were recorded.
        """
        if decoder not in ("expectation", "anchor"):
            raise ValueError(f"decoder must be 'expectation' or 'anchor', got {decoder!r}")
        rows, count = sequences.shape
        if first_step + count > len(self.steps):
            raise ValueError(
                f"sequences: expected at most {len(self.steps) - first_step} new tokens, whose scores were recorded, "
                f"got {count}"
            )
        column = sequences - self.vocab_size
        known = column >= 0
        column = column.clamp(min=0)
        # Of each column: its axis' first one, and how many it has.
        starts = torch.tensor([start for n, start in self._axes() for _ in range(n)], device=column.device)
        bins = torch.tensor([n for n, _ in self._axes() for _ in range(n)], device=column.device)
        start, bins = starts[column], bins[column]
        place = (column - start).double()
        if decoder == "expectation" and count:
            row = torch.arange(rows, device=column.device)[:, None] if beam_indices is None else beam_indices
            row = row.to(column.device).long().clamp(min=0)[..., None]
            step = torch.arange(count, device=column.device)[:, None]
            around = column[..., None] + torch.arange(-1, 2, device=column.device)
            exists = (around >= start[..., None]) & (around < (start + bins)[..., None])
            recorded = torch.stack(self.steps[first_step : first_step + count]).to(column.device)
            near = recorded[step, row, around.clamp(0, len(starts) - 1)].double()
            weights = near.masked_fill(~exists, -math.inf).softmax(-1)
            place = (weights * (around - start[..., None])).sum(-1)
        return (place / (bins - 1).clamp(min=1)).masked_fill(~known, math.nan)

    def _axes(self) -> list[tuple[int, int]]:
        """How many anchors each axis has, and the column of its first."""
        return [(bins, sum(self.num_bins[:axis])) for axis, bins in enumerate(self.num_bins)]
