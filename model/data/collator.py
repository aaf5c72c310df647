"""Samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_llava_st import LlavaStProcessor
from ..prompting.inputs import IGNORED, LlavaStInputs
from .failures import Failures, SampleName, SkippedSample
from .training import Sample

# Stands in a batch that has no sample: every process of a step needs one to run the model on.
_NOTHING = [{"role": "user", "content": ""}]


class TrainingBatch(LlavaStInputs):
    """What the model takes, with labels.

    Attributes:
        samples: which samples are in it, in order.
        skipped: the samples that were to be in it and are not.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        samples: Sequence[SampleName] = (),
        skipped: Sequence[SkippedSample] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.samples, self.skipped = list(samples), list(skipped)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "samples": self.samples, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.samples, self.skipped = state["samples"], state["skipped"]


class Collator:
    """Makes batches of samples: padded on the right, or packed into one row.

    Args:
        processor: of the model.
        packed: one sample after another in one row, told apart by `position_ids` and `sample`; nothing is padding.
        max_length: tokens that a sample may have. A longer one is skipped and counted: cut, it would lose its answer or
            a part of its video. None: any number.
        failures: where skipped samples are counted: the training set's.

    A batch without samples has one of padding that teaches nothing, so that a step can go on.
    """

    def __init__(
        self,
        processor: LlavaStProcessor,
        packed: bool = False,
        max_length: int | None = None,
        failures: Failures | None = None,
    ) -> None:
        self.processor, self.packed, self.max_length = processor, packed, max_length
        self.failures = failures or Failures(max_share=1.0)

    def __call__(self, items: Sequence[Sample | SkippedSample]) -> TrainingBatch:
        skipped = [item for item in items if isinstance(item, SkippedSample)]
        samples = [item for item in items if isinstance(item, Sample)]
        try:
            inputs = self._encode(samples)
        except (OSError, ValueError):
            samples = self._accepted(samples, skipped)
            inputs = self._encode(samples)
        if self.max_length is not None and samples:
            lengths = self._lengths(inputs)
            for sample, length in zip(samples, lengths, strict=True):
                if length > self.max_length:
                    self._skip(skipped, sample, "length", f"expected at most {self.max_length} tokens, got {length}")
            kept = [sample for sample, length in zip(samples, lengths, strict=True) if length <= self.max_length]
            if len(kept) < len(samples):
                samples, inputs = kept, self._encode(kept)
        names = [SampleName(sample.index, sample.task, sample.place) for sample in samples]
        return TrainingBatch(inputs.data, names, skipped, media=inputs.media)

    def _encode(self, samples: Sequence[Sample]) -> LlavaStInputs:
        conversations = [sample.conversation for sample in samples]
        inputs = self.processor.apply_chat_template(
            conversations or [_NOTHING],
            add_generation_prompt=False,
            return_labels=True,
            padding_side="right",
            packed=self.packed,
        )
        if not conversations:
            inputs["labels"].fill_(IGNORED)
            inputs.media = []
        return inputs

    def _lengths(self, inputs: LlavaStInputs) -> list[int]:
        if self.packed:
            return torch.bincount(inputs["sample"][0]).tolist()
        return inputs["attention_mask"].sum(dim=1).tolist()

    def _accepted(self, samples: Sequence[Sample], skipped: list[SkippedSample]) -> list[Sample]:
        """The samples that the processor takes one by one."""
        accepted = []
        for sample in samples:
            try:
                self._encode([sample])
            except (OSError, ValueError) as error:
                self._skip(skipped, sample, "prompt", str(error))
            else:
                accepted.append(sample)
        return accepted

    def _skip(self, skipped: list[SkippedSample], sample: Sample, kind: str, reason: str) -> None:
        skipped.append(SkippedSample(sample.index, sample.task, sample.place, kind, reason))
        self.failures.add(skipped[-1])
