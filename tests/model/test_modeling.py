"""The model: batches of different kinds, both modes, generation, and what is saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llava_st import LlavaStConfig, LlavaStForConditionalGeneration, LlavaStModel
from llava_st.tiny import tiny_config, tiny_model
from llava_st.vision_tower import vision_features
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    SiglipVisionModel,
    Trainer,
    TrainingArguments,
)

from tests.model.prompts import batch, packed, sample

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model() -> LlavaStForConditionalGeneration:
    return tiny_model()


def samples_of_all_kinds(config: LlavaStConfig) -> list[dict]:
    return [
        sample(config, 1, ("video", 10), 2, ("temporal_input", 0.25), ("width_input", 0.123), 3, seed=1),
        sample(config, 4, "image", ("height_input", 1.0), 5, 6, seed=2),
        sample(config, 7, 8, 9, seed=3),
        sample(config, "image", 10, "image", 11, ("video", 3), 12, seed=4),
        sample(config, ("video", 3), 13, seed=5),
        sample(config, 300, 14, 400, ("temporal_input", 0.0)),
    ]


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_its_samples(model, side):
    samples = samples_of_all_kinds(model.config)
    logits = model(**batch(samples, side)).logits
    for row, each in zip(logits, samples, strict=True):
        alone = model(**each).logits[0]
        own = row[-len(alone) :] if side == "left" else row[: len(alone)]
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_packed_row_gives_the_logits_of_its_samples(model):
    samples = samples_of_all_kinds(model.config)
    logits = model(**packed(samples)).logits[0]
    alone = torch.cat([model(**each).logits[0] for each in samples])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pictures_reach_the_logits_of_their_own_sample_alone(model):
    samples = samples_of_all_kinds(model.config)
    before = model(**batch(samples)).logits[:, -1]
    samples[3]["pixel_values"] = samples[3]["pixel_values"].flip(0)
    changed = (model(**batch(samples)).logits[:, -1] - before).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, False, False, True, False, False]


@torch.no_grad()
def test_samples_may_share_what_was_encoded_once(model):
    config = model.config
    first, second = sample(config, 1, ("video", 7), 2, 3), sample(config, ("video", 7), 4)
    pictures = {name: first[name] for name in ("pixel_values_videos", "video_frames")}
    tokens = model.encode(**pictures)
    both = batch([first, {name: second[name] for name in ("input_ids", "positions")}])
    both = {name: both[name] for name in ("input_ids", "positions", "attention_mask")}
    index = model.visual_index(both["input_ids"], shared=True)
    logits = model(**both, visual_tokens=tokens, visual_index=index).logits
    torch.testing.assert_close(logits[0], model(**first).logits[0], rtol=0, atol=1e-5)
    alone = model(**{**second, **pictures}).logits[0]
    torch.testing.assert_close(logits[1, -len(alone) :], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_placeholders_and_pictures_must_agree(model, change):
    inputs = sample(model.config, 1, ("video", 6), 2)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([ids, ids[:, 1:3]], 1) if change == "longer" else ids[:, :20]
    inputs["positions"] = torch.full_like(inputs["input_ids"], torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"places for \d+ visual tokens, but the images and videos have \d+"):
        model(**inputs)


def test_wrong_pictures_are_refused(model):
    inputs = sample(model.config, ("video", 6), 2)
    with pytest.raises(ValueError, match=r"video_frames: expected 6 frames in all, got \[5\]"):
        model(**{**inputs, "video_frames": torch.tensor([5])})
    with pytest.raises(ValueError, match="needs video_frames"):
        model(**{**inputs, "video_frames": None})
    with pytest.raises(ValueError, match=r"pixels: expected shape \[N, 3, 36, 36\], got \[6, 3, 35, 36\]"):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :, 1:]})
    with pytest.raises(ValueError, match="exactly one of"):
        model()


# The two modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("compat", ["paper", "released"])
@torch.no_grad()
def test_embeddings_are_those_of_the_published_implementation(kind, compat):
    with safe_open(GOLDEN / f"splice_{kind}.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = tiny_config(
        compat=compat,
        token_ids=facts["token_ids"],
        text_config={
            "model_type": "qwen2",
            "vocab_size": 74,
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    )
    model = LlavaStModel(config)
    model.get_input_embeddings().weight.copy_(tensors["embed_tokens"])
    for axis in ("temporal", "height", "width"):
        for side in ("input", "output"):
            getattr(model.lape, f"{axis}_{side}").copy_(tensors[f"{axis}_{side}"])
    if kind == "video":
        visual = torch.cat([tensors["fast"].flatten(0, 1), tensors["slow"].flatten(0, 1)])
    else:
        visual = tensors["image_features"].flatten(0, 1)
    positions = config.coordinate_tokens.positions(tensors["input_ids"], facts["variables"])
    embeddings = model.embed(tensors["input_ids"], positions, visual)
    torch.testing.assert_close(embeddings, tensors[f"inputs_embeds_{compat}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_fast_stream_and_the_widths_of_prompts_learn_in_paper_alone(compat):
    model = tiny_model(compat=compat)
    inputs = sample(model.config, ("video", 10), 1, ("width_input", 0.5), 2, ("temporal_output", 0.3), 3)
    tables = []
    inject = model.model.lape.visual_tables  # positions of visual features use the same tables: leave them out
    model.model.lape.visual_tables = lambda: [tables.append(t) or t.detach() for t in inject()]
    model.model.visual_tokenizer.execution = "direct"
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(tables) == 3
    paper = compat == "paper"
    fast = [p.grad for p in model.model.visual_tokenizer.packer.fast.parameters()]
    assert any(grad is not None and grad.any() for grad in fast) == paper
    grad = model.model.lape.width_input.grad
    assert (grad is not None and bool(grad.any())) == paper
    assert model.model.lape.temporal_input.grad.any()
    assert model.model.visual_tokenizer.packer.slow.output.weight.grad.any()
    row = model.config.token_ids["width_input"]
    assert bool(model.get_input_embeddings().weight.grad[row].any()) != paper


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_loss_of_a_batch(compat):
    model = tiny_model(compat=compat)
    config = model.config
    samples = [
        sample(config, ("video", 10), 1, 2, ("temporal_output", 0.3), ("width_output", 0.77), 3, seed=1),
        sample(config, "image", 4, 5, ("height_output", 0.5)),
        sample(config, 6, 7, 8, 9),
    ]
    for each in samples:
        ids = each["input_ids"]
        each["labels"] = ids.masked_fill(ids < 1, 0)
        each["labels"][:, 1 : -int(each["input_ids"][0, -1] % 3 + 3)] = -100
    alone = [model(**each).loss for each in samples]
    targets = [int((each["labels"][:, 1:] != -100).sum()) for each in samples]
    if compat == "released":  # a sum over samples of the mean of each
        expected = sum(alone)
    else:
        expected = sum(loss * n for loss, n in zip(alone, targets, strict=True)) / sum(targets)
    for inputs in (batch(samples, "right"), batch(samples, "left"), packed(samples)):
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-5, atol=1e-6)
    if compat == "paper":  # of a step that sees ten times as many targets
        step = model(**packed(samples), num_items_in_batch=10 * sum(targets)).loss
        torch.testing.assert_close(step, expected / 10, rtol=1e-5, atol=1e-6)


def test_padding_behind_samples_costs_no_mask(monkeypatch):
    """Torch's attention is faster without; the loss is the same (above), and so are the gradients."""
    model, given = tiny_model(), []
    samples = [sample(model.config, ("video", 10), 1, 2, 3, seed=1), sample(model.config, 4, 5, 6)]
    model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, options: given.append(options["attention_mask"] is not None), with_kwargs=True
    )

    def gradients(side, **changes):
        inputs = {**batch(samples, side), **changes}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    found = [gradients("right"), gradients("left")]
    hole = batch(samples, "right")["attention_mask"]
    hole[:, 1] = 0
    gradients("right", attention_mask=hole)
    with torch.no_grad():
        model(**batch(samples, "right"))
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation", "eager")
    found.append(gradients("right"))
    assert given == [False, True, True, True, True]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_without_lape_as_in_the_first_stage():
    model = tiny_model(lape=False)
    assert model.model.lape is None
    samples = [sample(model.config, ("video", 10), 1, 2, 3), sample(model.config, 4, 5)]
    inputs = batch(samples)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.shape[-1] == model.config.vocab_size
        torch.testing.assert_close(logits[1, -2:], model(**samples[1]).logits[0], rtol=0, atol=1e-5)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    loss = model(**inputs, labels=labels).loss
    words = logits.log_softmax(-1)
    expected = -(words[0, -3, 2] + words[0, -2, 3] + words[1, -2, 5]) / 3  # no padding predicts the first token, 4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert model.model.visual_tokenizer.packer.fast.output.weight.grad.any()


