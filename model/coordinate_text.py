"""Items as the language model reads and writes them: text in which template tokens stand for positions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from llava_st_ops.nn import lape

from .configuration_llava_st import TEMPLATE_TOKENS
from .geometry import Box, Instant, Item, TimeSpan, Tube

SIDES = ("input", "output")
# Names of the lists of positions in LLaVA-ST's annotations, one for each template token.
VARIABLES = {token: lape.VARIABLES[kind] for kind, token in TEMPLATE_TOKENS.items()}
_TOKEN = re.compile("|".join(map(re.escape, TEMPLATE_TOKENS.values())))
_T, _H, _W = (f"<{axis}-(?:INPUT|OUTPUT)>" for axis in ("TEMP", "HEIGHT", "WIDTH"))
_SPAN_ENDS = ("<TEMP-INPUT>} ", "<TEMP-OUTPUT>} ")
# What may stand between coordinates. Every pattern here begins with a token or a bracket and repeats nothing that could
# match in two ways, so that reading takes linear time, whatever the text.
_GAP = r"[\s,;]*"
# The second half: where a text is cut off.
_TUBE_TIME = rf"{_T}(?=\s*:\s*\[(?:{_GAP}(?:{_W}|{_H})|\s*\Z))"
_ROW = rf"{_TUBE_TIME}\s*:\s*\[{_GAP}{_W}{_GAP}{_H}{_GAP}{_W}{_GAP}{_H}{_GAP}\]"
_TIME = rf"(?!{_TUBE_TIME}){_T}"
_GROUPS = re.compile(
    rf"(?P<tube>(?P<tube_open>\{{\s*)?{_ROW}(?:{_GAP}{_ROW})*(?P<tube_close>\s*\}})?)"
    rf"|(?P<times>(?P<times_open>\{{{_GAP})?{_TIME}(?:{_GAP}{_TIME})*(?P<times_close>{_GAP}\}})?)"
    rf"|(?P<places>(?P<places_open>\[{_GAP})?(?:{_W}|{_H})(?:{_GAP}(?:{_W}|{_H}))*(?P<places_close>{_GAP}\])?)"
    rf"|{_T}"
)
_CORNERS = re.compile(f"{_GAP}{_W}{_GAP}{_H}{_GAP}{_W}{_GAP}{_H}{_GAP}")

# Coordinates as people write them. A number begins where no word or number goes on.
_NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?!\.?\d)"
_DECIMAL = r"(?<![\w.])[-+]?\d*\.\d+(?!\.?\d)"
_LISTED = rf"{_NUMBER}(?!\s*:\s*\[)"
_UNIT = r"\s*(?:%|(?:m|s|ms|secs?|seconds?|mins?|minutes?|hours?)\b)"
_FORMS = re.compile(
    r"<(?P<axis>TEMP|HEIGHT|WIDTH)-(?:INPUT|OUTPUT)(?P<inside>[^<>]{0,40})>"
    # <h1> to <h6> are headings of HTML.
    r"|<(?!h[1-6]>)(?P<letter>[twh])(?P<number>[-+]?[\d.]+)>"
    rf"|(?P<moment>\b(?:[Ss]tarts|[Ee]nds) in )(?P<when>{_DECIMAL})(?!\w|{_UNIT})"
    rf"|(?:(?P<row>{_DECIMAL})\s*:\s*(?=\[))?(?P<open>[\[{{]\s*)?(?P<list>{_LISTED}(?:[\s,]+{_LISTED})+)"
    r"(?P<close>\s*[\]}])?"
)
_LETTERS = {"t": "TEMP", "w": "WIDTH", "h": "HEIGHT"}


@dataclass(frozen=True)
class CoordinateText:
    """Text with template tokens (`<TEMP-INPUT>`, `<WIDTH-OUTPUT>`, ...), and what they stand for.

    Attributes:
        text: the text.
        positions: one fraction for each template token, in reading order.
    """

    text: str
    positions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(_TOKEN.findall(self.text))
        if count != len(self.positions):
            raise ValueError(
                f"text: expected one position for each of its {count} coordinate tokens, got {len(self.positions)}, in "
                f"{self.text[:80]!r}"
            )

    def split(self, pattern: str) -> list[CoordinateText]:
        """The pieces between occurrences of a pattern and, every second one, the occurrences."""
        pieces, used = [], 0
        for piece in re.split(f"({pattern})", self.text):
            count = len(_TOKEN.findall(piece))
            pieces.append(CoordinateText(piece, self.positions[used : used + count]))
            used += count
        return pieces


class Reading(NamedTuple):
    """Text and items in the order of the text, items in fractions, and what could not be read, in words."""

    parts: list[str | Item]
    problems: list[str]


class _Loose(NamedTuple):
    """Coordinates that make no item; `malformed` where they were about to."""

    text: CoordinateText
    problem: str
    malformed: bool


def write(parts: Iterable[str | Item | CoordinateText], side: str) -> CoordinateText:
    """Text and items, these in fractions, as one text in LLaVA-ST's layouts.

    A box is ` [<WIDTH-*><HEIGHT-*><WIDTH-*><HEIGHT-*>]`, a span ` {<TEMP-*><TEMP-*>} `, a point in time `<TEMP-*>`, a
    tube `<TEMP-*>:[...], <TEMP-*>:[...]` with boxes as above but no space. The spaces beside boxes and spans belong to
    the layout: there is one, however many the text around has. Positions are kept as they are.

    Args:
        parts: what to write.
        side: `"input"` in what humans say, `"output"` in what the model says.

    Raises:
        ValueError: a string has template tokens in it, which need positions.
    """
    time, width, height = (_template(axis, side) for axis in ("TEMP", "WIDTH", "HEIGHT"))
    corners = f"[{width}{height}{width}{height}]"
    chunks, positions = [""], []
    for part in parts:
        if isinstance(part, Box):
            _drop_spaces_at_end(chunks)
            chunks.append(f" {corners}")
            positions += _corners(part)
        elif isinstance(part, TimeSpan):
            _drop_spaces_at_end(chunks)
            chunks.append(f" {{{time}{time}}} ")
            positions += [part.start, part.end]
        elif isinstance(part, Instant):
            chunks.append(time)
            positions.append(part.time)
        elif isinstance(part, Tube):
            chunks.append(", ".join([f"{time}:{corners}"] * len(part.times)))
            for moment, box in zip(part.times, part.boxes, strict=True):
                positions += [moment, *_corners(box)]
        else:
            words = part if isinstance(part, CoordinateText) else CoordinateText(part)
            after_span = chunks[-1].endswith(_SPAN_ENDS)
            chunks += _if_any(words.text.lstrip(" ") if after_span else words.text)
            positions += words.positions
    return CoordinateText("".join(chunks), tuple(positions))


def read(text: CoordinateText) -> Reading:
    """The text and the items of a text: the inverse of `write`.

    Takes whatever a model says, in linear time: layouts with or without spaces, commas or semicolons between
    coordinates, and with or without braces around a tube. Coordinates that make no item are written out as numbers in
    the text and are a problem, as are items that contradict themselves (these are given as they are).

    Args:
        text: words with template tokens, and a fraction for each of these.

    Returns:
        Words and items in their order, items in fractions, and the problems.
    """
    parts: list[str | Item] = []
    problems: list[str] = []
    words: list[str] = []  # since the last item
    for piece in _grouped(text):
        if isinstance(piece, str):
            after_span = not words and bool(parts) and isinstance(parts[-1], TimeSpan)
            words.append(piece.lstrip(" ") if after_span else piece)
        elif isinstance(piece, _Loose):
            words.append(plain(piece.text))
            problems.append(piece.problem)
        else:
            before = "".join(words)
            words.clear()
            parts += _if_any(before.rstrip(" ") if isinstance(piece, Box | TimeSpan) else before)
            parts.append(piece)
            problems += _contradictions(piece)
    return Reading(parts + _if_any("".join(words)), problems)


def from_text(text: str, side: str) -> CoordinateText:
    """What a person wrote, with the coordinates in it as template tokens, in the layouts of `write`.

    Coordinates are fractions, in any of these forms: a box `[0.1, 0.2, 0.3, 0.4]`, a span `{0.1, 0.5}`, a tube
    `0.1:[0.1, 0.2, 0.3, 0.4], 0.5:[...]`, `Starts in 0.591` and `Ends in 0.8`; single ones `<t0.1>`, `<w0.3>`, `<h0.9>`
    or `<TEMP-INPUT0.1>`, and any of the above made of these, with or without commas. At least one number of a box or a
    span must have a decimal point: `[1, 2, 3, 4]` and `{0, 1}` stay text, as all other brackets do.

    Args:
        text: what was written.
        side: of the template tokens, `"input"` or `"output"`, whatever the text says.

    Raises:
        ValueError: numbers outside of [0, 1] in one of these forms, brackets without their partner, or a coordinate
            token without a number. The message quotes the place.
    """
    found = CoordinateText(*_tokens_for_numbers(text, side))
    parts: list[str | Item | CoordinateText] = []
    for piece in _grouped(found):
        if isinstance(piece, _Loose) and piece.malformed:
            raise ValueError(f"text: {piece.problem}, in {text[:80]!r}")
        parts.append(piece.text if isinstance(piece, _Loose) else piece)
    return write(parts, side)


def plain(text: CoordinateText, decimals: int = 3) -> str:
    """The text with numbers in place of template tokens: `[0.100, 0.200, 0.300, 0.400]`.

    Args:
        text: words with template tokens, and a fraction for each of these.
        decimals: of the numbers.

    Returns:
        Words alone.
    """
    positions = iter(text.positions)
    separated = re.sub(rf"({_TOKEN.pattern})(?={_TOKEN.pattern})", r"\1, ", text.text)
    return _TOKEN.sub(lambda _: f"{next(positions):.{decimals}f}", separated)


def spell_out(text: CoordinateText) -> str:
    """The text with exact numbers inside of the template tokens: `<TEMP-INPUT0.591>`."""
    positions = iter(text.positions)
    return _TOKEN.sub(lambda token: f"{token[0][:-1]}{float(next(positions))!r}>", text.text)


def literal(text: str) -> CoordinateText:
    """Words and nothing else: what looks like a template token in them loses its hyphen."""
    return CoordinateText(_TOKEN.sub(lambda token: token[0].replace("-", " "), text))


def to_variables(texts: Iterable[CoordinateText]) -> dict[str, list[float]]:
    """LLaVA-ST's six lists of positions of a conversation, from its turns."""
    lists: dict[str, list[float]] = {name: [] for name in VARIABLES.values()}
    for text in texts:
        for token, position in zip(_TOKEN.findall(text.text), text.positions, strict=True):
            lists[VARIABLES[token]].append(position)
    return lists


