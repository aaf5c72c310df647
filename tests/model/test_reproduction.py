"""The recipe of moving shapes: the tower's truth, starting values, arms, and the proof."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from llava_st import prove as command
from llava_st.coordinate_text import write
from llava_st.data.training import MediaLoader, TrainingData
from llava_st.evaluation.predictions import Prediction
from llava_st.media import Media
from llava_st.modeling_llava_st import LlavaStForConditionalGeneration
from llava_st.pipeline import LlavaStPipeline
from llava_st.reproduction import CHECKPOINT, proving, recipe
from llava_st.reproduction.arms import ARMS
from llava_st.reproduction.directions import Directions
from llava_st.reproduction.start import initialise, shapes_processor, start_language_model, tower_data, what_is_seen
from llava_st.reproduction.tower import patch_truth, train_tower, waves
from llava_st.synthesis import make_scene, synthesize
from llava_st.synthesis.scenes import COLOURS, SHAPES
from llava_st.tasks import TASKS, SpatioTemporal
from llava_st.tiny import tiny_tokenizer

MEDIA = Media("video", 96, 96, tuple(k / 10 for k in range(20)), tuple(range(20)))
BUDGET = recipe.Budget({"names": 4, "places": 4, "tubes": 4}, tower_clips=2, tower_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages on a few clips: the folder of the run, and that of its last model."""
    out = tmp_path_factory.mktemp("run")
    said = []
    return out, recipe.train(out, BUDGET, seed=3, report=said.append), said


def fresh_model(**changes):
    config, processor = shapes_processor(recipe.texts(60), **changes)
    torch.manual_seed(0)
    return LlavaStForConditionalGeneration(config).eval(), processor


def test_patches_show_what_covers_them():
    scene = make_scene(0, "train", 5)
    truth = patch_truth(scene, 12)
    assert truth.colours.shape == (20, 12, 12)
    for frame in range(scene.frames):
        seen = [shape for shape in scene.objects if shape.visible(frame)]
        assert (truth.colours[frame] > 0).any() == bool(seen)
        for shape in seen[-1:]:  # in front of all others
            box = shape.box(frame)
            row, column = (int((low + high) / 2 * 12) for low, high in ((box.top, box.bottom), (box.left, box.right)))
            assert truth.colours[frame, row, column] == 1 + COLOURS.index(shape.colour)
            assert truth.shapes[frame, row, column] == 1 + SHAPES.index(shape.shape)
            assert truth.edges[frame, row, column].tolist() == pytest.approx(
                [box.left, box.top, box.right, box.bottom], abs=1e-6
            )
    assert (truth.edges[truth.colours == 0] == 0).all()


def test_waves_of_neighbours_are_alike():
    values = waves(torch.linspace(0, 1, 100), 6, 4.0)
    alike = torch.nn.functional.cosine_similarity(values[None], values[:, None], dim=-1)
    assert torch.allclose(alike.diagonal(), torch.ones(100))
    assert (alike.diagonal(1) > 0.95).all()
    assert (alike.diagonal(50) < 0.5).all()


def test_a_tower_learns_what_patches_show(tmp_path):
    synthesize(tmp_path, clips=2, seed=0)
    model, _ = fresh_model()
    pixels, truth = tower_data(tmp_path, [make_scene(0, "train", clip) for clip in range(2)], model.config)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (40, 3, 72, 72)
    found = []
    train_tower(model.model.vision_tower, pixels, truth, 200, 0, lambda step, scores: found.append((step, scores)), 16)
    assert [step for step, _ in found] == [100, 200]
    assert found[1][1]["colours"] > 0.6  # of eleven
    assert found[1][1]["edges"] < found[0][1]["edges"]
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_words_are_tokens_and_phrases_one_token():
    tokenizer = tiny_tokenizer(texts=["the red circle"] * 3, phrases=["What now?"])
    assert tokenizer.tokenize("the red circle") == ["the", "Ġred", "Ġcircle"]
    assert tokenizer.tokenize(" red. What now?")[-1] == "What now?"
    assert tokenizer.decode(tokenizer.encode("the réd What now?")) == "the réd What now?"
    assert len(tiny_tokenizer()) == 256 + 3 + 14 + 300


def test_a_model_starts_with_positions_and_a_projector(tmp_path):
    synthesize(tmp_path, clips=4, seed=0)
    model, processor = fresh_model()
    pixels, truth = tower_data(tmp_path, [make_scene(0, "train", clip) for clip in range(4)], model.config)
    initialise(model, processor, pixels, truth)
    lape = model.model.lape
    for axis in ("temporal", "height", "width"):
        table = getattr(lape, f"{axis}_input")
        assert torch.equal(table, getattr(lape, f"{axis}_output"))
        assert torch.nn.functional.cosine_similarity(table[1:], table[:-1]).min() > 0.8
    assert abs((lape.temporal_input @ lape.width_input.T).max()) < 1e-4  # each axis has its own dimensions
    projected = model.model.visual_tokenizer.projector(model.model._vision_features(pixels.float() / 127.5 - 1))
    objects = truth.colours > 0
    assert projected[objects].norm(dim=-1).mean() > 1.3 * projected[~objects].norm(dim=-1).mean()


