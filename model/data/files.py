"""Records in files of JSON: where each begins and ends, whatever is broken between them, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# A longer one is taken for a quote or a bracket that was never closed.
MAX_RECORD = 2**24
_CHUNK = 2**20
# What has been passed is dropped at the latest after so much: `json` counts the lines before each error that it finds.
_PASSED = 2**16
# An error so close to the end of what has been read may be no error of the file.
_MARGIN = 2**12
_BOM = b"\xef\xbb\xbf"
_BLANKS = re.compile(r"[ \t\r\n]*")
_FIRST_KEY = re.compile(r'\{[ \t\r\n]*"[^"\\]*"')
_BRACKET = re.compile(r'[\[\]{},"]')
# Of a string, up to its next escape or its end: one pattern for long strings would take gigabytes.
_OF_STRING = re.compile(r'[^"\\]*(?:(?P<end>")|\\.)', re.DOTALL)
_NEXT = re.compile(r"[ \t\r\n]*[,\]]")
_DECODER = json.JSONDecoder()


class Found(NamedTuple):
    """A record in a file.

    Attributes:
        offset: of its first byte.
        line: its first one, from 1.
        text: its bytes, whether they are JSON or not.
        problem: what is wrong with the file here, beside the record itself; empty where nothing is.
    """

    offset: int
    line: int
    text: bytes
    problem: str = ""


def is_lines(path: str | PathLike[str]) -> bool:
    """Whether a file holds a record on each line; else it is one list of records."""
    return Path(path).suffix.lower() == ".jsonl"


def find_records(path: str | PathLike[str]) -> Iterator[Found]:
    """The records of a `.jsonl` file, one on each line that is not blank, or of a file that is one list.

    Of a list, a broken record ends where its brackets say so; or before the next line that is indented as records are,
    or the next object whose first key is a record's.

    Raises:
        ValueError: the file is no list of records.
    """
    with open(path, "rb") as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(start)
        if is_lines(path):
            yield from _find_lines(file, start)
        else:
            yield from _List(file, start, str(path)).records()


def parse(text: bytes, line: int = 1) -> Any:
    """What a record's bytes say.

    Args:
        text: the bytes.
        line: their first one's in the file.

    Raises:
        ValueError: they are not JSON; says where.
    """
    try:
        return json.loads(text.rstrip().decode())  # blanks at the end would be where an end is missed
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, character {error.pos + 1} of the record"
        raise ValueError(f"{error.msg}, {where}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, byte {error.start + 1} of the record: {text[error.start :][:4]!r}") from None
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _find_lines(file: BinaryIO, offset: int) -> Iterator[Found]:
    number = 0
    while text := file.readline(MAX_RECORD):
        number += 1
        length, problem = len(text), ""
        if length == MAX_RECORD and not text.endswith(b"\n"):
            problem = f"a line of {MAX_RECORD} bytes or more"
            text = text[:80]
            while rest := file.readline(_CHUNK):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
        if text.strip():
            yield Found(offset, number, text.rstrip(b"\r\n"), problem)
        offset += length


class _List:
    """A file that is one list, of which only a part is in memory.

    Bytes are looked at as Latin-1, in which they are their characters: what JSON is made of is ASCII.
    """

    def __init__(self, file: BinaryIO, offset: int, name: str) -> None:
        self.file, self.name = file, name
        self.text, self.at, self.ended = "", 0, False  # what is in memory, and the next place in it
        self.offset, self.line = offset, 1  # of that place
        self.blanks = ""  # before that place
        self.next_record = "$."  # a pattern that finds the next record; this one finds none
        self.searched: tuple[str, int, int, int | None] = ("", 0, 0, None)  # see `_find_next`

    def records(self) -> Iterator[Found]:
        if (first := self._skip_blanks()) != "[":
            raise ValueError(f"{self.name}: expected a list of records, [...], got {first or 'nothing'!r}")
        self._pass(self.at + 1)
        before = "["  # what the next record comes after: the start, a comma, a record or a broken one
        while (here := self._skip_blanks()) not in ("", "]"):
            if here == ",":
                if before not in ("record", "broken"):
                    yield self._found(self.at, "expected a record before the comma")
                before = ","
                self._pass(self.at + 1)
                continue
            problem = "expected a comma before this record" if before == "record" else ""
            end = self._end()
            if end is not None or before == "[":
                self._learn()
            before = "broken" if end is None else "record"
            if end is None and (end := self._end_of_broken()) is None:
                yield self._found(self.at, f"no other record in {MAX_RECORD} bytes: the list cannot be read from here")
                return
            yield self._found(end, problem)
        if here == "":
            yield self._found(self.at, "the list of records does not end: the file was cut off")
            return
        if before == ",":
            yield self._found(self.at, "expected a record behind the last comma")
        self._pass(self.at + 1)
        if self._skip_blanks():
            yield self._found(self.at, "expected nothing behind the list of records")

    def _skip_blanks(self) -> str:
        """Passes blanks, and gives the character behind them; nothing at the end of the file."""
        blanks = ""
        while True:
            match = _BLANKS.match(self.text, self.at)
            blanks = (blanks + match[0])[-_MARGIN:]
            self._pass(match.end())
            if self.at < len(self.text) or not self._read():
                break
        self.blanks = blanks
        return self.text[self.at : self.at + 1]

    def _learn(self) -> None:
        """How records begin, from the one here."""
        _, newline, indent = self.blanks.rpartition("\n")
        if newline:
            # Begins at a comma or at the first of some blanks: from each of them on would take quadratic time.
            self.next_record = rf"(?:,|(?<![ \t\r]))[ \t\r]*\n{indent}(?=\{{)"
        elif key := _FIRST_KEY.match(self.text, self.at):
            self.next_record = rf",[ \t\r\n]*(?={re.escape(key[0])})"

    def _end(self) -> int | None:
        """Where the record here ends; None where it is broken."""
        while True:
            try:
                end = _DECODER.raw_decode(self.text, self.at)[1]
                if end < len(self.text) or not self._read():
                    return end
            except json.JSONDecodeError as error:
                in_string = error.msg.startswith("Unterminated string")
                cut = in_string or len(self.text) - error.pos < _MARGIN
                if not (cut and self._read()):
                    return None
            except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
                return None

    def _end_of_broken(self) -> int | None:
        while True:
            found = self._find_next()
            limit = len(self.text) if found is None else found
            if (end := self._closing(limit)) is not None:
                return end
            if found is not None:
                return limit
            if not self._read():
                break
        if not self.ended:
            return None
        last = self.text.rstrip(" \t\r\n")
        return len(last) - last.endswith("]")

    def _find_next(self) -> int | None:
        """Where the next record seems to begin. A search serves all broken records before the place that it found."""
        start = self.offset - self.at  # of what is in memory
        pattern, searched_from, searched_to, found = self.searched
        known = (pattern, searched_to) == (self.next_record, start + len(self.text)) and searched_from <= self.offset
        if not known or (found is not None and found <= self.offset):
            match = re.compile(self.next_record).search(self.text, self.at + 1)
            found = start + match.start() if match else None
            self.searched = (self.next_record, self.offset, start + len(self.text), found)
        return None if found is None else found - start

    def _closing(self, limit: int) -> int | None:
        """Where the brackets of the record here are closed, if a record or the list can end there."""
        depth, at = 0, self.at
        while match := _BRACKET.search(self.text, at, limit):
            bracket, at = match[0], match.end()
            if bracket == '"':
                while part := _OF_STRING.match(self.text, at, limit):
                    at = part.end()
                    if part["end"]:
                        break
                else:
                    return None  # it does not end
            elif bracket in "[{":
                depth += 1
            elif depth == 0 and bracket in ",]":
                return match.start()
            elif bracket in "]}":
                depth -= 1
                if depth <= 0:
                    return match.end() if _NEXT.match(self.text, match.end()) else None
        return None

    def _found(self, end: int, problem: str = "") -> Found:
        found = Found(self.offset, self.line, self.text[self.at : end].encode("latin-1"), problem)
        self._pass(end)
        return found

    def _pass(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.offset += end - self.at
        self.at = end
        if self.at > _PASSED:
            self.text, self.at = self.text[self.at :], 0

    def _read(self) -> bool:
        """Reads on; False at the end of the file, and where too much would be in memory."""
        held = len(self.text) - self.at
        if self.ended or held > MAX_RECORD:
            return False
        chunk = self.file.read(max(_CHUNK, held)).decode("latin-1")
        self.text, self.at = self.text[self.at :] + chunk, 0
        self.ended = not chunk
        return not self.ended