def test_logits_are_left_out_where_the_loss_is_asked_for_unless_they_are_asked_for_too(model):
    inputs = sample(model.config, 1, 2, 3)
    with torch.no_grad():
        full = model(**inputs).logits
        assert model(**inputs, labels=inputs["input_ids"]).logits is None
        assert torch.equal(model(**inputs, labels=inputs["input_ids"], logits_to_keep=0).logits, full)
        torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, full[:, -1:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 2])).logits, full[:, [0, 2]])


# Generation ----------------------------------------------------------------------------------------------------------


def generated(model, inputs: dict, **options) -> torch.Tensor:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=6, **options)[:, length:]


def test_generation_in_a_batch_is_that_of_each_sample(model):
    samples = samples_of_all_kinds(model.config)
    together = generated(model, batch(samples, "left"))
    for row, each in zip(together, samples, strict=True):
        alone = generated(model, each)[0]
        assert torch.equal(row[: len(alone)], alone)
    assert len({tuple(row.tolist()) for row in together}) > 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_pair_each_sample_with_its_own_pictures(model, options):
    samples = samples_of_all_kinds(model.config)
    together = generated(model, batch(samples, "left"), **options)
    count = options.get("num_return_sequences", 1)
    for i, each in enumerate(samples):
        alone = generated(model, each, **options)
        for row, own in zip(together[count * i : count * (i + 1)], alone, strict=True):
            assert torch.equal(row[: len(own)], own)