def test_directions_are_at_right_angles():
    directions = Directions.random(128)
    rows = torch.cat([getattr(directions, field.name) for field in dataclasses.fields(directions)])
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    assert len(directions.names) == len(COLOURS) + len(SHAPES)


def test_a_model_starts_with_heads_that_find_what_is_asked_for():
    """Before anything is learned, a model that sees perfectly looks at the patches of the object in a question."""
    model, processor = fresh_model()
    scene = make_scene(0, "train", 11, objects=(3, 3))
    frame = max(range(scene.frames), key=lambda f: sum(shape.visible(f) for shape in scene.objects))
    truth = patch_truth(scene, 6)[torch.tensor([frame])]
    directions = Directions.random(128)
    start_language_model(model, processor, directions)
    seen = model.model.lape.inject(what_is_seen(truth, directions)[:, None]).flatten(0, 3)
    model.set_attn_implementation("eager")
    shown = [shape for shape in scene.objects if shape.visible(frame)]
    assert len(shown) > 1
    for shape in shown:
        image = (torch.zeros(1, 3, 72, 72), Media("image", 96, 96))
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"Where is the {shape.name}?"}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True).data
        index = model.visual_index(inputs["input_ids"])
        del inputs["pixel_values"]
        outputs = model(**inputs, visual_tokens=seen, visual_index=index, output_attentions=True)
        looks = outputs.attentions[1][0, 0, -1, index[0] >= 0].view(6, 6)
        its = (truth.colours[0] == 1 + COLOURS.index(shape.colour)) & (truth.shapes[0] == 1 + SHAPES.index(shape.shape))
        assert looks[its].sum() > 0.5
        assert looks[~its].sum() < 0.1


def test_all_stages_run_and_a_second_call_finds_them_done(trained):
    out, folder, said = trained
    assert folder == out / "tubes" / "model"
    assert any("names" in line for line in said)
    again = []
    assert recipe.train(out, BUDGET, seed=3, report=again.append) == folder
    assert again == []
    model = LlavaStForConditionalGeneration.from_pretrained(folder)
    start = LlavaStForConditionalGeneration.from_pretrained(out / "start")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert not any("vision_tower" in name for name in changed)
    for part in ("projector", "lape", "packer", "embed_tokens", "layers", "lm_head"):
        assert any(part in name for name in changed), part


def test_stages_ask_what_they_are_for(trained):
    out, _, _ = trained
    processor = LlavaStPipeline.from_pretrained(out / "start").processor
    for stage in recipe.STAGES:
        folder = out / f"clips-{stage.objects[0]}-{stage.objects[1]}"
        data = TrainingData(folder / f"{stage.name}.yaml", None, MediaLoader.of(processor))
        assert len(data) >= 4
        assert {data[i].task for i in range(len(data))} == {"mixed"}


def inputs_of(model, processor, text="Where?"):
    video = (
        torch.rand(20, 3, 72, 72) * 2 - 1,
        Media("video", 96, 96, tuple(k / 10 for k in range(20)), tuple(range(20))),
    )
    content = [{"type": "video", "video": video}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.adapt])
def test_an_arm_generates_what_its_forward_pass_says(name):
    """Generation, with its cache, is as greedy as repeated whole passes; and something differs from the baseline."""
    torch.manual_seed(1)
    model, processor = fresh_model()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    inputs = inputs_of(model, processor).data
    before = model(**inputs).logits
    ARMS[name].adapt(model)
    after = model(**inputs).logits
    if name not in ("no width input", "hard targets"):  # these show in other places
        assert not torch.allclose(before, after, atol=1e-4)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = tokens[:, -4:]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["positions"] = torch.full(whole["input_ids"].shape, math.nan, dtype=torch.float64)
    scores = model(**whole).logits[:, -5:-1]
    scores[..., model.generation_config.suppress_tokens or []] = -math.inf
    assert torch.equal(scores.argmax(-1), new)


def test_average_pooling_takes_means_of_the_regions():
    model, _ = fresh_model(lape=False)
    features = torch.randn(1, 20, 6, 6, 96)
    projected = model.model.visual_tokenizer.images(features)
    ARMS["average pooling"].adapt(model)
    slow, fast = model.model.visual_tokenizer(features)
    torch.testing.assert_close(fast[0, 3, 1, 2], projected[0, 3, 2:4, 4:6].mean(dim=(0, 1)))
    torch.testing.assert_close(slow[0, 1, 0, 0], projected[0, 5:10, :2, :2].mean(dim=(0, 1, 2)))


