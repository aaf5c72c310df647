"""The whole chain with a saved model, through the Auto classes: loss, gradients, generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llava_st.geometry import Box, TimeSpan, Tube
from llava_st.tasks import TASKS, SpatioTemporal
from llava_st.tiny import tiny_model, tiny_processor
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from .clips import moving_square, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    write_video(folder / "clip.mkv", moving_square(24))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "picture.png")
    return folder


def conversations(folder):
    """A video, an image and text alone, each with an answer that has coordinates in it or none."""
    box = Box(0.1, 0.2, 0.6, 0.9)
    seen = SpatioTemporal(TimeSpan(0.2, 0.8), Tube((0.2, 0.8), (box, box)))
    asked = [
        ([{"type": "video", "video": str(folder / "clip.mkv")}, *TASKS["stvg"].prompt("Where is the square?")], seen),
        ([{"type": "image", "image": str(folder / "picture.png")}, "What is at", Box(3, 4, 20, 30), "?"], None),
        (["Say a word."], None),
    ]
    answers = [TASKS["stvg"].answer(seen), ["noise"], ["word"]]
    return [
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer, "unit": "fraction"},
        ]
        for (content, _), answer in zip(asked, answers, strict=True)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixed_batch_learns_and_answers(folder, packed):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor.apply_chat_template(conversations(folder), return_labels=True, packed=packed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    prompts = [conversation[:1] for conversation in conversations(folder)]
    inputs = processor.apply_chat_template(prompts)
    ids = model.eval().generate(**inputs, max_new_tokens=8)
    assert ids.shape[0] == 3
    for row, conversation in zip(ids[:, inputs["input_ids"].shape[1] :], prompts, strict=True):
        alone = processor.apply_chat_template([conversation])
        expected = model.generate(**alone, max_new_tokens=8)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(row[: len(expected)], expected)
