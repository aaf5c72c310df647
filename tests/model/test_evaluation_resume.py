"""Predictions outlive their writer: killed at any moment, nothing is lost and nothing is there twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from llava_st.evaluation.predictions import MediaError, Prediction, PredictionWriter, read_predictions
from llava_st.evaluation.runner import Processes, launched_processes, predict_all
from llava_st.evaluation.samples import Sample
from llava_st.geometry import TimeSpan
from llava_st.media import Media

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["llava_st.evaluation.runner", __name__])


def make_samples(count: int) -> list[Sample]:
    return [Sample(i, f"v{i}.mp4#{i}", "tvg", f"v{i}.mp4", ("?",), TimeSpan(0.0, 1.0)) for i in range(count)]


def prediction_of(sample: Sample) -> Prediction:
    """What the predictors of these tests say of a sample: all that a line can hold."""
    if sample.index % 7 == 3:
        return Prediction(sample.index, sample.id, error=MediaError("missing", f"{sample.media}: not there"))
    media = Media("video", 640, 360, (0.0, 0.1 + sample.index), (0, 9))
    text, positions = 'say "{<TEMP-OUTPUT><TEMP-OUTPUT>}"\n né', (sample.index / 100, 1 / 3)
    return Prediction(sample.index, sample.id, text, positions, sample.index % 2 == 0, media=media)


class Replay:
    def predict(self, samples):
        return [prediction_of(sample) for sample in samples]


def in_halves(file: int, data: bytes, pause: float = 0.002) -> int:
    """Writes in two steps with a pause between, to be killed in."""
    half = os.write(file, data[: len(data) // 2])
    time.sleep(pause)
    return half + os.write(file, data[half:])


def slowly(samples: list[Sample], out: Path, started) -> None:
    started.set()
    predict_all(samples, Replay(), out, write=in_halves)


def dies_in_write(out: Path, samples: list[Sample], number: int, when: str) -> None:
    """Kills itself in the write of the line of that number: before, between its halves, or after."""
    writes = 0

    def write(file: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        length = {"before": 0, "between": len(data) // 2, "after": len(data)}[when] if writes == number else len(data)
        written = os.write(file, data[:length])
        if writes == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    predict_all(samples, Replay(), out, write=write)


def run_to_death(target, *arguments) -> None:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def assert_undisturbed(out: Path, samples: list[Sample]) -> None:
    found = read_predictions(out)
    assert len(found) == len(samples)
    assert {p.index: p for p in found} == {s.index: prediction_of(s) for s in samples}
    assert out.read_bytes().endswith(b"\n")


def test_killed_at_twenty_random_times(tmp_path):
    samples, out = make_samples(400), tmp_path / "out.jsonl"
    draw, cut, sizes = random.Random(0), 0, []
    for _ in range(20):
        started = CONTEXT.Event()
        process = CONTEXT.Process(target=slowly, args=(samples, out, started))
        process.start()
        assert started.wait(60)
        time.sleep(draw.uniform(0, 0.04))
        process.kill()
        process.join()
        before = out.read_bytes() if out.exists() else b""
        cut += not before.endswith(b"\n") and before != b""
        sizes.append(len(read_predictions(out)) if out.exists() else 0)
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] < len(samples), "the runs were killed before they were done"
    assert cut > 0, "no kill was in a write"
    predict_all(samples, Replay(), out)
    assert_undisturbed(out, samples)


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("number", [1, 3, 6])
def test_killed_in_a_write(tmp_path, when, number):
    samples, out = make_samples(6), tmp_path / "out.jsonl"
    run_to_death(dies_in_write, out, samples, number, when)
    complete = number if when == "after" else number - 1
    assert [p.index for p in read_predictions(out)] == list(range(complete))
    assert out.read_bytes().endswith(b"\n") == (when != "between" and complete > 0)
    predict_all(samples, Replay(), out)
    assert_undisturbed(out, samples)


def test_writes_may_take_a_part_alone(tmp_path):
    samples, out = make_samples(4), tmp_path / "out.jsonl"
    predict_all(samples, Replay(), out, write=lambda file, data: os.write(file, data[:7]))
    assert_undisturbed(out, samples)


def test_cut_off_at_any_byte(tmp_path):
    samples, out = make_samples(4), tmp_path / "out.jsonl"
    predict_all(samples, Replay(), out)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in {*range(0, len(whole), 13), *ends, *(end - 1 for end in ends)}:
        out.write_bytes(whole[:length])
        assert len(read_predictions(out)) == sum(end <= length for end in ends)
        predict_all(samples, Replay(), out)
        assert out.read_bytes() == whole


def _threads(samples: list[Sample], out: Path, count: int, predictor=None) -> None:
    """All processes of a run, as threads."""
    barrier = threading.Barrier(count)
    errors = []

    def run(rank: int) -> None:
        try:
            predict_all(samples, predictor or Replay(), out, processes=Processes(rank, count, wait=barrier.wait))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_several_processes_leave_one_file(tmp_path, count):
    samples, out = make_samples(5), tmp_path / "out.jsonl"
    _threads(samples, out, count)
    assert_undisturbed(out, samples)
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("later", [1, 2, 4])
def test_another_number_of_processes_goes_on(tmp_path, later):
    """What three processes leave when they are killed: lines in their own files, one cut off."""
    samples, out = make_samples(11), tmp_path / "out.jsonl"
    with PredictionWriter(out) as writer:
        writer.add(prediction_of(samples[10]))
    for rank, done in enumerate([[0, 1], [4], [7, 8]]):
        with PredictionWriter(tmp_path / f"out.{rank}-of-3.jsonl") as writer:
            writer.add(*(prediction_of(samples[i]) for i in done))
    with (tmp_path / "out.1-of-3.jsonl").open("ab") as file:
        file.write(prediction_of(samples[5]).to_line()[:20])
    (tmp_path / "out.2.jsonl").write_bytes(b"someone else's\n")
    asked = []

    class Watched(Replay):
        def predict(self, samples):
            asked.extend(sample.index for sample in samples)
            return super().predict(samples)

    _threads(samples, out, later, Watched())
    assert sorted(asked) == [2, 3, 5, 6, 9]
    assert_undisturbed(out, samples)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.2.jsonl", "out.jsonl"]


def _launched(rank: int, port: int, out: Path, samples: list[Sample]) -> None:
    """One of two processes, as accelerate starts them."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with launched_processes() as processes:
        assert (processes.rank, processes.count) == (rank, 2)
        predict_all(samples, Replay(), out, processes=processes)
        assert processes.rank > 0 or len(read_predictions(out)) == len(samples)