def test_several_samples_of_one_prompt_see_its_pictures(model):
    inputs = batch(samples_of_all_kinds(model.config)[1:4:2], "left")
    torch.manual_seed(0)
    expanded = generated(model, inputs, do_sample=True, num_return_sequences=2, top_k=1)
    assert torch.equal(expanded[0::2], expanded[1::2])
    assert torch.equal(expanded[0::2], generated(model, inputs))


def test_generation_without_a_cache_is_the_same(model):
    inputs = batch(samples_of_all_kinds(model.config), "left")
    assert torch.equal(generated(model, inputs), generated(model, inputs, use_cache=False))


def test_a_second_turn_continues_the_cache_of_the_first(model):
    config = model.config
    first = sample(config, 1, ("video", 10), 2, ("temporal_input", 0.4), 3)
    result = model.generate(**first, max_new_tokens=4, return_dict_in_generate=True)
    more = torch.cat([result.sequences, torch.tensor([[5, config.token_ids["height_input"], 6]])], 1)
    missing = more.shape[1] - first["positions"].shape[1]
    positions = torch.nn.functional.pad(first["positions"], (0, missing), value=torch.nan)
    positions[0, -2] = 0.7
    cold = {**first, "input_ids": more, "positions": positions}
    warm = {"input_ids": more, "positions": positions, "cache": result.cache}
    assert torch.equal(generated(model, cold), generated(model, warm))


def test_placeholders_are_never_an_answer(model):
    inputs = sample(model.config, 1, 2)
    forbidden = sorted(model.config.token_ids.values())
    scores = model.generate(
        **inputs, max_new_tokens=2, output_scores=True, return_dict_in_generate=True, do_sample=False
    ).scores
    assert torch.isneginf(scores[0][:, forbidden]).all()
    assert torch.isfinite(scores[0]).sum() == scores[0].numel() - len(forbidden)


# Other language models, dtypes, saving -------------------------------------------------------------------------------

OTHER_MODELS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox"},
}


def other_model(name: str, **changes) -> LlavaStForConditionalGeneration:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = tiny_config().vocab_size
    return tiny_model(text_config={**sizes, "vocab_size": vocabulary, **OTHER_MODELS[name]}, **changes)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_any_causal_language_model_will_do(name, tmp_path):
    model = other_model(name)
    samples = samples_of_all_kinds(model.config)[:3]
    with torch.no_grad():
        logits = model(**batch(samples)).logits
        torch.testing.assert_close(logits[2, -3:], model(**samples[2]).logits[0], rtol=0, atol=1e-5)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == (name == "tied")
    model.save_pretrained(tmp_path)
    again = LlavaStForConditionalGeneration.from_pretrained(tmp_path)
    inputs = batch(samples, "left")
    assert torch.equal(generated(model, inputs), generated(again, inputs))
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == (name == "tied")


