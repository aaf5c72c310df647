"""Stages: their settings, and which parameters they train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from llava_st import LlavaStForConditionalGeneration
from llava_st.checkpoints.published import full_size_config
from llava_st.tiny import tiny_config, tiny_model, tiny_processor
from llava_st.training import arguments
from llava_st.training.export import export
from llava_st.training.rows import needed_rows
from llava_st.training.run import load, run_stage
from llava_st.training.settings import PARTS, from_mapping, published_stages, read_settings
from llava_st.training.sharding import refuse_other_sharding
from llava_st.training.trainable import (
    describe,
    optimizer_bytes,
    optimizer_groups,
    prepare,
    reset_packer,
    saved_by_rows,
)

from tests.model.training_runs import SETTINGS

GIVEN = {
    "name": "x",
    "positions": True,
    "train": ["packer"],
    "learning_rate": 1e-4,
    "batch_size": 2,
    "accumulation": 1,
}


def changed(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_published_hyper_parameters():
    content, coordinates, tasks = (read_settings(name) for name in ("content", "coordinates", "tasks"))
    assert published_stages() == ["content", "coordinates", "tasks"]
    assert (content.learning_rate, content.batch_size, content.accumulation) == (1e-4, 4, 2)
    assert set(content.train) == {"packer", "embedding"}
    assert not content.positions
    assert not content.lora_rank
    for stage in (coordinates, tasks):
        assert (stage.lora_rank, stage.lora_alpha, stage.lora_dropout) == (128, 256, 0.05)
        assert (stage.rate("lora"), stage.rate("packer"), stage.rate("positions")) == (2e-4, 2e-5, 2e-5)
        assert (stage.batch_size, stage.accumulation) == (2, 2)
        assert set(stage.train) == {"packer", "positions", "embedding"}
    for stage in (content, coordinates, tasks):
        assert (stage.beta1, stage.beta2, stage.epsilon, stage.weight_decay) == (0.9, 0.999, 1e-8, 0)
        assert (stage.lr_scheduler, stage.warmup_ratio, stage.clip, stage.epochs) == ("cosine", 0.03, 1.0, 1)
        assert (stage.bf16, stage.tf32, stage.gradient_checkpointing) == (True, True, True)
        assert (stage.max_length, stage.workers, stage.seed) == (32768, 4, 42)
        assert (stage.packer_between_stages, stage.embedding_rows) == ("reset", "all")
    assert dataclasses.replace(tasks, name=coordinates.name) == coordinates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: there is no such setting"),
        ({"deepspeed": "zero2.json"}, "deepspeed: not supported.*FSDP2"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
        ({"learning_rate": True}, "learning_rate: expected a number"),
        ({"batch_size": 2.5}, "batch_size: expected int, got 2.5"),
        ({"batch_size": True}, "batch_size: expected int, got True"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"max_steps": 0}, "max_steps: expected at least 1, or -1, got 0"),
        ({"positions": 1}, "positions: expected bool, got 1"),
        ({"train": "packer"}, "train: expected"),
        ({"train": ["tower"]}, "got 'tower'"),
        ({"train": []}, "expected at least one part"),
        ({"train": ["positions"], "positions": False}, "has positions"),
        ({"lora_rank": 4, "lora_alpha": 8, "train": ["language_model"]}, "has language_model"),
        ({"lora_rank": 4}, "lora_alpha"),
        ({"learning_rates": {"proj": 1}}, "got 'proj'"),
        ({"sharding": "zero"}, "sharding: expected one of none, fsdp2, got 'zero'"),
        ({"packer_between_stages": "maybe"}, "packer_between_stages"),
    ],
)
def test_wrong_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        from_mapping({**GIVEN, **change})


def test_missing_settings_are_errors():
    with pytest.raises(ValueError, match="accumulation: expected a value"):
        from_mapping({name: value for name, value in GIVEN.items() if name != "accumulation"})


def test_settings_are_read_from_files_and_changed(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("name: x\npositions: true\ntrain: [packer]\nlearning_rate: 1e-4\nbatch_size: 2\naccumulation: 1\n")
    settings = read_settings(path, ["learning_rates={packer: 1e-3}", "train=[packer, projector]", "packed=true"])
    assert (settings.rate("packer"), settings.rate("projector"), settings.packed) == (1e-3, 1e-4, True)
    with pytest.raises(ValueError, match=r"stage.yaml: set: expected name=value, got 'packed'"):
        read_settings(path, ["packed"])


def test_each_part_trains_alone():
    beginnings = {
        "packer": "model.visual_tokenizer.packer.",
        "positions": "model.visual_tokenizer.lape.",
        "projector": "model.visual_tokenizer.projector.",
        "embedding": "model.language_model.embed_tokens.",
        "language_model": "model.language_model.",
        "head": "lm_head.",
    }
    everything = {name for name, _ in tiny_model().named_parameters()}
    found = set()
    for part in PARTS:
        model = tiny_model()
        (trainable,) = prepare(model, changed(train=(part,)))
        assert trained(model) == set(trainable.names)
        assert all(name.startswith(beginnings[part]) for name in trainable.names)
        assert not found & set(trainable.names)
        found |= set(trainable.names)
    assert {name.split(".")[1] for name in everything - found} == {"vision_tower"}


def test_adapters_are_on_linear_layers_of_the_language_model_alone():
    model = tiny_model()
    linear = [n for n, m in model.model.language_model.named_modules() if type(m) is torch.nn.Linear]
    trainables = prepare(model, changed(train=("positions",), lora_rank=4, lora_alpha=8.0, lora_learning_rate=2e-4))
    assert [(each.part, each.rate) for each in trainables] == [("positions", 1e-3), ("lora", 2e-4)]
    expected = {f"model.language_model.{n}.lora_{side}.default.weight" for n in linear for side in "AB"}
    assert set(trainables[1].names) == expected
    assert len(linear) == 14
    assert trained(model) == expected | set(trainables[0].names)
    groups = optimizer_groups(model, trainables, SETTINGS)
    assert [group["lr"] for group in groups] == [1e-3, 2e-4]
    assert "262,144" not in describe(model, trainables, SETTINGS)
    assert "adapters on the language model's linear layers" in describe(model, trainables, SETTINGS)


def test_rows_that_are_read():
    config = tiny_config(compat="released")
    names = ("vid_start", "vid_patch", "vid_end", "width_input")
    assert needed_rows(config) == [config.token_ids[name] for name in names]
    assert needed_rows(tiny_config(compat="released", lape=False)) == needed_rows(config)[:3]
    assert needed_rows(tiny_config()) == []
    model = tiny_model(compat="released")
    assert saved_by_rows(model) == ((config.vocab_size - 4) * 64 * 8, (config.vocab_size - 4) * 64 * 4)


def test_tied_embeddings_cannot_train_rows():
    model = tiny_model(compat="released", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="not tied"):
        prepare(model, changed(train=("embedding",), embedding_rows="needed"))


def test_a_stage_and_a_model_have_positions_or_not():
    with pytest.raises(ValueError, match="lape=True"):
        prepare(tiny_model(lape=False), SETTINGS)


def test_one_process_takes_one_gpu(tmp_path, monkeypatch):
    class OnFour(arguments.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(arguments, "TrainingArguments", OnFour)
    found = arguments.training_arguments(changed(batch_size=2), tmp_path)
    assert (found.n_gpu, found.train_batch_size) == (1, 2)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_sharding_by_accelerate_is_refused(name, monkeypatch):
    refuse_other_sharding()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="fsdp2"):
        refuse_other_sharding()


def test_a_new_packer_depends_on_the_seed():
    model, other = tiny_model(0), tiny_model(1)
    reset_packer(model, 5)
    reset_packer(other, 5)
    old = tiny_model(0).model.visual_tokenizer.packer.state_dict()
    for name, value in model.model.visual_tokenizer.packer.state_dict().items():
        assert torch.equal(value, other.model.visual_tokenizer.packer.state_dict()[name])
        assert value.dim() == 1 or not torch.equal(value, old[name])


def test_exported_models_are_those_that_were_trained(tmp_path):
    settings = changed(
        train=("packer", "embedding"), embedding_rows="needed", lora_rank=4, lora_alpha=8.0, positions=True
    )
    model = tiny_model(compat="released")
    prepare(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = tiny_processor(compat="released").apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": torch.zeros(10, 36, 36, 3).byte()}, "Where?"]}]
    )
    expected = model.eval()(**inputs).logits
    export(model, tiny_processor(compat="released"), tmp_path / "model", torch.float32)
    again, processor = load(tmp_path / "model", changed(bf16=False))
    torch.testing.assert_close(again.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tiny_model(compat="released")(**inputs).logits, expected, atol=1e-2)
    assert processor.compat == "released"


def test_a_stage_that_is_done_is_not_trained_again(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="the stage is done"):
        run_stage(SETTINGS, "tiny", "none.json", tmp_path)


@pytest.mark.parametrize("stage", ["content", "coordinates"])
def test_the_page_states_the_memory_of_the_published_size(stage):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    moments = []
    for rows in ("all", "needed"):
        settings = read_settings(stage, [f"embedding_rows={rows}"])
        config = full_size_config()
        config.lape, config.compat = settings.positions, "released"
        with torch.device("meta"):
            model = LlavaStForConditionalGeneration(config)
        count = sum(each.numel for each in prepare(model, settings))
        moments.append(f"{optimizer_bytes(count) / 1e6:,.0f} MB")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{stage}`") and "MB" in line)
    assert row.endswith(f"| {moments[0]} | {moments[1]} |")
    saved, gradients = (f"{nbytes / 1e6:,.0f} MB" for nbytes in saved_by_rows(model))
    assert f"saves {saved} of AdamW's moments and {gradients}" in page