def test_processes_of_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    samples, out = make_samples(9), tmp_path / "out.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_launched, args=(rank, port, out, samples)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_undisturbed(out, samples)
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched_processes() as processes:
        assert (processes.rank, processes.count) == (0, 1)
        processes.wait()


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_in_move(out: Path, samples: list[Sample]) -> None:
    Path.unlink = _die
    with PredictionWriter(out.with_name("out.0-of-2.jsonl")) as writer:
        writer.add(*map(prediction_of, samples[:3]))
    predict_all(samples, Replay(), out, write=partial(in_halves, pause=0))


def test_killed_between_the_steps_of_a_move(tmp_path):
    samples, out = make_samples(5), tmp_path / "out.jsonl"
    run_to_death(_dies_in_move, out, samples)
    assert len(read_predictions(out)) == 3
    assert (tmp_path / "out.0-of-2.jsonl").exists()
    predict_all(samples, Replay(), out)
    assert_undisturbed(out, samples)
    assert not (tmp_path / "out.0-of-2.jsonl").exists()


def test_errors_are_kept_unless_they_are_to_be_tried_again(tmp_path):
    samples, out = make_samples(11), tmp_path / "out.jsonl"
    predict_all(samples, Replay(), out)
    asked = []

    class Found:
        def predict(self, samples):
            asked.extend(sample.index for sample in samples)
            return [Prediction(sample.index, sample.id, "found") for sample in samples]

    predict_all(samples, Found(), out)
    assert asked == []
    predict_all(samples, Found(), out, retry_errors=True)
    assert asked == [3, 10]
    found = {p.index: p for p in read_predictions(out)}
    assert sorted(found) == list(range(11))
    assert found[3] == Prediction(3, "v3.mp4#3", "found")
    assert found[4] == prediction_of(samples[4])