def from_variables(texts: Sequence[str], variables: Mapping[str, Sequence[float]]) -> list[CoordinateText]:
    """The turns of a conversation with their positions, from LLaVA-ST's lists.

    Args:
        texts: the turns, with template tokens.
        variables: lists by the names in `VARIABLES`. The i-th token of a kind in the conversation takes entry i; a list
            that is not needed may be missing, and may have more entries than needed.

    Raises:
        ValueError: a list is too short.
    """
    needed = {name: sum(text.count(token) for text in texts) for token, name in VARIABLES.items()}
    lists = {name: [float(x) for x in variables.get(name) or ()] for name in needed}
    for name, count in needed.items():
        if len(lists[name]) < count:
            raise ValueError(f"variables: expected {count} entries in {name}, got {len(lists[name])}")
    entries = {token: iter(lists[name]) for token, name in VARIABLES.items()}
    return [CoordinateText(text, tuple(next(entries[token]) for token in _TOKEN.findall(text))) for text in texts]


def _grouped(text: CoordinateText) -> Iterator[str | Item | _Loose]:
    """Words, items and what makes none."""
    at = used = 0
    for match in _GROUPS.finditer(text.text):
        yield text.text[at : match.start()]
        at, first = match.end(), used
        used += len(_TOKEN.findall(match[0]))
        yield from _items(match, text.positions[first:used])
    yield text.text[at:]