def test_without_fast_tokens_nothing_depends_on_them():
    model, processor = fresh_model()
    ARMS["fast tokens dropped"].adapt(model)
    inputs = inputs_of(model, processor).data
    visual = model.encode(**{k: inputs.pop(k) for k in ("pixel_values_videos", "video_frames")})
    index = model.visual_index(inputs["input_ids"])
    fast = 20 * 3 * 3
    other = torch.cat([torch.randn(fast, visual.shape[1]), visual[fast:]])
    scores = [model(**inputs, visual_tokens=each, visual_index=index).logits[:, -1] for each in (visual, other)]
    torch.testing.assert_close(*scores)
    changed = torch.cat([visual[:fast], torch.randn_like(visual[fast:])])
    assert not torch.allclose(scores[0], model(**inputs, visual_tokens=changed, visual_index=index).logits[:, -1])


def test_hard_targets_are_the_nearest_anchor():
    model, _ = fresh_model()
    hidden = torch.randn(1, 2, 128)
    labels = torch.tensor([[0, model.config.token_ids["temporal_output"]]])

    def loss(position):
        return model.token_losses(hidden, labels, torch.tensor([[math.nan, position]], dtype=torch.float64))[0, 0]

    between, nearest = loss(10.3 / 99), loss(10 / 99)
    assert between != nearest
    ARMS["hard targets"].adapt(model)
    torch.testing.assert_close(loss(10.3 / 99), nearest)


def test_without_width_input_its_position_does_not_matter():
    model, _ = fresh_model()
    ids = torch.tensor([[model.config.token_ids["width_input"], 5]])

    def scores(position):
        return model(input_ids=ids, positions=torch.tensor([[position, math.nan]], dtype=torch.float64)).logits

    assert not torch.equal(scores(0.1), scores(0.9))
    ARMS["no width input"].adapt(model)
    assert torch.equal(scores(0.1), scores(0.9))


def right_answers(pipeline, folder, samples, batch_size, **options):
    """What a perfect model answers, given the video that is asked about."""
    predictions = []
    for sample in samples:
        asked = sample.truth if f"{sample.media}#{sample.index}" == sample.id else None
        text = write(TASKS["stvg"].answer(SpatioTemporal(sample.truth.span, sample.truth.tube.tube())), "output")
        text = text if asked else write(["I do not know."], "output")
        predictions.append(Prediction(sample.index, sample.id, text.text, text.positions, True, media=MEDIA))
    return predictions


def test_a_perfect_model_is_proved(tmp_path, monkeypatch):
    monkeypatch.setattr(proving, "predict", right_answers)
    found = proving.prove(None, tmp_path, seed=11, clips=12)
    assert found["a"] == pytest.approx({"m_tiou": 1, "m_siou": 1, "m_viou": 1}, abs=1e-6)
    assert found["b"] == {"m_tiou": 0, "m_siou": 0, "m_viou": 0}
    assert found["c"]["new"] == pytest.approx(1, abs=1e-6)
    assert found["c"]["old"] < 0.5
    assert 0.2 < found["constant"]["m_tiou"] < 0.6
    assert found["constant"]["m_viou"] < found["constant"]["m_tiou"]


def test_proving_wants_another_clip_to_show(tmp_path):
    with pytest.raises(ValueError, match="clips: expected 2 at least"):
        proving.prove(None, tmp_path, seed=0, clips=1)


def test_a_model_is_proved_by_a_command(trained, tmp_path, capsys):
    """One that has seen next to nothing: its scores are not worth a word, but are there."""
    _, folder, _ = trained
    assert command.main(["--seed", "5", "--clips", "2", "--model", str(folder), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found.keys() == {"constant", "a", "b", "c"}
    for name in ("constant", "a", "b"):
        assert found[name].keys() == {"m_tiou", "m_siou", "m_viou"}
        assert all(0 <= value <= 1 for value in found[name].values())
    assert found["c"].keys() == {"new", "old"}
    assert lines[-2].startswith("c:")
    assert len(list((tmp_path / "videos").iterdir())) == 2


def test_the_checkpoint_that_comes_along_looks_and_listens(tmp_path, capsys):
    assert command.main(["--seed", "2026", "--clips", "12", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for score in ("m_tiou", "m_siou", "m_viou"):
        assert found["a"][score] > found["b"][score]
    assert found["c"]["new"] > found["c"]["old"]
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8e6


def test_a_folder_that_is_no_model_is_an_error_of_one_line(tmp_path, capsys):
    assert command.main(["--seed", "5", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("prove: ")