def _dies_in_retry(out: Path, samples: list[Sample]) -> None:
    os.replace = _die
    predict_all(samples, Replay(), out, retry_errors=True)


def test_killed_while_errors_are_removed(tmp_path):
    samples, out = make_samples(11), tmp_path / "out.jsonl"
    predict_all(samples, Replay(), out)
    run_to_death(_dies_in_retry, out, samples)
    assert_undisturbed(out, samples)
    predict_all(samples, Replay(), out, retry_errors=True)
    assert_undisturbed(out, samples)


def test_one_writer_at_a_time(tmp_path):
    samples, out = make_samples(3), tmp_path / "out.jsonl"
    with PredictionWriter(out) as writer:
        writer.add(prediction_of(samples[0]))
        with pytest.raises(RuntimeError, match=r"out\.jsonl: another process is writing"):
            predict_all(samples, Replay(), out)
        writer.keep(lambda prediction: True)  # the file is another one now, and still taken
        with pytest.raises(RuntimeError, match="another process"):
            PredictionWriter(out)
    with PredictionWriter(tmp_path / "out.0-of-2.jsonl"), pytest.raises(RuntimeError, match="0-of-2"):
        predict_all(samples, Replay(), out)
    predict_all(samples, Replay(), out)
    assert_undisturbed(out, samples)


def test_an_error_of_the_predictor_ends_the_run_and_keeps_what_is_done(tmp_path):
    samples, out = make_samples(4), tmp_path / "out.jsonl"

    class Breaks(Replay):
        def predict(self, samples):
            if samples[0].index == 2:
                raise RuntimeError("out of memory")
            return super().predict(samples)

    with pytest.raises(RuntimeError, match="out of memory"):
        predict_all(samples, Breaks(), out)
    assert [p.index for p in read_predictions(out)] == [0, 1]
    predict_all(samples, Replay(), out, batch_size=3)
    assert_undisturbed(out, samples)


def test_wrong_predictors_are_noticed(tmp_path):
    class Swaps(Replay):
        def predict(self, samples):
            return super().predict(samples)[::-1]

    with pytest.raises(ValueError, match=r"expected a prediction of 'v0\.mp4#0', got one of 'v1\.mp4#1'"):
        predict_all(make_samples(2), Swaps(), tmp_path / "out.jsonl", batch_size=2)


def test_files_of_other_runs_are_refused(tmp_path):
    samples, out = make_samples(3), tmp_path / "out.jsonl"
    predict_all(samples, Replay(), out, settings={"model": "a", "seed": 0})
    predict_all(samples, Replay(), out, settings={"model": "a", "seed": 0})
    with pytest.raises(ValueError, match=r"other settings: model was 'a', now 'b'"):
        predict_all(samples, Replay(), out, settings={"model": "b", "seed": 0})
    others = [Sample(1, "w.mp4#1", "tvg", "w.mp4", ("?",), TimeSpan(0.0, 1.0))]
    with pytest.raises(ValueError, match=r"expected predictions of these samples, got 'v1\.mp4#1' for 'w\.mp4#1'"):
        predict_all(others, Replay(), out)


def test_broken_lines_are_named(tmp_path):
    out = tmp_path / "out.jsonl"
    line = prediction_of(make_samples(1)[0]).to_line()
    out.write_bytes(line + b'{"index": 1}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: not a prediction"):
        read_predictions(out)
    out.write_bytes(line.replace(b"0.3333333333333333", b"0.5, 0.5"))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1: not a prediction"):
        read_predictions(out)
    out.write_bytes(line + line)
    with pytest.raises(ValueError, match=r"several predictions of the same sample"):
        read_predictions(out)