def _items(match: re.Match[str], values: tuple[float, ...]) -> Iterator[str | Item | _Loose]:
    found = CoordinateText(match[0], values)
    if match["tube"]:
        corners = [values[i + 1 : i + 5] for i in range(0, len(values), 5)]
        yield Tube(values[::5], tuple(Box(*each) for each in corners))
        if bool(match["tube_open"]) != bool(match["tube_close"]):
            yield _Loose(CoordinateText(""), f"unbalanced brace around the tube {_quote(found)}", True)
    elif match["times"]:
        opened, closed = bool(match["times_open"]), bool(match["times_close"])
        if not opened and not closed:
            for i, piece in enumerate(found.split(_T)):
                yield Instant(piece.positions[0]) if i % 2 else piece.text
        elif opened and closed and len(values) == 2:
            yield TimeSpan(*values)
        else:
            yield _Loose(found, f"expected two times between braces, got {_quote(found)}", True)
    elif match["places"]:
        opened, closed = match["places_open"], match["places_close"]
        inner = match[0].removeprefix(opened or "").removesuffix(closed or "")
        if opened and closed and _CORNERS.fullmatch(inner):
            yield Box(*values)
        elif opened or closed:
            yield _Loose(found, f"expected left, top, right and bottom between brackets, got {_quote(found)}", True)
        else:
            yield _Loose(found, f"coordinates outside of a box: {_quote(found)}", False)
    else:
        yield _Loose(found, f"a time without its box: {_quote(found)}", True)


