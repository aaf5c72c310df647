"""Questions about videos and images, answered in words, seconds and pixels."""

from __future__ import annotations

import mimetypes
from collections.abc import Generator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from os import PathLike, fspath
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BitsAndBytesConfig, LogitsProcessorList, StoppingCriteriaList

from .answer import Answer
from .coordinate_text import read
from .generation import CoordinateRecorder, CoordinateSyntax
from .geometry import Item
from .image import load_image
from .media import Media
from .modeling_llava_st import LlavaStForConditionalGeneration
from .processing_llava_st import LlavaStInputs, LlavaStProcessor
from .prompting.content import check_unchanged
from .streaming import AnswerStream, AnswerWriter, Cancelled
from .tasks import TASKS, AnswerError, Task, map_items
from .video import load_video

MAX_NEW_TOKENS = 1024
_OF_VIDEOS = ("num_frames", "clip", "fps")  # how a video part is to be loaded

Message = Mapping[str, Any]
# A conversation, or a video, image or None, and what is asked about it: text, or text and items, or a task's fields.
Question = Sequence[Message] | tuple[Any, str | Sequence[str | Item] | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video or image as the language model sees it: to be asked about many times.

    Attributes:
        tokens: visual tokens `[places, C]`.
        media: what is known of it.
    """

    tokens: Tensor
    media: Media


def quantization(bits: int) -> BitsAndBytesConfig:
    """Of the language model's layers, and nothing else, in 4 or 8 bits."""
    if bits not in (4, 8):
        raise ValueError(f"quantize: expected 4 or 8 bits or None, got {bits!r}")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


class LlavaStPipeline:
    """A model and its processor: ask, and get an `Answer`.

    Args:
        model: is put into evaluation mode.
        processor: the model's.

    Raises:
        ValueError: the processor is of another model; the message says what differs.
    """

    def __init__(self, model: LlavaStForConditionalGeneration, processor: LlavaStProcessor) -> None:
        processor.check_model(model.config)
        self.model = model.eval()
        self.processor = processor
        self.config = model.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        quantize: int | None = None,
        **options: Any,
    ) -> LlavaStPipeline:
        """From a folder of `save_pretrained` or `llava_st.convert`.

        Args:
            path: the folder.
            dtype: by default the checkpoint's.
            device_map: as in transformers; `"auto"` spreads the model over all GPUs.
            quantize: bits of the language model's weights, 4 or 8, by bitsandbytes; None: as they are.
            options: further ones of the model's `from_pretrained`.

        Returns:
            A pipeline, its model in evaluation mode.
        """
        if quantize is not None:
            options["quantization_config"] = quantization(quantize)
        model = LlavaStForConditionalGeneration.from_pretrained(path, dtype=dtype, device_map=device_map, **options)
        return cls(model, LlavaStProcessor.from_pretrained(path))

    @torch.no_grad()
    def encode_video(
        self,
        source: Any,
        num_frames: int | None = None,
        clip: tuple[int, int] | None = None,
        fps: float | None = None,
    ) -> EncodedVideo:
        """A video that is asked about more than once.

        Args:
            source: what `load_video` takes, or what it gave.
            num_frames: by default the config's.
            clip: see `load_video`.
            fps: see `load_video`.

        Returns:
            Its visual tokens, and what seconds and pixels of it are.

        Raises:
            FileNotFoundError, ValueError: as `load_video`.
        """
        if _is_loaded(source):
            check_unchanged("video", {"num_frames": num_frames, "clip": clip, "fps": fps})
            pixels, media = source
        else:
            size = self.config.vision_config.image_size
            pixels, media = load_video(source, num_frames or self.config.num_frames, size, clip, fps)
        frames = torch.tensor([len(pixels)])
        return EncodedVideo(self.model.encode(pixel_values_videos=pixels, video_frames=frames), media)

    @torch.no_grad()
    def encode_image(self, source: Any) -> EncodedVideo:
        """An image that is asked about more than once.

        Args:
            source: what `load_image` takes, or what it gave.

        Returns:
            Its visual tokens, and what pixels of it are.

        Raises:
            FileNotFoundError, ValueError: as `load_image`.
        """
        pixels, media = source if _is_loaded(source) else load_image(source, self.config.vision_config.image_size)
        return EncodedVideo(self.model.encode(pixel_values=pixels), media)

    def ask(self, question: Question, task: str | Task | None = None, **options: Any) -> Answer:
        """The answer to one question.

        Args:
            question: as each of `ask_batch`.
            task: as in `ask_batch`.
            options: likewise.

        Returns:
            The answer, its items in seconds and pixels (see `ask_batch`); the first of several.

        Raises:
            FileNotFoundError, ValueError: as `ask_batch`.
        """
        return self.ask_batch([question], task, **options)[0]

    @torch.no_grad()
    def ask_batch(
        self,
        questions: Sequence[Question],
        task: str | Task | None = None,
        *,
        decoder: str | None = None,
        constrain: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """The answers to several questions, generated together; greedy, unless `options` say otherwise.

        Args:
            questions: each a conversation (a list of messages, as the processor takes them), or a pair: a video or an
                image (whatever `load_video` and `load_image` take, an `EncodedVideo`, or None for neither), and a text,
                or a list of text and items in seconds and pixels, or the fields of the task's prompt.
                A source that several of them show is encoded once.
            task: all questions are of this task, which reads `Answer.value` and says whether to constrain.
            decoder: `"expectation"`: coordinates fall between anchors; `"anchor"`: on them, as published. By default
                the first, or the second for a model with `compat="released"`.
            constrain: only well-formed coordinates are generated (`CoordinateSyntax`); by default where the task is
                one of grounding.
            max_new_tokens: the longest answer; by default that of a `generation_config` among the options, or 1024.
            options: of `generate` (`num_beams`, `do_sample`, ...).

        Returns:
            One answer per question; with `num_return_sequences=n`, n per question, in order.

        Raises:
            FileNotFoundError, ValueError: a question makes no sense, or its media cannot be read; the message says
                which.

        Items are in seconds and pixels of the last video or image that the question shows; in fractions where it shows
        none.
        """
        if not questions:
            return []
        run = self._prepare(questions, task, decoder, constrain, max_new_tokens, options)
        return run.answers(self._generate(run))

    def stream(
        self,
        question: Question,
        task: str | Task | None = None,
        *,
        decoder: str | None = None,
        constrain: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generator[str, None, Answer]:
        """The answer's text in pieces, while it is generated; the pieces together are `Answer.text`.

        Whoever stops iterating ends the generation. `answer = yield from pipeline.stream(...)` has the whole answer.

        Args:
            question: as each of `ask_batch`.
            task: as in `ask_batch`.
            decoder: likewise.
            constrain: likewise.
            max_new_tokens: likewise.
            options: likewise, but no beams.

        Yields:
            Text, coordinates written out, each as soon as it is known.

        Raises:
            FileNotFoundError, ValueError: as `ask_batch`; several answers, or beams, which do not stream.
        """
        if options.get("num_return_sequences", 1) > 1 or options.get("num_beams", 1) > 1:
            raise ValueError("stream: one answer is streamed, without beams; ask gives several (num_return_sequences)")
        cancelled = Event()
        stop = StoppingCriteriaList([*options.pop("stopping_criteria", ()), Cancelled(cancelled)])
        with torch.no_grad():
            run = self._prepare([question], task, decoder, constrain, max_new_tokens, options)
        stream = AnswerStream(run.writer(0), run.recorder, run.decoder)
        results = []

        def generate() -> None:
            try:
                results.append(self._generate(run, streamer=stream, stopping_criteria=stop))
            except BaseException as error:  # it belongs to whoever waits for text
                stream.close(error)
            else:
                stream.close()

        # In a copy of this context, which says, for one, which kernels to take.
        thread = Thread(target=copy_context().run, args=(generate,), daemon=True)
        thread.start()
        try:
            yield from stream
        finally:
            cancelled.set()
            thread.join()
        return run.answers(results[0])[0]

    def _prepare(
        self,
        questions: Sequence[Question],
        task: str | Task | None,
        decoder: str | None,
        constrain: bool | None,
        max_new_tokens: int | None,
        options: dict[str, Any],
    ) -> _Run:
        task = _task(task)
        encoded = _EncodedOnce(self)
        conversations = [encoded.conversation(_conversation(question, task)) for question in questions]
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, padding_side="left"
        )
        recorder = CoordinateRecorder(self.config)
        processors: list[Any] = [*options.pop("logits_processor", ())]
        if constrain is None:
            constrain = task is not None and task.grounded and self.config.lape
        if constrain:
            prompt_length = inputs["input_ids"].shape[1]
            processors.append(CoordinateSyntax(self.config, self.processor.tokenizer, prompt_length))
        if decoder is None:  # models of the first training stage have no scores of anchors
            decoder = "anchor" if self.config.compat == "released" or not self.config.lape else "expectation"
        return _Run(
            pipeline=self,
            inputs={**self._places(inputs, encoded), **options, **_limit(max_new_tokens, options)},
            media=[media[-1] if media else None for media in inputs.media],
            task=task,
            decoder=decoder,
            recorder=recorder,
            processors=LogitsProcessorList([*processors, recorder]),
        )

    def _places(self, inputs: LlavaStInputs, encoded: _EncodedOnce) -> dict[str, Any]:
        """Inputs of `generate`: the tokens of each video and image once, and where they go."""
        found = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask", "positions")}
        # As the model counts places: those of all images, then of all videos, in reading order.
        shown = sorted((each for one in encoded.shown for each in one), key=lambda each: each.media.kind != "image")
        if not shown:
            return found
        rows: dict[EncodedVideo, Tensor] = {}
        for each in shown:
            if each not in rows:
                first = sum(map(len, rows.values()))
                rows[each] = torch.arange(first, first + len(each.tokens), device=self.model.device)
        places = self.model.visual_index(found["input_ids"])
        row_of_place = torch.cat([rows[each] for each in shown])
        index = torch.where(places >= 0, row_of_place[places.clamp(min=0)], -1)
        return {**found, "visual_tokens": torch.cat([each.tokens for each in rows]), "visual_index": index}

    def _generate(self, run: _Run, **options: Any) -> Any:
        return self.model.generate(
            **run.inputs, **options, logits_processor=run.processors, return_dict_in_generate=True
        )


@dataclass
class _Run:
    """One call of `generate`, and what reading its result needs."""

    pipeline: LlavaStPipeline
    inputs: dict[str, Any]
    media: list[Media | None]
    task: Task | None
    decoder: str
    recorder: CoordinateRecorder
    processors: LogitsProcessorList

    def ends(self) -> set[int]:
        """Ids that end an answer, and what comes behind the end."""
        # As `generate` finds them: in its arguments, in a config among these, in the model's.
        configs = [self.inputs.get("generation_config"), self.pipeline.model.generation_config]
        found = []
        for name in ("eos_token_id", "pad_token_id"):
            values = [self.inputs.get(name), *(getattr(config, name, None) for config in configs)]
            found.append(next((value for value in values if value is not None), None))
        return {int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, Sequence) else [ids])}

    def writer(self, sample: int) -> AnswerWriter:
        return AnswerWriter(self.pipeline.config, self.pipeline.processor.tokenizer, self.media[sample], self.ends())

    def answers(self, result: Any) -> list[Answer]:
        new = result.sequences[:, self.inputs["input_ids"].shape[1] :]
        positions = self.recorder.positions(new, getattr(result, "beam_indices", None), self.decoder)
        each = len(new) // len(self.media)
        return [self._answer(i // each, *row) for i, row in enumerate(zip(new.cpu(), positions.cpu(), strict=True))]

    def _answer(self, sample: int, ids: Tensor, positions: Tensor) -> Answer:
        ended = torch.isin(ids, torch.tensor(sorted(self.ends()), dtype=ids.dtype)).nonzero()
        finished = len(ended) > 0
        if finished:
            ids, positions = ids[: int(ended[0])], positions[: int(ended[0])]
        written = self.pipeline.processor.read_ids(ids, positions)
        parts, problems = read(written)
        value = None
        if self.task is not None:
            try:
                value = self.task.parse(parts)
            except AnswerError as error:
                problems = [*problems, str(error)]
        media = self.media[sample]
        if media is not None:
            parts, value = (map_items(each, media.to_absolute) for each in (tuple(parts), value))
        text = self.writer(sample).write(ids, positions)
        return Answer(tuple(parts), text, finished, tuple(problems), value, written)


class _EncodedOnce:
    """Encodes the videos and images of conversations, each source once.

    Attributes:
        shown: of each conversation, what it shows; images among themselves, and videos, in reading order.
    """

    def __init__(self, pipeline: LlavaStPipeline) -> None:
        self.shown: list[list[EncodedVideo]] = []
        self._pipeline = pipeline
        self._known: dict[Any, EncodedVideo] = {}

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with an `EncodedVideo` for each source."""
        self.shown.append([])
        return [
            {**message, "content": [self._part(part) for part in message["content"]]}
            if isinstance(message["content"], list | tuple)
            else message
            for message in messages
        ]

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("video", "image"):
            return part
        source = part[kind]
        options = {name: part[name] for name in _OF_VIDEOS if part.get(name) is not None}
        name = fspath(source) if isinstance(source, str | PathLike) else id(source)
        key = (kind, name, *(str(options.get(option)) for option in _OF_VIDEOS))
        if key not in self._known:
            if isinstance(source, EncodedVideo):
                check_unchanged(kind, options)
                self._known[key] = source
            elif kind == "image":
                self._known[key] = self._pipeline.encode_image(source)
            else:
                self._known[key] = self._pipeline.encode_video(source, **options)
        self.shown[-1].append(self._known[key])
        return {"type": kind, kind: self._known[key]}


def _conversation(question: Question, task: Task | None) -> Sequence[Message]:
    """A pair of media and prompt as a conversation."""
    if not isinstance(question, tuple):
        if not all(isinstance(message, Mapping) for message in question):
            raise ValueError("question: expected messages, or a tuple (video or image, prompt), got a list of others")
        return question
    if len(question) != 2:
        raise ValueError(f"question: expected a conversation or (video or image, prompt), got {len(question)} entries")
    source, prompt = question
    if isinstance(prompt, Mapping):
        if task is None:
            raise ValueError("question: fields of a prompt need a task, got task=None")
        prompt = task.prompt(**prompt)
    content: list[Any] = []
    if source is not None:
        kind = _kind(source)
        content.append({"type": kind, kind: source})
    for part in [prompt] if isinstance(prompt, str) else prompt:
        content.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return [{"role": "user", "content": content}]


def _limit(max_new_tokens: int | None, options: Mapping[str, Any]) -> dict[str, int]:
    """How long answers may be: what was asked for, or what a generation config says, or the default."""
    config = options.get("generation_config")
    if max_new_tokens is None and getattr(config, "max_new_tokens", None) is None:
        max_new_tokens = MAX_NEW_TOKENS
    return {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}


def _is_loaded(source: Any) -> bool:
    """Whether it is what `load_video` or `load_image` gave: pixels and `Media`."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Media)


def _kind(source: Any) -> str:
    """`"video"` or `"image"`."""
    if isinstance(source, EncodedVideo):
        return source.media.kind
    if _is_loaded(source):
        return source[1].kind
    if isinstance(source, str | PathLike):
        return "image" if (mimetypes.guess_type(fspath(source))[0] or "").startswith("image/") else "video"
    is_picture = isinstance(source, Image.Image) or getattr(source, "ndim", 4) < 4
    return "image" if is_picture else "video"


def _task(task: str | Task | None) -> Task | None:
    if not isinstance(task, str):
        return task
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]
