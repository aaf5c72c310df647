"""In which order samples come: random, but the same on every machine, and known for any epoch without going there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

_CHUNK = 2**16


def shuffled(size: int, *key: int | str) -> np.ndarray:
    """The numbers below `size` in an order that depends on `key` alone, int64.

    They are sorted by a hash (splitmix64) of key and number: no random generator, whose numbers another version may
    change, and none of the state that one has.
    """
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class EpochSampler(Sampler[int | None]):
    """All indices below `size`, shuffled by seed and epoch.

    Args:
        size: how many samples there are.
        seed: of the shuffling.
        shuffle: False: in their own order.
        multiple: None comes after the last index, in place of samples, until there are a multiple of so many.

    Every process yields all of them: `accelerate` deals them out. `set_epoch` chooses the epoch, which does not advance
    by itself; `start_at` the first of its samples, for the next pass alone.
    """

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True, multiple: int = 1) -> None:
        self.size, self.seed, self.shuffle, self.multiple = size, seed, shuffle, multiple
        self.epoch, self._start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next passes are of, each in an order of its own.

        Args:
            epoch: from 0.
        """
        self.epoch = epoch

    def start_at(self, sample: int) -> None:
        """The next pass leaves out this many samples, as a run does that goes on in the middle of an epoch.

        Args:
            sample: how many.

        Raises:
            ValueError: a negative number, or more samples than there are.
        """
        if not 0 <= sample <= self.size:
            raise ValueError(f"sample: expected 0 to {self.size}, got {sample}")
        self._start = sample

    def __len__(self) -> int:
        return self.size + self._filling() - self._start

    def __iter__(self) -> Iterator[int | None]:
        start, self._start = self._start, 0
        order: Any = shuffled(self.size, self.seed, self.epoch) if self.shuffle else np.arange(self.size)
        for chunk in range(start, self.size, _CHUNK):  # a list of all would take several times the memory
            yield from order[chunk : chunk + _CHUNK].tolist()
        yield from [None] * self._filling()

    def _filling(self) -> int:
        return -self.size % self.multiple