def test_models_whose_logits_are_more_than_a_product_are_refused():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    for text, message in (
        ({"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16}, "final_logit_softcapping|no plain embed"),
        ({"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 8.0}, "logits_scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_model(text_config={**sizes, **text, "vocab_size": 273})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_bitwise_equal_after_saving_and_loading(tmp_path, dtype):
    tiny_model(compat="released").save_pretrained(tmp_path / "first")
    model = LlavaStForConditionalGeneration.from_pretrained(tmp_path / "first", dtype=dtype)
    model.save_pretrained(tmp_path)
    for loaded in (
        LlavaStForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert type(loaded) is LlavaStForConditionalGeneration
        assert loaded.dtype == dtype
        assert loaded.config.compat == loaded.model.lape.compat == "released"
        own, others = model.state_dict(), loaded.state_dict()
        assert own.keys() == others.keys()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        theirs = dict([*loaded.named_parameters(), *loaded.named_buffers()])
        assert len(tensors) == len(theirs)
        for name, tensor in tensors:
            assert not theirs[name].is_meta, name
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.requires_grad == theirs[name].requires_grad, name
        inputs = batch(samples_of_all_kinds(model.config), "left")
        assert torch.equal(generated(model, inputs), generated(loaded, inputs))
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlavaStConfig)


def test_tables_and_packers_begin_as_published():
    model = tiny_model()
    lape, packer = model.model.lape, model.model.visual_tokenizer.packer.spatial
    assert lape.temporal_input.detach().std() == pytest.approx(1, rel=0.05)
    assert lape.temporal_output.abs().max() <= 1 / 8
    assert packer.query_mlp[0].weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert not packer.query_mlp[0].bias.any()
    assert torch.equal(packer.key_norm.weight, torch.ones(32))


def test_loading_initialises_what_a_checkpoint_lacks_and_nothing_else(tmp_path):
    """From stage one, which has no tables, to stage two."""
    first = tiny_model(lape=False)
    first.save_pretrained(tmp_path)
    second = LlavaStForConditionalGeneration.from_pretrained(tmp_path, lape=True)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert second.model.lape.width_input.detach().std() == pytest.approx(1, rel=0.05)


def test_a_resized_vocabulary_moves_the_anchors_and_no_shared_config():
    config = tiny_config()
    model = LlavaStForConditionalGeneration(config)
    other = LlavaStForConditionalGeneration(config)
    size = config.vocab_size
    model.resize_token_embeddings(size + 5)
    assert model.config.vocab_size == model.model.lape.tokens.vocab_size == size + 5
    assert config.vocab_size == other.config.vocab_size == size
    ids = torch.tensor([[1, size + 5 + 17]])
    assert torch.equal(model.model.embed(ids)[0, 1], model.model.lape.temporal_input[17])
    assert model(input_ids=ids).logits.shape[-1] == size + 5 + 300


def test_gradient_checkpointing_changes_nothing():
    inputs = sample(tiny_config(), ("video", 10), 1, 2, ("temporal_output", 0.3), 3)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is None for p in model.model.vision_tower.parameters())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_layers_may_be_offloaded(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    on_disk = ("model.language_model.layers.1", "model.vision_tower.encoder.layers.0")
    names = ("vision_tower.embeddings", "vision_tower.encoder.layers.1", "vision_tower.post_layernorm")
    names += ("visual_tokenizer", "language_model.embed_tokens", "language_model.layers.0", "language_model.norm")
    names += ("language_model.rotary_emb",)
    places = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in names}, **dict.fromkeys(on_disk, "disk")}
    inputs = batch(samples_of_all_kinds(model.config), "left")
    for device_map in ("auto", places):
        loaded = LlavaStForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(generated(model, inputs), generated(loaded, inputs))
        assert loaded.model.visual_tokenizer.why_not_folded() is None


# The vision tower ----------------------------------------------------------------------------------------------------


def test_the_tower_gives_its_last_layer_without_the_norm_in_any_chunks():
    config = tiny_config().vision_config
    torch.manual_seed(0)
    tower = SiglipVisionModel(config).eval()
    pixels = torch.randn(5, 3, 36, 36)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-1]
    for chunk in (1, 2, 5, 8):
        features = vision_features(tower, pixels, chunk)
        assert features.shape == (5, 9, 9, 48)
        assert not features.requires_grad
        torch.testing.assert_close(features.flatten(1, 2), hidden, rtol=0, atol=1e-5)


def test_packed_images_take_fewer_tokens():
    model = tiny_model(pack_images=True)
    inputs = sample(model.config, 1, "image", 2)
    assert inputs["input_ids"].shape[1] == 2 + 9
    tokens = model.encode(pixel_values=inputs["pixel_values"])
    features = vision_features(model.model.vision_tower, inputs["pixel_values"], 1)[:, None]
    tokenizer = model.model.visual_tokenizer
    expected = tokenizer.packer.spatial(tokenizer.images(features))
    torch.testing.assert_close(tokens, expected.flatten(0, 3))
    model(**inputs)


@pytest.mark.parametrize("wrong", [{"compat": "published"}, {"token_ids": {"im_start": 1}}])
def test_wrong_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match="compat must be|token_ids has no im_end"):
        tiny_config(**wrong)


# What else transformers' users do ------------------------------------------------------------------------------------


def test_low_precision_positions_are_refused(model):
    inputs = sample(model.config, 1, ("temporal_input", 0.603), 2)
    with pytest.raises(TypeError, match="positions must be float64 or float32, got torch.bfloat16"):
        model(**{**inputs, "positions": inputs["positions"].bfloat16()})


@pytest.mark.parametrize(("target", "name"), [("lm_head", "the head"), (r".*embed_tokens", "the embedding")])
def test_adapters_that_would_be_ignored_are_refused(target, name):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=target))
    inputs = sample(tiny_config(), 1, 2, 3)
    with pytest.raises(ValueError, match=f"{name} has an adapter"):
        model(**inputs, labels=inputs["input_ids"])
    merged = model.merge_and_unload()
    assert merged(**inputs, labels=inputs["input_ids"]).loss > 0


