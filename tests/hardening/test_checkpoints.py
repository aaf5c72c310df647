"""Checkpoint folders of strangers: damaged bytes and settings are a CheckpointError, and nothing of them is run."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llava_st.checkpoints.lora import Adapted
from llava_st.checkpoints.names import EMBEDDING
from llava_st.checkpoints.reading import CheckpointError, open_folder
from llava_st.checkpoints.tokens import load_tokenizer
from llava_st.tiny import tiny_processor
from safetensors.torch import save_file

from tests.hardening.profiles import fuzz
from tests.hardening.test_parsers import mutated


@fuzz(60)
@given(st.data())
def test_damaged_weights_are_tensors_or_a_checkpoint_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    name = data.draw(st.sampled_from(("model.safetensors", "pytorch_model.bin")))
    tensors = {EMBEDDING: torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(tensors, folder / name) if name[-1] == "s" else torch.save(tensors, folder / name)
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        here = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[here : here + 1] = data.draw(st.binary(max_size=3))
    (folder / name).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        weights = open_folder(folder, allow_pickle=True)
        for each, spec in weights.specs.items():
            assert weights.read(each).shape == spec.shape


INDEX = {"metadata": {}, "weight_map": {EMBEDDING: "model-1.safetensors", "b": "model-1.safetensors"}}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}


@fuzz(60)
@given(st.data())
def test_any_index_and_settings_are_read_or_a_checkpoint_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("index")
    tensors = {EMBEDDING: torch.ones(3, 4), "b": torch.zeros(2)}
    save_file(tensors, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(mutated(INDEX, data)))
    (folder / "adapter_config.json").write_text(json.dumps(mutated(ADAPTER, data)))
    pair = {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}
    target = EMBEDDING.removesuffix(".weight")
    named = {f"base_model.model.{target}.lora_{side}.weight": x for side, x in pair.items()}
    save_file(named, folder / "adapter_model.safetensors")
    save_file({"base_model.model.b": torch.ones(2)}, folder / "non_lora_trainables.safetensors")
    with contextlib.suppress(CheckpointError):
        adapted = Adapted(open_folder(folder), folder)
        assert adapted.read(EMBEDDING).shape == (3, 4)


def test_a_tokenizer_brings_no_program(tmp_path, monkeypatch):
    """By default transformers would ask whether the code beside it may run."""
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "EvilTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
