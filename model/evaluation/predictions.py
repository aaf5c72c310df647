"""Predictions as a file of JSON lines that survives its writer being killed at any moment.

A line is written once, at the end of the file, and is on disk before the next begins. So all that a killed writer can
leave behind is one line without its end, which the next writer cuts off; readers pass over it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Literal

from ..coordinate_text import CoordinateText
from ..durable import sync_folder
from ..media import Media


class PredictionFileError(ValueError):
    """A file of predictions cannot be read, or belongs to another run."""


class FileInUseError(RuntimeError):
    """Another process is writing to a file of predictions."""


@dataclass(frozen=True)
class MediaError:
    """Why there is no answer: the sample's file is not there, or it cannot be read as a video or an image."""

    kind: Literal["missing", "undecodable"]
    message: str


@dataclass(frozen=True)
class Prediction:
    """What the model said of one sample.

    Attributes:
        index: the sample's place in its data file.
        id: the sample's name.
        text: the answer, a template token (`<TEMP-OUTPUT>`, ...) where a coordinate is.
        positions: the coordinates in the order of the template tokens, as fractions.
        finished: whether the model ended the answer itself (and not the limit of new tokens).
        error: why there is no answer.
        media: what was shown, where it could be read.
    """

    index: int
    id: str
    text: str = ""
    positions: tuple[float, ...] = ()
    finished: bool = False
    error: MediaError | None = None
    media: Media | None = None

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Prediction:
        fields = json.loads(line)
        CoordinateText(fields["text"], tuple(fields["positions"]))  # as many positions as tokens
        media, error = fields["media"], fields["error"]
        if media is not None:
            media = Media(**{**media, **{name: tuple(media[name]) for name in ("timestamps", "indices")}})
        error = None if error is None else MediaError(**error)
        return cls(**{**fields, "positions": tuple(fields["positions"]), "error": error, "media": media})


def read_predictions(path: str | PathLike[str]) -> list[Prediction]:
    """The predictions in a file in their order, without a line that was never finished.

    Args:
        path: JSON lines, as `llava_st.evaluate` writes them.

    Returns:
        One for each line.

    Raises:
        PredictionFileError: a ValueError: a line that is no prediction, or two of the same sample.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    predictions: list[Prediction] = []
    for number, line in enumerate(lines, start=1):
        try:
            predictions.append(Prediction.from_line(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PredictionFileError(f"{path}, line {number}: not a prediction: {line[:80]!r}") from error
    if len({prediction.index for prediction in predictions}) < len(predictions):
        raise PredictionFileError(f"{path}: holds several predictions of the same sample")
    return predictions


class PredictionWriter:
    """Adds predictions to a file. No one else can open the file for writing before this is closed.

    Args:
        path: the file; made where there is none. An unfinished last line is cut off.
        write: what writes bytes to a file descriptor and says how many it wrote; for tests.

    Raises:
        RuntimeError: another process has the file open for writing.
    """

    def __init__(self, path: str | PathLike[str], write: Callable[[int, bytes], int] = os.write) -> None:
        self.path, self._write = Path(path), write
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if not self._lock():
            os.close(self._file)
            raise FileInUseError(f"{self.path}: another process is writing to it")
        os.ftruncate(self._file, self.path.read_bytes().rfind(b"\n") + 1)
        os.fsync(self._file)
        sync_folder(self.path.parent)

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have removed or replaced it since it was opened.
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            return False

    def add(self, *predictions: Prediction) -> None:
        """Appends predictions, and returns when they are on disk."""
        data = b"".join(prediction.to_line() for prediction in predictions)
        while data:
            data = data[self._write(self._file, data) :]
        os.fsync(self._file)

    def keep(self, wanted: Callable[[Prediction], bool]) -> None:
        """Removes the predictions that are not wanted: all at once or, where this is interrupted, none."""
        new = self.path.with_name(f"{self.path.name}.new")
        new.unlink(missing_ok=True)
        kept = PredictionWriter(new, self._write)
        kept.add(*filter(wanted, read_predictions(self.path)))
        os.replace(new, self.path)
        sync_folder(self.path.parent)
        os.close(self._file)
        self._file = kept._file

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def replace_file(path: str | PathLike[str], content: bytes) -> None:
    """Makes this the content of a file: all of it or, where this is interrupted, none."""
    path = Path(path)
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)
