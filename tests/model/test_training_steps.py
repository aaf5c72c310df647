"""Steps of training: their gradients, whatever they are dealt out to, and what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from llava_st.data.collator import Collator
from llava_st.tiny import tiny_model, tiny_processor
from llava_st.training.losses import StepLoss, count_items, merge_totals

from tests.model.training_runs import Gradients, Samples, first_gradients, losses, tiny_trainer


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "released"},
        {"positions": False, "train": ("packer", "embedding")},
        {"positions": False, "train": ("packer", "embedding"), "compat": "released"},
        {"size": 15, "compat": "released"},  # the last micro-batch has fewer
    ],
)
def test_gradients_are_equal_for_one_and_four_micro_batches(tmp_path, options, packed):
    first, whole = first_gradients(tmp_path, batch_size=16, **options)
    second, parts = first_gradients(tmp_path, batch_size=4, accumulation=4, packed=packed, **options)
    assert first == pytest.approx(second, rel=1e-5)
    assert_same(parts, whole)
    assert sum(gradient.abs().sum() > 0 for gradient in whole.values()) > len(whole) / 2


def test_gradients_are_equal_with_checkpointing(tmp_path):
    _, kept = first_gradients(tmp_path, batch_size=16)
    _, computed_again = first_gradients(tmp_path, batch_size=16, gradient_checkpointing=True)
    assert_same(computed_again, kept)


def test_the_loss_is_the_models(tmp_path):
    for compat in ("paper", "released"):
        samples = [Samples(6)[i] for i in range(6)]
        for packed in (False, True):
            batch = Collator(tiny_processor(compat=compat), packed=packed)(samples)
            model = tiny_model(compat=compat)
            expected = model(**batch).loss
            loss = StepLoss(model, loss_samples=6.0)
            torch.testing.assert_close(model(**batch).loss, expected)
            assert loss.targets.sum() == count_items(batch, per_sample=False)
            assert count_items(batch, per_sample=True) == 6


@pytest.mark.parametrize("kinds", [("text",), ("image",), ("video",)])
def test_every_parameter_gets_a_gradient_whatever_a_batch_shows(tmp_path, kinds):
    _, gradients = first_gradients(tmp_path, size=4, kinds=kinds)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    packer = [value for name, value in gradients.items() if ".packer." in name]
    assert packer
    assert any(value.abs().sum() > 0 for value in packer) == (kinds == ("video",))


def test_rows_that_train_move_as_those_of_the_whole_matrix(tmp_path):
    options = {"compat": "released", "train": ("embedding",), "batch_size": 16}
    _, whole = first_gradients(tmp_path, **options)
    trainer = tiny_trainer(tmp_path, **{**options, "embedding_rows": "needed", "clip": 0.0})
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    rows = trainer.model.model.trainable_rows
    (expected,) = whole.values()
    (found,) = gradients.first.values()
    assert found.shape == (4, 64)
    torch.testing.assert_close(found, expected[rows.ids])
    assert (found.abs().sum(1) > 0).all()


def test_bfloat16(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True, train=("packer", "positions"), lora_rank=4, lora_alpha=8.0)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_reports(tmp_path):
    seen = []

    def evaluate(model, step):
        assert not model.training
        seen.append(step)
        return {"m_tiou": step / 10}

    trainer = tiny_trainer(tmp_path, size=12, evaluate=evaluate, eval_steps=2)
    trainer.train()
    trainer.plot()
    assert seen == [2, 3]
    reports = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(reports) == 3
    tasks = [{name: loss for name, loss in report.items() if name.startswith("loss/")} for report in reports]
    assert set().union(*tasks) == {"loss/text", "loss/image", "loss/video"}
    for report, by_task in zip(reports, tasks, strict=True):
        assert report.keys() >= {"tokens_per_second", "memory_gb", "step"}
        assert 0 <= report["waiting_for_data"] <= 1
        assert min(by_task.values()) <= report["loss"] <= max(by_task.values())
    assert [entry["eval/m_tiou"] for entry in trainer.state.log_history if "eval/m_tiou" in entry] == [0.2, 0.3]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_give_any_numbers_and_come_at_the_end_by_themselves(tmp_path):
    seen = []
    trainer = tiny_trainer(
        tmp_path, size=8, save_steps=1, evaluate=lambda _, step: {"at": torch.tensor(seen.append(step) or step)}
    )
    trainer.train()
    assert seen == [2]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["eval/at"] for entry in state["log_history"] if "eval/at" in entry] == [2.0]


def test_models_in_bfloat16_are_evaluated_as_they_are_trained(tmp_path):
    inputs = Collator(tiny_processor())([Samples(1)[0]])

    def evaluate(model, step):
        tokens = model.encode(pixel_values_videos=inputs["pixel_values_videos"], video_frames=inputs["video_frames"])
        return {"finite": torch.isfinite(tokens).all()}

    trainer = tiny_trainer(tmp_path, size=4, bf16=True, dtype=torch.bfloat16, train=("packer",), evaluate=evaluate)
    trainer.train()
    assert [entry["eval/finite"] for entry in trainer.state.log_history if "eval/finite" in entry] == [1.0]


def test_training_learns(tmp_path):
    trainer = tiny_trainer(tmp_path, size=8, epochs=8)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1


def test_losses_of_tasks_are_means_over_targets():
    assert merge_totals([{"b": [3.0, 2], "a": [1.0, 1]}, {"b": [1.0, 2]}]) == {"a": 1.0, "b": 1.0}
