"""Plain language models with anchors among their rows."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from llava_st.checkpoints.merge import merge, merge_checkpoint
from llava_st.checkpoints.reading import CheckpointError
from llava_st.convert import main
from llava_st.tiny import tiny_config, tiny_model, tiny_processor
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .prompts import batch, sample

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def prompts(config) -> dict[str, Tensor]:
    return batch(
        [
            sample(config, ("video", 10), 40, 41, ("temporal_input", 0.37), 42, seed=1),
            sample(config, "image", 50, ("width_input", 0.2), ("height_input", 0.71), 51, 52, 53, seed=2),
            sample(config, 60, 61, 62, seed=3),
        ]
    )


def embeddings(model, inputs: dict[str, Tensor]) -> Tensor:
    media = {name: inputs[name] for name in ("pixel_values", "pixel_values_videos", "video_frames")}
    return model.model.embed(inputs["input_ids"], inputs["positions"], model.encode(**media))


def quieten_anchors(model, factor: float) -> None:
    """So that a random model generates words as well."""
    with torch.no_grad():
        for table in model.model.lape.output_tables():
            table.mul_(factor)


def text_config(**changes) -> dict:
    return {**tiny_config().text_config.to_dict(), **changes}


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("kind", ["qwen2", "tied", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_merged_model_generates_the_same_ids(kind, compat, dtype):
    text = {"qwen2": {}, "tied": {"tie_word_embeddings": True}, "llama": LLAMA}[kind]
    model = tiny_model(seed=3, compat=compat, text_config=text_config(**text)).to(dtype)
    quieten_anchors(model, 0.5 if kind == "tied" else 0.3)
    inputs = prompts(model.config)
    before = copy.deepcopy(model.config.to_dict())
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (expected >= model.config.vocab_size).any()
    assert (expected < model.config.vocab_size).any()
    merged = merge(model)
    assert isinstance(merged, AutoModelForCausalLM._model_mapping[type(model.config.text_config)])
    got = merged.generate(
        inputs_embeds=embeddings(model, inputs),
        attention_mask=inputs["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(got, expected)
    # The model is as it was.
    assert model.config.to_dict() == before
    again = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(again, expected)


@torch.no_grad()
def test_embedding_and_head_are_no_longer_tied():
    model = tiny_model(text_config=text_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    merged = merge(model)
    rows = model.config.vocab_size + 300
    assert merged.config.vocab_size == rows
    assert merged.config.tie_word_embeddings is False
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert embedding.shape == head.shape == (rows, 64)
    assert embedding.data_ptr() != head.data_ptr()
    assert torch.equal(embedding[:-300], head[:-300])
    assert torch.equal(embedding[-200:-100], model.model.lape.height_input)
    assert torch.equal(head[-100:], model.model.lape.width_output)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


@torch.no_grad()
def test_the_weights_of_the_layers_are_shared():
    model = tiny_model()
    merged = merge(model)
    ours, theirs = model.model.language_model.layers[0], merged.model.layers[0]
    assert theirs is not ours
    assert theirs.mlp.down_proj.weight is ours.mlp.down_proj.weight
    assert theirs.self_attn.config is merged.config
    assert not any(tensor.is_meta for tensor in (*merged.parameters(), *merged.buffers()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    model = tiny_model(seed=4, text_config=text_config(tie_word_embeddings=True)).bfloat16()
    quieten_anchors(model, 0.5)
    folder = tmp_path_factory.mktemp("ours") / "model"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_a_checkpoint_is_merged_tensor_by_tensor(saved, tmp_path):
    folder, model = saved
    assert main(["--merge", str(folder), str(tmp_path / "plain"), "--max-shard-size", "0.0001"]) == 0
    assert len(list(tmp_path.glob("plain/*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged = merge(model)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.architectures == ["Qwen2ForCausalLM"]
    state = merged.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    inputs = prompts(model.config)
    options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 12, "do_sample": False}
    embeds = embeddings(model, inputs)
    got, expected = (each.generate(inputs_embeds=embeds, **options) for each in (loaded, merged))
    assert torch.equal(got, expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.decode([model.config.vocab_size + 112]) == "<HEIGHT-012>"


def test_a_model_without_positions_has_nothing_to_merge(tmp_path):
    model = tiny_model(lape=False)
    with pytest.raises(CheckpointError, match="first training stage"):
        merge(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="first training stage"):
        merge_checkpoint(tmp_path / "model", tmp_path / "plain")


def test_a_checkpoint_that_lacks_tensors_is_refused(saved, tmp_path):
    model = saved[1]
    removed = "model.visual_tokenizer.lape.width_input"
    kept = {name: x for name, x in model.state_dict().items() if name not in (removed, "lm_head.weight")}
    model.save_pretrained(tmp_path / "model", state_dict=kept)
    with pytest.raises(CheckpointError, match=f"missing: {removed}"):
        merge_checkpoint(tmp_path / "model", tmp_path / "plain")
