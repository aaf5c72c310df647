"""Questions and answers through `LlavaStPipeline`, with the tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from llava_st.answer import Answer
from llava_st.coordinate_text import read, write
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.media import Media
from llava_st.modeling_llava_st import NOT_QUANTIZED
from llava_st.pipeline import EncodedVideo, LlavaStPipeline, quantization
from llava_st.streaming import AnswerWriter
from llava_st.tasks import TASKS, CaptionedSpan, Event, SpatioTemporal, map_items
from llava_st.tiny import tiny_model, tiny_processor
from llava_st.video import load_video
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor

from llava_st_ops.backends import forced_backend, use_backend

FRAMES = np.random.default_rng(0).integers(0, 256, (19, 30, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(FRAMES[0][:, :20])


@pytest.fixture(scope="module")
def pipeline() -> LlavaStPipeline:
    return LlavaStPipeline(tiny_model(), tiny_processor())


@pytest.fixture(scope="module")
def video(pipeline) -> EncodedVideo:
    """10 frames of 19, 18 seconds long."""
    return pipeline.encode_video(FRAMES)


class Script(LogitsProcessor):
    """Makes the model say what it is told, row by row; to the right of each anchor the next one is half as likely."""

    def __init__(self, pipeline: LlavaStPipeline, *answers: list) -> None:
        config, tokenizer = pipeline.config, pipeline.processor.tokenizer
        self.rows, self.prompt = [], None
        self.anchors = config.vocab_size
        for answer in answers:
            text = write(answer, "output")
            ids = tokenizer(text.text)["input_ids"]
            template = {config.token_ids[f"{axis}_output"]: i for i, axis in enumerate(("temporal", "height", "width"))}
            positions = iter(text.positions)
            starts = [self.anchors, self.anchors + 100, self.anchors + 200]
            ids = [starts[template[i]] + round(next(positions) * 99) if i in template else i for i in ids]
            self.rows.append([*ids, tokenizer.eos_token_id])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prompt = self.prompt or input_ids.shape[1]
        step = input_ids.shape[1] - self.prompt
        said = torch.full_like(scores, -50.0)
        for row in range(len(scores)):
            answer = self.rows[row % len(self.rows)]
            token = answer[step] if step < len(answer) else answer[-1]
            said[row, token] = 0
            if token >= self.anchors and (token - self.anchors) % 100 < 99:
                said[row, token + 1] = -math.log(2)
        return said


def at(anchor: float) -> float:
    return anchor / 99


def test_items_come_back_in_seconds_and_pixels_with_the_text_around_them(pipeline, video):
    box, tube = Box(at(10), at(20), at(30), at(40)), Tube((at(5), at(99)), (Box(0, 0, at(9), at(9)),) * 2)
    said = ["It runs ", TimeSpan(at(0), at(50)), "and stands at ", box, ". Ends in ", Instant(at(99)), ", then ", tube]
    answer = pipeline.ask((video, "?"), decoder="anchor", logits_processor=[Script(pipeline, said)])
    span, found, instant, moving = answer.items
    assert (span.start, span.end) == pytest.approx((0, 18 * at(50)))
    assert (found.left, found.top, found.right, found.bottom) == pytest.approx(
        (40 * at(10), 30 * at(20), 40 * at(30), 30 * at(40))
    )
    assert instant.time == pytest.approx(18)
    assert moving.times == pytest.approx((18 * at(5), 18))
    assert [part for part in answer.parts if isinstance(part, str)] == [
        "It runs",
        "and stands at",
        ". Ends in ",
        ", then ",
    ]
    assert answer.text == (
        "It runs {0.00, 9.09} and stands at [4.0, 6.1, 12.1, 12.1]. Ends in 18.00, then "
        "0.91:[0.0, 0.0, 3.6, 2.7], 18.00:[0.0, 0.0, 3.6, 2.7]"
    )
    assert answer.finished
    assert not answer.problems
    assert answer.value is None


TUBE = Tube((at(3), at(60), at(61)), tuple(Box(at(i), at(i + 1), at(i + 20), at(i + 30)) for i in range(3)))
VALUES = {
    "tvg": TimeSpan(at(7), at(80)),
    "rec": Box(at(1), at(2), at(98), at(99)),
    "svg": TUBE,
    "stvg": SpatioTemporal(TimeSpan(at(3), at(61)), TUBE),
    "elc": Event(Instant(at(61)), "a cat, grey, leaves", TUBE),
    "dvc": (
        CaptionedSpan(TimeSpan(at(0), at(1)), "it rains"),
        CaptionedSpan(TimeSpan(at(1), at(99)), "the sun shines"),
    ),
    "qa": "a dog",
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_tasks_are_in_seconds_and_pixels(pipeline, video, name):
    task = TASKS[name]
    shown = video if task.media == "video" else pipeline.encode_image(PICTURE)
    script = Script(pipeline, task.answer(VALUES[name]))
    answer = pipeline.ask((shown, "?"), name, decoder="anchor", logits_processor=[script])
    assert not answer.problems
    assert _flat(answer.value) == pytest.approx(_flat(map_items(VALUES[name], shown.media.to_absolute)))
    assert answer.value == pipeline.ask((shown, "?"), task, decoder="anchor", logits_processor=[script]).value


def _flat(value) -> list:
    """The numbers and strings of a value."""
    if isinstance(value, float | int | str):
        return [value]
    return [leaf for part in (value if isinstance(value, tuple) else vars(value).values()) for leaf in _flat(part)]


def test_answers_that_a_task_cannot_read_have_no_value(pipeline, video):
    answer = pipeline.ask((video, "?"), "tvg", logits_processor=[Script(pipeline, ["I do not know."])])
    assert answer.value is None
    assert answer.problems == ("expected a span {start, end}, got 'I do not know.'",)
    assert answer.parts == ("I do not know.",)


def test_expectation_falls_between_anchors_and_released_weights_take_anchors(pipeline, video):
    said = [TimeSpan(at(10), at(50))]

    def start(pipeline, video, **options) -> float:
        return pipeline.ask((video, "?"), logits_processor=[Script(pipeline, said)], **options).items[0].start / 18

    assert start(pipeline, video) == pytest.approx(at(10 + 1 / 3))
    assert start(pipeline, video, decoder="anchor") == pytest.approx(at(10))
    released = LlavaStPipeline(tiny_model(compat="released"), tiny_processor(compat="released"))
    shown = released.encode_video(FRAMES)
    assert start(released, shown) == pytest.approx(at(10))
    assert start(released, shown, decoder="expectation") == pytest.approx(at(10 + 1 / 3))


def test_grounding_is_constrained_unless_told_otherwise(pipeline, video):
    """The random model says coordinates of all axes in any order."""

    def outside(task, **options) -> bool:
        answer = pipeline.ask((video, "?"), task, max_new_tokens=20, **options)
        return any("outside of a box" in problem for problem in answer.problems)

    assert outside(None)
    assert outside("qa")
    assert not outside("tvg")
    assert outside("tvg", constrain=False)
    assert not outside(None, constrain=True)


def test_an_answer_that_is_cut_off_is_not_finished(pipeline, video):
    script = Script(pipeline, ["At ", TimeSpan(0.0, 1.0)])
    answer = pipeline.ask((video, "?"), max_new_tokens=4, logits_processor=[script])
    assert not answer.finished
    assert answer.text == "At {"


def test_an_answer_ends_before_its_end(pipeline, video):
    """Which may be a word like any other."""
    mark = pipeline.processor.tokenizer.convert_tokens_to_ids("!")
    script = Script(pipeline, ["Stop! Go"])
    answer = pipeline.ask((video, "?"), logits_processor=[script], eos_token_id=mark)
    assert answer.finished
    assert answer.text == "Stop"
    assert answer.parts == ("Stop",)


def test_without_media_items_are_fractions(pipeline):
    answer = pipeline.ask((None, "?"), decoder="anchor", logits_processor=[Script(pipeline, [TimeSpan(0.0, 1.0)])])
    assert answer.items == (TimeSpan(0.0, 1.0),)
    assert answer.text == " {0.000, 1.000} "


def conversations(video: EncodedVideo) -> list:
    def user(*content: object) -> list[dict]:
        return [{"role": "user", "content": list(content)}]

    films = [{"type": "video", "video": source} for source in (video, FRAMES[:7])]
    picture = {"type": "image", "image": PICTURE}
    other = {"type": "image", "image": FRAMES[3]}
    return [
        (video, "When does it begin?"),
        user(films[0], "Where at ", Instant(9.0), "?"),
        user(picture, "What is in", Box(2.0, 3.0, 15.0, 20.0), "?"),
        [{"role": "user", "content": "Hello"}],
        user(other, "and", picture, "differ?"),
        user(films[1], "or", other),
        [*user(films[0], "Who?"), {"role": "assistant", "content": "A cat."}, *user("When?")],
    ]


def test_models_of_the_first_stage_answer_in_words():
    pipeline = LlavaStPipeline(tiny_model(lape=False), tiny_processor(lape=False))
    answer = pipeline.ask((FRAMES, "?"), "captioning", max_new_tokens=4)
    assert answer.text
    assert not answer.items
    assert not pipeline.ask((FRAMES, "?"), "tvg", max_new_tokens=4).items


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_a_batch_gives_what_single_questions_give(compat):
    pipeline = LlavaStPipeline(tiny_model(compat=compat), tiny_processor(compat=compat))
    questions = conversations(pipeline.encode_video(FRAMES))
    together = pipeline.ask_batch(questions, max_new_tokens=6)
    for question, answer in zip(questions, together, strict=True):
        alone = pipeline.ask(question, max_new_tokens=6)
        assert alone.text == answer.text
        assert _flat(alone.items) == pytest.approx(_flat(answer.items), abs=1e-4)
    assert len({answer.text for answer in together}) > 4


def test_a_question_is_asked_as_the_processor_and_the_model_take_it(pipeline):
    question = conversations(pipeline.encode_video(FRAMES))[2]
    inputs = pipeline.processor.apply_chat_template(question, add_generation_prompt=True)
    ids = pipeline.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    writer = AnswerWriter(pipeline.config, pipeline.processor.tokenizer, inputs.media[0][0], ())
    anchors = (ids - pipeline.config.vocab_size) % 100 / 99
    assert pipeline.ask(question, decoder="anchor", max_new_tokens=6).text == writer.write(ids, anchors)


def test_each_source_is_encoded_once(pipeline, video, monkeypatch):
    calls = []
    encode = pipeline.model.encode
    monkeypatch.setattr(pipeline.model, "encode", lambda **inputs: calls.append(sorted(inputs)) or encode(**inputs))
    pipeline.ask_batch([(video, "one"), (video, "two")], max_new_tokens=1)
    assert not calls
    pipeline.ask_batch([(FRAMES, "one"), (PICTURE, "two"), (FRAMES, "three"), (PICTURE, "four")], max_new_tokens=1)
    assert len(calls) == 2
    clips = [[{"role": "user", "content": [{"type": "video", "video": FRAMES, "clip": (0, n)}]}] for n in (5, 6, 5)]
    pipeline.ask_batch(clips, max_new_tokens=1)
    assert len(calls) == 4


def test_questions_about_one_video_share_its_tokens(pipeline, video, monkeypatch):
    seen = {}
    generate = pipeline.model.generate
    monkeypatch.setattr(pipeline.model, "generate", lambda **inputs: seen.update(inputs) or generate(**inputs))
    pipeline.ask_batch([(video, "one"), (video, "another one")], max_new_tokens=1)
    assert seen["visual_tokens"].shape == video.tokens.shape
    assert seen["visual_index"].equal(pipeline.model.visual_index(seen["input_ids"], shared=True))


def test_a_video_of_another_model_is_refused(pipeline, video):
    with pytest.raises(ValueError, match="expected 28 visual tokens of a video, got 27"):
        pipeline.ask((EncodedVideo(video.tokens[:-1], video.media), "?"))


def test_beams_have_an_answer_each(pipeline, video, monkeypatch):
    seen = {}
    generate = pipeline.model.generate

    def spy(**inputs):
        seen["inputs"], seen["result"] = inputs, generate(**inputs)
        return seen["result"]

    monkeypatch.setattr(pipeline.model, "generate", spy)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    answers = pipeline.ask_batch([(video, "When?"), (PICTURE, "Where is it?")], **options)
    new = seen["result"].sequences[:, seen["inputs"]["input_ids"].shape[1] :]
    positions = seen["inputs"]["logits_processor"][-1].positions(new, seen["result"].beam_indices)
    media = [video.media] * 2 + [Media("image", 20, 30)] * 2
    assert len(answers) == 4
    for answer, ids, places, shown in zip(answers, new, positions, media, strict=True):
        writer = AnswerWriter(pipeline.config, pipeline.processor.tokenizer, shown, ())
        assert answer.text == writer.write(ids, places)
    alone = pipeline.ask_batch([(PICTURE, "Where is it?")], **options)
    assert [answer.text for answer in alone] == [answer.text for answer in answers[2:]]


def test_greedy_is_the_default_and_deterministic(pipeline, video):
    answers = [pipeline.ask((video, "?"), max_new_tokens=12) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def whole(stream) -> tuple[list[str], object]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_a_stream_is_the_answer_piece_by_piece(pipeline, video):
    said = ["The café ", TimeSpan(at(10), at(20)), "closes: ", TUBE]

    def script() -> dict:
        return {"logits_processor": [Script(pipeline, said)], "task": "svg"}

    pieces, answer = whole(pipeline.stream((video, "?"), **script()))
    assert answer == pipeline.ask((video, "?"), **script())
    assert "".join(pieces) == answer.text
    assert "é" in pieces  # whose two bytes are two tokens
    assert len(pieces) > 40
    assert answer.value is not None


def test_a_stream_of_the_models_own_words_is_the_answer(pipeline, video):
    pieces, answer = whole(pipeline.stream((video, "?"), max_new_tokens=15))
    assert "".join(pieces) == answer.text == pipeline.ask((video, "?"), max_new_tokens=15).text


def test_who_stops_listening_stops_the_model(pipeline, video):
    class Count(LogitsProcessor):
        steps = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return scores

    count = Count()
    stream = pipeline.stream((video, "?"), max_new_tokens=4000, logits_processor=[count])
    next(stream)
    stream.close()
    assert count.steps < 2000


def test_a_stream_takes_the_kernels_of_whoever_asked(pipeline, video, monkeypatch):
    seen = []
    generate = pipeline.model.generate
    monkeypatch.setattr(
        pipeline.model, "generate", lambda **inputs: seen.append(forced_backend()) or generate(**inputs)
    )
    with use_backend("reference"):
        list(pipeline.stream((video, "?"), max_new_tokens=1))
    assert seen == ["reference"]


def test_errors_reach_the_one_who_listens(pipeline, video):
    with pytest.raises(ValueError, match="beam"):
        list(pipeline.stream((video, "?"), num_beams=2))


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ((None, "?"), {"task": "find"}, "task: expected one of stvg, .*got 'find'"),
        ((None, "?", 3), {}, "question: expected a conversation or"),
        ((None, {"event": "x"}), {}, "fields of a prompt need a task"),
        ((None, "?"), {"decoder": "mean"}, "decoder must be"),
    ],
)
def test_what_makes_no_sense_is_refused(pipeline, question, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.ask(question, max_new_tokens=1, **options)


def test_no_questions_have_no_answers(pipeline):
    assert pipeline.ask_batch([]) == []


def test_fields_of_a_prompt_are_in_seconds_and_pixels(pipeline, video, monkeypatch):
    seen = {}
    generate = pipeline.model.generate
    monkeypatch.setattr(pipeline.model, "generate", lambda **inputs: seen.update(inputs) or generate(**inputs))
    pipeline.ask((PICTURE, {"box": Box(5.0, 3.0, 10.0, 30.0)}), "reg", max_new_tokens=1)
    assert seen["positions"][~seen["positions"].isnan()].tolist() == [0.25, 0.1, 0.5, 1.0]
    pipeline.ask((video, {"span": TimeSpan(4.5, 9.0)}), "tr", max_new_tokens=1)
    assert seen["positions"][~seen["positions"].isnan()].tolist() == [0.25, 0.5]


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline.model.save_pretrained(folder)
    pipeline.processor.save_pretrained(folder)
    return folder


def test_a_saved_pipeline_answers_likewise(pipeline, saved):
    loaded, answer = (
        p.ask((FRAMES, "?"), max_new_tokens=8) for p in (LlavaStPipeline.from_pretrained(saved), pipeline)
    )
    assert loaded.text == answer.text
    assert _flat(loaded.items) == pytest.approx(_flat(answer.items), abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_only_layers_of_the_language_model_are_quantized(bits, pipeline):
    config = quantization(bits)
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [name for name, module in pipeline.model.named_modules() if isinstance(module, torch.nn.Linear)]
    changed = [name for name in linear if should_convert_module(name, list(NOT_QUANTIZED))]
    assert changed == [name for name in linear if ".language_model.layers." in name]
    assert len(changed) == 14


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_answers(saved, bits):
    pytest.importorskip("bitsandbytes")
    loaded = LlavaStPipeline.from_pretrained(saved, quantize=bits, device_map="cpu")
    kinds = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    assert kinds["model.visual_tokenizer.projector.0"] == kinds["lm_head"] == "Linear"
    assert loaded.ask((FRAMES, "?"), max_new_tokens=4).text


def test_other_numbers_of_bits_are_refused(saved):
    with pytest.raises(ValueError, match="quantize: expected 4 or 8 bits"):
        LlavaStPipeline.from_pretrained(saved, quantize=3)


def test_an_answer_keeps_what_the_model_wrote(pipeline):
    answer = pipeline.ask((None, "Say something."), max_new_tokens=12)
    parts, _ = read(answer.written)
    assert tuple(parts) == answer.parts  # in fractions, since nothing was shown
    assert answer.written.positions


def test_an_answer_can_be_said_again(pipeline):
    question = {"role": "user", "content": [{"type": "video", "video": FRAMES}, "x"]}
    answer = pipeline.ask([question], max_new_tokens=12)
    again = {"role": "user", "content": "And then?"}
    inputs = pipeline.processor.apply_chat_template([question, {"role": "assistant", "content": answer}, again])
    positions = inputs["positions"][~inputs["positions"].isnan()]
    assert positions.tolist() == pytest.approx(list(answer.written.positions))
    quoted = pipeline.processor.apply_chat_template([{"role": "user", "content": [question["content"][0], answer]}])
    inputs_of = {pipeline.config.token_ids[name] for name in ("temporal_input", "height_input", "width_input")}
    ids = quoted["input_ids"][~quoted["positions"].isnan()]
    assert set(ids.tolist()) <= inputs_of
    with pytest.raises(ValueError, match=r"Answer\.written"):
        pipeline.processor.apply_chat_template([question, {"role": "assistant", "content": Answer(("x",), "x")}])
    assert pipeline.ask([question, {"role": "assistant", "content": answer}, again], max_new_tokens=4).text


def test_a_processor_of_another_model_is_refused(pipeline):
    model = tiny_model()
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    with pytest.raises(ValueError, match="expected the first anchor to have the config's vocab_size"):
        LlavaStPipeline(model, pipeline.processor)
    for changes in ({"compat": "released"}, {"fast_factor": 1}, {"pack_images": True}):
        with pytest.raises(ValueError, match=f"expected {next(iter(changes))}"):
            LlavaStPipeline(tiny_model(**changes), pipeline.processor)


def test_a_generation_config_of_ones_own(pipeline):
    asked = {"do_sample": True, "temperature": 30.0, "top_k": 0}
    answers = []
    for options in (asked, {"generation_config": GenerationConfig(**asked)}):
        torch.manual_seed(0)
        answers.append(pipeline.ask((FRAMES, "x"), max_new_tokens=400, **options))
    assert answers[0] == answers[1]
    assert answers[0].finished
    short = pipeline.ask((FRAMES, "x"), generation_config=GenerationConfig(max_new_tokens=3))
    assert len(pipeline.processor.tokenizer(short.written.text)["input_ids"]) <= 3


def test_what_is_loaded_has_its_frames(pipeline):
    encoded = pipeline.encode_video(FRAMES)
    for shown in (encoded, load_video(FRAMES, 10, 36)):
        for option in ({"clip": (0, 4)}, {"num_frames": 5}):
            question = {"role": "user", "content": [{"type": "video", "video": shown, **option}, "x"]}
            with pytest.raises(ValueError, match="has been loaded already"):
                pipeline.ask([question], max_new_tokens=1)


def test_one_answer_is_streamed(pipeline):
    for option in ({"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="stream: one answer"):
            list(pipeline.stream((FRAMES, "x"), max_new_tokens=3, **option))


def test_a_list_of_something_else_is_no_conversation(pipeline):
    with pytest.raises(ValueError, match=r"expected messages, or a tuple \(video or image, prompt\)"):
        pipeline.ask(["clip.mp4", "What happens?"])


def test_frames_without_times_may_come_at_a_rate(pipeline):
    part = {"type": "video", "video": FRAMES, "fps": 4}
    inputs = pipeline.processor.apply_chat_template([{"role": "user", "content": [part, "x"]}])
    slow = pipeline.processor.apply_chat_template([{"role": "user", "content": [{**part, "fps": 1}, "x"]}])
    assert inputs.media[0][0].timestamps[-1] == pytest.approx(slow.media[0][0].timestamps[-1] / 4)
    assert pipeline.ask([{"role": "user", "content": [part, "x"]}], max_new_tokens=2).text