def _contradictions(item: Item) -> list[str]:
    if isinstance(item, TimeSpan):
        return [f"a span ends before it starts: {item.start:.3f} to {item.end:.3f}"] * (item.end < item.start)
    if isinstance(item, Box):
        corners = ", ".join(f"{x:.3f}" for x in _corners(item))
        across = [f"a box ends left of where it starts: {corners}"] * (item.right < item.left)
        return across + [f"a box ends above where it starts: {corners}"] * (item.bottom < item.top)
    if isinstance(item, Tube):
        found = [problem for box in item.boxes for problem in _contradictions(box)]
        backwards = [(a, b) for a, b in pairwise(item.times) if a >= b]
        return found + [f"times of a tube do not ascend: {a:.3f}, {b:.3f}" for a, b in backwards[:1]]
    return []


def _tokens_for_numbers(text: str, side: str) -> tuple[str, tuple[float, ...]]:
    """The text with a template token for each coordinate, and the coordinates; brackets are as they were."""
    time, width, height = (_template(axis, side) for axis in ("TEMP", "WIDTH", "HEIGHT"))
    corners = f"[{width}{height}{width}{height}]"
    done, positions, at = [], [], 0
    for match in _FORMS.finditer(text):
        if match["inside"] is not None or match["letter"]:
            written = _template(match["axis"] or _LETTERS[match["letter"]], side)
            values = [match["inside"] if match["letter"] is None else match["number"]]
        elif match["moment"]:
            # Beyond 1 it is words about seconds.
            if not 0 <= float(match["when"]) <= 1:
                continue
            written, values = match["moment"] + time, [match["when"]]
        else:
            kind, values = _list(match)
            if kind is None:
                continue
            written = {"box": corners, "span": f"{{{time}{time}}}"}[kind]
            if match["row"]:
                written, values = f"{time}:{written}", [match["row"], *values]
        done += [text[at : match.start()], written]
        positions += [_fraction(value, match) for value in values]
        at = match.end()
    return "".join([*done, text[at:]]), tuple(positions)


def _list(match: re.Match[str]) -> tuple[str | None, list[str]]:
    """Whether numbers in a row are a `"box"` or a `"span"`, and the numbers; ValueError where they were meant to be."""
    opened, closed = (match["open"] or "").strip(), (match["close"] or "").strip()
    numbers = re.split(r"[\s,]+", match["list"])
    if "." not in match["list"]:
        return None, numbers
    if opened + closed == "[]":
        return ("box" if len(numbers) == 4 else None), numbers
    if opened + closed == "{}":
        return ("span" if len(numbers) == 2 else None), numbers
    # A bracket on one side only, or two kinds of brackets. It is ordinary where its partner is further away.
    counts = {"[": (3, 4), "]": (3, 4), "{": (2,), "}": (2,)}
    lone = opened and len(numbers) in counts[opened] and not _closes_later(match, opened)
    if lone or (closed and len(numbers) in counts[closed] and not _opened_before(match, closed)):
        raise ValueError(f"text: unbalanced brackets around coordinates: {_around(match)}")
    return None, numbers


def _closes_later(match: re.Match[str], opener: str) -> bool:
    text, end = match.string, match.end("list")
    close = text.find({"[": "]", "{": "}"}[opener], end)
    return close >= 0 and text.find(opener, end, close) < 0


def _opened_before(match: re.Match[str], closer: str) -> bool:
    text, start = match.string, match.start("list")
    opening = text.rfind({"]": "[", "}": "{"}[closer], 0, start)
    return opening >= 0 and text.find(closer, opening, start) < 0


def _fraction(number: str, match: re.Match[str]) -> float:
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"text: a coordinate token without a number: {_around(match)}") from None
    if not 0 <= value <= 1:
        raise ValueError(
            f"text: coordinates in text are fractions from 0 to 1, got {number}: {_around(match)}. Seconds and pixels "
            "are parts of a message, and words that are no coordinates a part with coordinates=False"
        )
    return value


def _around(match: re.Match[str]) -> str:
    return repr(match.string[max(match.start() - 20, 0) : match.end() + 20])


def _template(axis: str, side: str) -> str:
    if side not in SIDES:
        raise ValueError(f"side: expected 'input' or 'output', got {side!r}")
    return f"<{axis}-{side.upper()}>"


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


def _drop_spaces_at_end(chunks: list[str]) -> None:
    words = ""
    while chunks and not words:
        words = chunks.pop().rstrip(" ")
    chunks += _if_any(words)


def _if_any(words: str) -> list[str]:
    return [words] if words else []


def _quote(text: CoordinateText) -> str:
    """The beginning of it, with numbers."""
    pieces = text.split(_TOKEN.pattern)[:24]
    head = "".join(piece.text for piece in pieces), tuple(x for piece in pieces for x in piece.positions)
    return repr(plain(CoordinateText(*head)))
