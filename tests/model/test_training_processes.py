"""Two processes on one CPU train as one does."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.model.training_processes import BF16, RUNS, stage, train_as, write_stage
from tests.model.training_runs import first_gradients, forkserver, losses, tiny_trainer


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes wrote: all runs in one start, which takes most of the time."""
    out = tmp_path_factory.mktemp("two")
    write_stage(out / "stage")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forkserver().Process(target=train_as, args=(rank, port, out)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return out, json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_gradients_are_those_of_one_process(two, tmp_path, name):
    out, found = two
    changes = {**RUNS[name], "sharding": "none"}
    changes["batch_size"] *= 2
    expected, gradients = first_gradients(tmp_path, **changes)
    torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    for rank in range(2):
        other = torch.load(out / f"{name}.{rank}.pt", weights_only=True)
        assert other.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(other[parameter], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")


def test_sharded_bfloat16_is_that_of_one_process_to_rounding(two, tmp_path):
    trainer = tiny_trainer(tmp_path, **{**BF16, "batch_size": 8})
    trainer.train()
    torch.testing.assert_close(torch.tensor(two[1]["bf16"]), torch.tensor(losses(trainer)), rtol=5e-3, atol=0)


def test_parameters_are_sharded_but_for_the_frozen_tower(two):
    _, found = two
    assert found["plain"]
    assert all(name.startswith("model.vision_tower.") for name in found["plain"])


def test_sharded_models_encode_in_evaluations_and_train_on(two):
    _, found = two
    assert found["evaluated"] == [1.0, 1.0]
    assert found["after evaluations"] == found["resumed"][0][:2]


def test_sharded_training_goes_on_from_whole_tensors(two):
    out, found = two
    whole, again = found["resumed"]
    assert again[-1] == whole[-1]
    counts = json.loads((out / "resumed/checkpoint-4/training.json").read_text())["failures"]
    assert len(counts) == 2
    with safe_open(out / "resumed/checkpoint-4/weights.safetensors", "pt") as file:
        assert file.get_slice("model.visual_tokenizer.lape.temporal_input").get_shape() == [100, 64]


def test_a_sharded_stage_hands_on_the_model_of_one_process(two, tmp_path):
    write_stage(tmp_path)
    expected = load_file(stage(tmp_path, batch_size=2) / "model.safetensors")
    found = load_file(two[0] / "stage" / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert any(".lape." in name for name in found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
