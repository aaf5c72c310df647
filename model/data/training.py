"""The samples of a training set: conversations with their videos and images, or why there are none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..image import IMAGE_SIZE, load_image
from ..media import Media
from ..prompting.content import KINDS
from ..video import load_video
from .failures import Failures, SampleName, SkippedSample
from .records import Message, to_conversation
from .sources import Source, read_sources
from .table import Entry, RecordTable

Part = Mapping[str, Any]


@dataclass(frozen=True)
class MediaLoader:
    """Loads the videos and images of messages.

    Attributes:
        num_frames: of a video.
        image_size: height and width in pixels.
    """

    num_frames: int = 100
    image_size: int = IMAGE_SIZE

    @classmethod
    def of(cls, processor: Any) -> MediaLoader:
        """What a `LlavaStProcessor` expects.

        Args:
            processor: the model's.

        Returns:
            A loader of as many frames as it takes, of its size.
        """
        return cls(processor.num_frames, processor.image_size)

    def __call__(self, part: Part) -> tuple[Tensor, Media]:
        """Pixels and what is known of a part `{"type": "video", "video": path, "clip": ...}` or of an image's."""
        if part["type"] == "image":
            return load_image(part["image"], self.image_size)
        return load_video(part["video"], self.num_frames, self.image_size, part.get("clip"))


@dataclass(frozen=True)
class Sample(SampleName):
    """A conversation to learn.

    Attributes:
        conversation: messages as `LlavaStProcessor` takes them.
    """

    conversation: list[Message]


class TrainingData(Dataset[Sample | SkippedSample]):
    """The samples of a training set, by index.

    Args:
        source: YAML or a file of records, see `read_sources`; or sources.
        folder: of the media where `source` is a file of records; by default the file's own.
        load: gives pixels and `Media` of a part of a message: `MediaLoader.of(processor)`, or one's own that keeps what
            it has loaded. None leaves names in the parts: the processor loads them, and nothing is tried again.
        retries: how often media that cannot be loaded are tried again.
        backoff: seconds before the first time; twice as many before each next one.
        max_failure_share: which share of samples may be skipped before this is an error.
        report: a file to which a line of JSON is added for each skipped sample.
        seed: of the records that `random:N` takes.
        cache_dir: see `RecordTable`.

    A sample that fails is reported, counted in `failures` and comes as a `SkippedSample`; no other takes its place.
    Works in the workers of a `DataLoader`, forked or spawned, which count together.

    Raises:
        ValueError: the YAML is malformed, a file is damaged so that records may be missing, or there are none.
        FileNotFoundError: a file or folder that the YAML names is not there.
    """

    def __init__(
        self,
        source: str | PathLike[str] | Sequence[Source],
        folder: str | PathLike[str] | None = None,
        load: Callable[[Part], Any] | None = MediaLoader(),
        retries: int = 2,
        backoff: float = 0.5,
        max_failure_share: float = 0.01,
        report: str | PathLike[str] | None = None,
        seed: int = 0,
        cache_dir: str | PathLike[str] | None = None,
    ) -> None:
        sources = read_sources(source, folder) if isinstance(source, (str, PathLike)) else source
        self.table = RecordTable(sources, seed, cache_dir)
        if damage := self.table.damage():
            raise ValueError(f"{damage}. `python -m llava_st.data check` reports all that is wrong")
        if not len(self.table):
            raise ValueError(f"source: expected records, got none in {source}")
        self.load, self.retries, self.backoff = load, retries, backoff
        self.failures = Failures(max_failure_share, len(self.table), report)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample | SkippedSample:
        entry = self.table[index]
        self.failures.see()
        try:
            conversation = to_conversation(entry.record(), entry.source.folder)
        except ValueError as error:
            return self._skip(index, entry, "record", str(error))
        if self.load is None:
            return Sample(index, entry.task, entry.place, conversation)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                loaded = [{**message, "content": self._loaded(message["content"])} for message in conversation]
            except MemoryError:
                raise
            except Exception as error:  # decoders raise whatever they like
                reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            else:
                return Sample(index, entry.task, entry.place, loaded)
        return self._skip(index, entry, "media", reason, self.retries + 1)

    def _loaded(self, content: Sequence[Any]) -> list[Any]:
        return [{"type": part["type"], part["type"]: self.load(part)} if _is_media(part) else part for part in content]

    def _skip(self, index: int, entry: Entry, kind: str, reason: str, attempts: int = 1) -> SkippedSample:
        skipped = SkippedSample(index, entry.task, entry.place, kind, reason, attempts)
        self.failures.add(skipped)
        return skipped


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part["type"] in KINDS