def test_frozen_models_with_adapters_checkpoint_reentrantly():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model().train(), peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = sample(tiny_config(), ("video", 10), 1, ("temporal_output", 0.3), 2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_trainer_may_accumulate_gradients(compat, tmp_path):
    inputs = sample(tiny_config(), 1, 2, ("temporal_output", 0.3), 3)
    row = {**inputs, "labels": inputs["input_ids"]}

    def update(steps: int) -> torch.Tensor:
        model = tiny_model(compat=compat).train()
        before = model.lm_head.weight.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
            max_steps=1,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            save_strategy="no",
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=[row] * 4, data_collator=lambda rows: dict(rows[0])).train()
        return model.lm_head.weight.detach() - before

    torch.testing.assert_close(update(4), update(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compat", ["paper", "released"])
@torch.no_grad()
def test_a_single_frame_whose_fast_block_is_one_token(compat):
    model = tiny_model(compat=compat)
    ids = model.config.token_ids
    block = [ids["vid_start"], ids["slow_vid_start"], *[ids["vid_patch"]] * 7, ids["slow_vid_end"]]
    pictures = {"pixel_values_videos": torch.randn(1, 3, 36, 36), "video_frames": torch.tensor([1])}
    embeddings = model.model.embed(torch.tensor([block]), visual_tokens=(tokens := model.encode(**pictures)))
    fast = tokens[0] if compat == "paper" else model.get_input_embeddings().weight[ids["vid_start"]]
    torch.testing.assert_close(embeddings[0], torch.cat([fast[None], tokens[1:]]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.0}])
def test_transition_scores(model, options):
    inputs = sample(model.config, ("video", 4), 1, 2)
    result = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **options)
    if options:
        scores = model.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
        torch.testing.assert_close(scores.sum(1), result.sequences_scores)
    else:
        scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        torch.testing.assert_close(scores, torch.stack(result.scores, 1).log_softmax(-1).amax(-1))


def test_generation_from_embeddings(model):
    inputs = sample(model.config, ("video", 4), 1, 2)
    pictures = {name: inputs[name] for name in ("pixel_values_videos", "video_frames")}
    embeddings = model.model.embed(inputs["input_ids"], inputs["positions"], model.encode(**pictures))
    mask = torch.ones_like(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(found, generated(model, inputs))


def test_what_cannot_be_generated_is_refused(model):
    inputs = sample(model.config, 1, 2)
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is not supported"):
            model.generate(**inputs, **options)
    with pytest.raises(ValueError, match="packed rows cannot be continued"):
        model.generate(**packed([inputs, inputs]), max_new_tokens=1)


@torch.no_grad()
def test_packed_rows_know_their_positions(model):
    inputs = packed([sample(model.config, 1, 2, 3), sample(model.config, 4, 5)])
    logits = model(**inputs).logits
    del inputs["position_ids"]
    assert torch.equal(model(**inputs).logits, logits)


def test_outputs_as_a_tuple(model):
    inputs = sample(model.config, 1, 2)
    loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], logits_to_keep=0, return_dict=False)
    assert loss.dim() == 0
    assert logits.shape[:2] == (1, 2)


def test_placeholders_stay_suppressed_without_a_generation_config(tmp_path, model):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = LlavaStForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == sorted(model.config.token_ids.values())


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_plain_quantization_config_is_for_the_language_model(tmp_path, model, bits):
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(tmp_path)
    given = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loaded = LlavaStForConditionalGeneration.from_pretrained(tmp_path, quantization_config=given)
    assert given.llm_int8_skip_modules is None
    assert type(loaded.model.visual_tokenizer.projector[0]) is torch.nn.Linear
    assert type(loaded.model.language_model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert loaded(**sample(model.config, ("video", 4), 1, 2)).logits.isfinite().all()
