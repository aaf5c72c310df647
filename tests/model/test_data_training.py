"""Samples and batches: nothing is replaced in silence, and everything is the same the next time."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llava_st.configuration_llava_st import TEMPLATE_TOKENS
from llava_st.data import training
from llava_st.data.collator import Collator, TrainingBatch
from llava_st.data.failures import Failures, SampleName, SkippedSample, TooManyFailuresError
from llava_st.data.order import EpochSampler
from llava_st.data.training import MediaLoader, Sample, TrainingData
from llava_st.geometry import Box, TimeSpan
from llava_st.tiny import tiny_model, tiny_processor
from PIL import Image
from torch.utils.data import DataLoader

from .clips import moving_square, write_video
from .training_records import make_record, write_records

SPAN, BOX = TimeSpan(0.25, 0.75), Box(0.1, 0.2, 0.3, 0.4)
IMAGE = {"video": None, "image": "a.png", "type": "rec"}
TEXT = {"video": None, "type": "conversation"}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Media, and a table cache that all tests share."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip.mp4", moving_square(12))
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "a.png")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture
def make_data(folder, tmp_path, processor):
    def make(*records, **options) -> TrainingData:
        path = tmp_path / "a.jsonl"
        if not path.exists():  # made again, they are the same
            write_records(path, records)
        settings = {"load": MediaLoader.of(processor), "backoff": 0.0, "max_failure_share": 1.0, "cache_dir": folder}
        return TrainingData(path, folder, **{**settings, **options})

    return make


def mixed_records() -> list:
    return [
        make_record("<video>\nWhen?", [SPAN], id="video"),
        make_record(["<image>\nWhat is in", BOX, "?"], "A square.", id="image", **IMAGE),
        make_record("Hello", "Hi", id="text", **TEXT),
        make_record(video="missing.mp4", id="missing"),
        make_record("<video> and <video>", [SPAN], video=["clip.mp4", "clip.mp4"], meta={"split": [3, 9]}),
    ]


def test_samples_are_conversations_with_their_media(make_data):
    data = make_data(*mixed_records())
    assert len(data) == 5
    video, image, text = data[0], data[1], data[2]
    assert (video.index, video.task, video.place.rsplit("/")[-1]) == (0, "tvg", "a.jsonl:1")
    pixels, media = video.conversation[0]["content"][0]["video"]
    assert pixels.shape == (10, 3, 36, 36)
    assert media.indices == (0, 1, 2, 4, 5, 6, 7, 9, 10, 11)
    assert image.conversation[0]["content"][0]["image"][1].width == 30
    assert [part.text for part in text.conversation[0]["content"]] == ["Hello"]
    clipped = data[4].conversation[0]["content"]
    assert [part["video"][1].indices[0] for part in clipped[:2]] == [3, 3]
    assert (data.failures.seen, data.failures.skipped) == (4, 0)


@pytest.mark.parametrize(
    ("change", "kind", "reason", "attempts"),
    [
        ({"video": "missing.mp4"}, "media", "missing.mp4: no such video", 3),
        ({"video": "broken.mp4"}, "media", "broken.mp4", 3),
        ({"meta": {"split": [3, 12]}}, "media", "expected 0 <= first <= last < 12", 3),
        ({"variables": {"temporal_input_locations": [0.5]}}, "record", "positions: too many", 1),
    ],
)
def test_a_sample_that_fails_is_tried_again_reported_and_skipped(
    make_data, monkeypatch, caplog, tmp_path, change, kind, reason, attempts
):
    waits = []
    monkeypatch.setattr(training.time, "sleep", waits.append)
    data = make_data(make_record(), make_record(**change), retries=2, backoff=0.5, report=tmp_path / "skipped.jsonl")
    with caplog.at_level(logging.WARNING):
        skipped = data[1]
    assert isinstance(skipped, SkippedSample)
    assert (skipped.index, skipped.task, skipped.kind, skipped.attempts) == (1, "tvg", kind, attempts)
    assert reason in skipped.reason
    assert waits == [0.5, 1.0][: attempts - 1]
    assert (data.failures.seen, data.failures.skipped) == (1, 1)
    assert f"a.jsonl:2: skipped after {attempts} attempt(s), {kind}: " in caplog.text
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert SkippedSample(**json.loads(line)) == skipped
    assert isinstance(data[0], Sample)


def test_a_sample_that_comes_late_is_not_skipped(make_data, caplog):
    calls = []

    def load(part):
        calls.append(part["video"])
        if len(calls) < 3:
            raise OSError("stale file handle")
        return MediaLoader(10, 36)(part)

    data = make_data(make_record(), load=load, retries=2)
    assert isinstance(data[0], Sample)
    assert len(calls) == 3
    assert (data.failures.skipped, caplog.text) == (0, "")


def test_errors_of_decoders_are_failures_but_lack_of_memory_is_not(make_data):
    def load(part, error):
        raise error

    skipped = make_data(make_record(), load=partial(load, error=IndexError("odd")))[0]
    assert skipped.reason == "IndexError: odd"
    with pytest.raises(MemoryError):
        make_data(make_record(), load=partial(load, error=MemoryError()))[0]


def test_without_a_loader_nothing_is_opened(make_data):
    data = make_data(make_record(video="missing.mp4"), load=None)
    assert data[0].conversation[0]["content"][0]["video"].endswith("/missing.mp4")


def test_too_many_failures_stop_the_training(make_data):
    records = [make_record("Hi", "Hello", video=None)] * 9 + [make_record("Hi", "Hello", "?")] * 1
    data = make_data(*records, max_failure_share=0.1)
    skipped = [isinstance(data[i], SkippedSample) for i in range(10)]
    assert skipped == [False] * 9 + [True]
    for i in range(9):
        data[i]
    assert isinstance(data[9], SkippedSample)
    with pytest.raises(TooManyFailuresError, match=r"3 of 21 samples .* max_failure_share=0.1 .*a\.jsonl:10: order of"):
        data[9]


@pytest.mark.parametrize(("share", "size", "allowed"), [(0.0, 10, 0), (0.01, 10_000, 10), (0.25, 8, 2), (1.0, 5, 5)])
def test_a_share_is_one_of_a_pass_while_samples_are_few(share, size, allowed):
    failures = Failures(share, size)
    for count in range(1, allowed + 2):
        failures.see()
        skipped = SkippedSample(0, "task", "a:1", "media", "gone")
        if count <= allowed or share == 1:
            failures.add(skipped)
        else:
            with pytest.raises(TooManyFailuresError):
                failures.add(skipped)


def test_counts_go_on_from_a_checkpoint():
    failures, again = Failures(0.5, 4), Failures(0.5, 4)
    for _ in range(3):
        failures.see()
    failures.add(SkippedSample(0, "task", "a:1", "media", "gone"))
    again.load_state_dict(json.loads(json.dumps(failures.state_dict())))
    assert (again.seen, again.skipped) == (3, 1)
    both = Failures(0.5, 4)
    both.load_state_dict(failures.state_dict(), {"seen": 2, "skipped": 0})
    assert (both.seen, both.skipped) == (5, 1)
    again.add(SkippedSample(0, "task", "a:1", "media", "gone"))
    with pytest.raises(TooManyFailuresError, match="3 of 3"):
        again.add(SkippedSample(0, "task", "a:1", "media", "gone"))


def test_each_worker_counts_for_itself(monkeypatch):
    """Without a lock, none may write where another does."""
    failures = Failures()
    for worker in (None, SimpleNamespace(id=0), SimpleNamespace(id=1)):
        monkeypatch.setattr("llava_st.data.failures.get_worker_info", lambda worker=worker: worker)
        failures.see()
    assert failures._counts[:3, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(ValueError, match="max_failure_share: expected 0 to 1"):
        Failures(share)


@pytest.mark.parametrize("text", ['[{"id": 1}, {"id": 2', '[{"id": 1} {"id": 2}]'])
def test_damaged_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json:1: .*python -m llava_st.data check"):
        TrainingData(tmp_path / "a.json", cache_dir=tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="expected records, got none"):
        TrainingData(tmp_path / "a.json", cache_dir=tmp_path)


# Batches.


def test_a_batch_holds_the_samples_that_are_there(make_data, processor):
    data = make_data(*mixed_records())
    samples = [data[i] for i in range(5)]
    batch = Collator(processor)(samples)
    kept = [samples[i] for i in (0, 1, 2, 4)]
    assert batch.samples == [SampleName(each.index, each.task, each.place) for each in kept]
    assert batch.skipped == [samples[3]]
    expected = processor.apply_chat_template(
        [each.conversation for each in kept], return_labels=True, padding_side="right", add_generation_prompt=False
    )
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert batch.media == expected.media
    assert batch["video_frames"].tolist() == [10, 10, 10]
    # What is learned is what gpt says.
    targets = batch["labels"][0]
    told = processor.tokenizer.decode(targets[targets != -100])
    assert told == " {<TEMP-OUTPUT><TEMP-OUTPUT>} <|im_end|>"
    outputs = batch["input_ids"][0] == processor.token_ids["temporal_output"]
    assert batch["positions"][0][outputs].tolist() == [0.25, 0.75]
    template = [processor.token_ids[name] for name in TEMPLATE_TOKENS]
    assert (batch["positions"].isnan() ^ torch.isin(batch["input_ids"], torch.tensor(template))).all()


def test_a_packed_batch(make_data, processor):
    data = make_data(*mixed_records())
    samples = [data[i] for i in range(5)]
    batch = Collator(processor, packed=True)(samples)
    singles = [Collator(processor)([samples[i]]) for i in (0, 1, 2, 4)]
    assert batch["input_ids"].tolist() == [[token for each in singles for token in each["input_ids"][0].tolist()]]
    assert torch.bincount(batch["sample"][0]).tolist() == [each["input_ids"].shape[1] for each in singles]
    assert [each.index for each in batch.samples] == [0, 1, 2, 4]


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_that_is_too_long_is_skipped_and_never_cut(make_data, processor, packed):
    data = make_data(*mixed_records())
    samples = [data[i] for i in (0, 1, 2)]
    lengths = [Collator(processor)([each])["input_ids"].shape[1] for each in samples]
    longest = max(lengths)
    collator = Collator(processor, packed, max_length=longest, failures=data.failures)
    assert len(collator(samples).samples) == 3
    before = data.failures.skipped
    batch = Collator(processor, packed, max_length=longest - 1, failures=data.failures)(samples)
    (skipped,) = batch.skipped
    assert skipped.index == lengths.index(longest)
    assert (skipped.kind, skipped.reason) == ("length", f"expected at most {longest - 1} tokens, got {longest}")
    assert data.failures.skipped == before + 1
    rest = Collator(processor, packed)([each for each in samples if each.index != skipped.index])
    assert batch.keys() == rest.keys()
    for name in rest:
        torch.testing.assert_close(batch[name], rest[name], equal_nan=True)


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_nothing_teaches_nothing(make_data, packed, compat):
    data = make_data(make_record(video="missing.mp4"))
    batch = Collator(tiny_processor(compat=compat), packed)([data[0]])
    assert (batch.samples, len(batch.skipped), batch.media) == ([], 1, [])
    assert (batch["labels"] == -100).all()
    model = tiny_model().train()
    loss = model(**batch, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_the_processor_refuses_is_skipped_alone(make_data, processor):
    data = make_data(*mixed_records()[:3])
    other = TrainingData(data.table.sources, load=MediaLoader(10, 48), cache_dir=data.table.sources[0].folder)
    batch = Collator(processor, failures=data.failures)([data[0], other[1], data[2]])
    assert [each.index for each in batch.samples] == [0, 2]
    assert batch.skipped[0].kind == "prompt"
    assert "expected pixels [1, 3, 36, 36] of a image, got [1, 3, 48, 48]" in batch.skipped[0].reason
    assert data.failures.skipped == 1


def test_a_batch_keeps_what_it_knows_when_it_travels(make_data, processor):
    data = make_data(*mixed_records())
    batch = Collator(processor)([data[0], data[3]])
    for copied in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), batch.to("cpu")):
        assert isinstance(copied, TrainingBatch)
        assert (copied.samples, copied.skipped, copied.media) == (batch.samples, batch.skipped, batch.media)
        assert copied["positions"].dtype == torch.float64


def batches(data, processor, sampler, **options) -> list[TrainingBatch]:
    collator = Collator(processor, failures=data.failures)
    return list(DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collator, **options))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_batches_and_count_together(make_data, processor, method):
    expected_data, data = (make_data(*mixed_records()) for _ in range(2))
    expected = batches(expected_data, processor, EpochSampler(5, seed=1))
    workers = 2 if method == "fork" else 1
    found = batches(data, processor, EpochSampler(5, seed=1), num_workers=workers, multiprocessing_context=method)
    assert [each.samples for each in found] == [each.samples for each in expected]
    assert [each.skipped for each in found] == [each.skipped for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1))
    assert (data.failures.seen, data.failures.skipped) == (5, 1)
    assert data.failures.state_dict() == expected_data.failures.state_dict()


def test_too_many_failures_in_a_worker_stop_the_training(make_data, processor, monkeypatch):
    # How long torch waits for a worker that failed, when its loader is disposed of.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    data = make_data(*mixed_records(), max_failure_share=0.0)
    with pytest.raises(TooManyFailuresError, match=r"missing\.mp4"):
        batches(data, processor, EpochSampler(5), num_workers=1, multiprocessing_context="fork")
    gc.collect()


def test_a_run_goes_on_in_the_middle_of_an_epoch(make_data, processor):
    data = make_data(*mixed_records()[:3], make_record(), make_record(video="missing.mp4"), make_record())
    sampler = EpochSampler(6, seed=3)
    sampler.set_epoch(2)
    all_batches = batches(data, processor, sampler)
    again = EpochSampler(6, seed=3)
    again.set_epoch(2)
    again.start_at(2)
    rest = batches(data, processor, again)
    assert [each.samples for each in rest] == [each.samples for each in all_batches[1:]]
    for one, other in zip(rest, all_batches[1:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
