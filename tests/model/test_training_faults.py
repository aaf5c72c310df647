"""Training that is killed, runs out of disk, or meets NaN."""

from __future__ import annotations

import errno
import os
import random
import signal
import time

import pytest
import torch
from llava_st.training import checkpoints
from llava_st.training.checkpoints import damage, last_checkpoint, read_tensors, write_checkpoint
from llava_st.training.errors import NonFiniteLossError

from tests.model.training_runs import forkserver, losses, recorded_losses, tiny_trainer, train_until_killed

# docs/training.md has what 20 did.
KILLS = int(os.environ.get("LLAVA_ST_KILLS", "4"))
STEPS = 3 * KILLS  # each kill waits for one step, and then for a part of the second
WEIGHTS = {"weights.safetensors": {"a": torch.arange(4.0)}}


@pytest.fixture(scope="module")
def start():
    """Starts a process that trains."""

    def started(out, die_in_write=None):
        process = forkserver().Process(target=train_until_killed, args=(out, die_in_write, 2 * STEPS))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The losses of a run that nothing disturbs, and how long it takes."""
    out = tmp_path_factory.mktemp("whole")
    process = start(out)
    while not list(out.glob("checkpoint-*")):
        time.sleep(0.01)
    begun = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return recorded_losses(out), time.monotonic() - begun


def test_losses_go_on_bitwise_after_kills(start, whole, tmp_path):
    expected, seconds = whole
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    waits = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(tmp_path)
        before = set(tmp_path.glob("checkpoint-*"))
        while process.is_alive() and set(tmp_path.glob("checkpoint-*")) == before:
            time.sleep(0.005)
        time.sleep(waits.uniform(0, 1.5 * seconds / STEPS))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    process = start(tmp_path)
    process.join()
    assert process.exitcode == 0
    assert killed == KILLS
    assert recorded_losses(tmp_path) == expected


@pytest.mark.parametrize("write", [2, 3])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(start, whole, tmp_path, write):
    process = start(tmp_path, write)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".partial-*"))
    last = last_checkpoint(tmp_path)
    assert (last and last.name) == (None if write == 2 else "checkpoint-1")
    process = start(tmp_path)
    process.join()
    assert recorded_losses(tmp_path) == whole[0]
    assert not list(tmp_path.glob(".partial-*"))


def test_the_last_checkpoints_stay(tmp_path):
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, WEIGHTS, {"text.json": "{}"}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert torch.equal(read_tensors(tmp_path / "checkpoint-10/weights.safetensors")["a"], torch.arange(4.0))


@pytest.mark.parametrize("file", ["weights.safetensors", "text.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, file, how):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, WEIGHTS, {"text.json": "{ }"}, keep=2)
    path = tmp_path / "checkpoint-2" / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-2] if how == "truncated" else content[:-2] + b"??")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2: skipped" in caplog.text
    assert damage(tmp_path / "checkpoint-1") is None


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    for step in (1, 10):
        write_checkpoint(tmp_path, step, WEIGHTS, {}, keep=2)
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    write_checkpoint(tmp_path, 2, WEIGHTS, {}, keep=1)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, WEIGHTS, {}, keep=1)
    write = checkpoints.write_safetensors

    def full(path, *arguments):
        write(path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(OSError, match="checkpoint-2 could not be written: No space left"):
        write_checkpoint(tmp_path, 2, WEIGHTS, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_a_loss_of_nan_stops_and_names_the_sample(tmp_path):
    trainer = tiny_trainer(tmp_path, size=8, kinds=("video", "text"), batch_size=4)
    before = trainer.model.lm_head.weight.detach().clone()
    get = trainer.train_dataset.__class__.__getitem__

    class Broken(trainer.train_dataset.__class__):
        def __getitem__(self, index):
            sample = get(self, index)
            if index == 6:
                sample.conversation[0]["content"][0]["video"][0][:] = torch.nan
            return sample

    trainer.train_dataset = Broken(8, ("video", "text"))
    with pytest.raises(NonFiniteLossError, match=r"memory:6 \(sample 6\)$") as raised:
        trainer.train()
    assert "step" in str(raised.value)
    if not losses(trainer):
        assert torch.equal(trainer.model.lm_head.weight, before)


def test_gradients_of_nan_stop_and_name_the_step(tmp_path):
    trainer = tiny_trainer(tmp_path, size=4)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteLossError, match="gradient of step 1 is nan: .*memory:3"):
        trainer.train()


def go_on(out, **changes):
    trainer = tiny_trainer(out, **changes)
    trainer.train(resume_from_checkpoint=str(last_checkpoint(out)))
    return trainer


def test_a_run_that_is_over_takes_no_further_step(tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "lr_scheduler": "constant"}
    tiny_trainer(tmp_path, **options).train()
    assert go_on(tmp_path, **options).state.global_step == 2
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_checkpoints_and_reports_come_as_the_run_that_goes_on_says(tmp_path):
    tiny_trainer(tmp_path, max_steps=1).train()
    trainer = go_on(tmp_path, save_steps=1, log_steps=2, keep=9)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 4]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in range(1, 5)}


def test_a_run_goes_on_with_steps_of_the_same_samples_alone(tmp_path):
    expected = tiny_trainer(tmp_path / "whole")
    expected.train()
    tiny_trainer(tmp_path, max_steps=2, lr_scheduler="constant").train()
    for changes, message in (
        ({"batch_size": 2}, r"expected 4 samples in a step \(batch_size x accumulation x processes\), got 2"),
        ({"size": 20}, "expected 16 samples, got 20"),
    ):
        with pytest.raises(ValueError, match=message):
            go_on(tmp_path, **changes)
    tiny_trainer(tmp_path / "first", save_steps=2, keep=9).train()
    (tmp_path / "first/checkpoint-4").rename(tmp_path / "moved")
    trainer = go_on(tmp_path / "first", batch_size=2, accumulation=2)
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-4)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    tiny_trainer(tmp_path, size=4, save_steps=1).train()
    other = tiny_trainer(tmp_path, size=4, train=("packer",))
    with pytest.raises(ValueError, match="other parameters"):
        other.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
