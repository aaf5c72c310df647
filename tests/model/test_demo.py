"""The demonstration from the command to its files, on a small random model."""

from __future__ import annotations

import json
import re
import runpy

import numpy as np
import pytest
from llava_st import demo
from llava_st.answer import Answer
from llava_st.geometry import Box
from llava_st.tasks import TASKS
from llava_st.video import displayed_frames, load_image
from PIL import Image

from .clips import moving_square, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("demo") / "clip.mp4", moving_square(20, 96, 64))


def page_data(folder):
    return json.loads((folder / "page.html").read_text().split('id="data">')[1].split("</script>")[0])


def test_a_video(clip, tmp_path, capsys):
    demo.main(["--tiny-random", "--video", str(clip), "--prompt", "Where?", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"annotated.mp4", "timeline.png", "page.html"}
    assert all(path.name in said for path in (tmp_path / "out").iterdir())
    assert [s for s, *_ in displayed_frames(tmp_path / "out" / "annotated.mp4")] == pytest.approx(
        [k / 25 for k in range(20)]
    )
    assert Image.open(tmp_path / "out" / "timeline.png").size[0] > 500
    data = page_data(tmp_path / "out")
    # Something is there to see: the model is random, its boxes are not forbidden.
    assert any(mark["boxes"] for mark in data["marks"])
    assert any(mark["start"] is not None for mark in data["marks"])
    assert len(data["times"]) == 20


def test_it_says_the_same_every_time(clip, tmp_path, capsys):
    for _ in range(2):
        demo.main(["--tiny-random", "--video", str(clip), "--out", str(tmp_path), "--max-new-tokens", "20"])
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :]


def test_an_image(tmp_path, capsys):
    Image.fromarray(np.full((30, 50, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    demo.main(["--tiny-random", "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"annotated.png", "page.html"}
    assert "annotated.png" in capsys.readouterr().out
    assert any(mark["boxes"] for mark in page_data(tmp_path / "out")["marks"])


def test_a_checkpoint(clip, tmp_path):
    """A saved model, and a task that has words of its own."""
    from llava_st.tiny import tiny_model, tiny_processor

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--video", str(clip), "--task", "dvc", "--max-new-tokens", "5"]
    demo.main([*arguments, "--out", str(tmp_path / "out"), "--frames", "6", "--clip", "2", "9"])
    assert (tmp_path / "out" / "page.html").exists()


def test_a_clip_of_its_own(tmp_path, monkeypatch):
    """Without the package that ships one."""
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    frames = list(displayed_frames(demo.sample_clip(tmp_path)))
    assert len(frames) == 40
    assert (frames[0][1] != frames[-1][1]).any()


def test_moving_shapes_and_the_model_that_knows_them(tmp_path, capsys):
    demo.main(["--shapes", "4", "--out", str(tmp_path)])
    assert "problem" not in capsys.readouterr().out
    data = page_data(tmp_path)
    assert "move?" in (tmp_path / "page.html").read_text()
    assert any(mark["boxes"] for mark in data["marks"])


def test_what_is_shown_of_an_answer_without_a_model(tmp_path):
    picture = np.full((30, 50, 3), 99, np.uint8)
    _, media = load_image(picture, 16)
    files = demo.show(Answer(("it", Box(5, 5, 20, 20)), "it"), media, picture, tmp_path / "deep" / "folder", "Where?")
    assert [file.name for file in files] == ["annotated.png", "page.html"]
    assert all(file.stat().st_size for file in files)


def test_prompts_in_the_words_of_tasks():
    assert demo._fields(TASKS["tvg"], "a man falls") == {"event": "a man falls"}
    assert demo._fields(TASKS["stvg"], "Where is he?") == {"question": "Where is he?"}
    assert demo._fields(TASKS["reg"], "What is in [0.1,0.2,0.3,0.4]?") == "What is in [0.1,0.2,0.3,0.4]?"
    assert demo._fields(TASKS["dvc"], None) == {}
    assert demo._fields(None, "Hello") == "Hello"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "a.mp4", "--prompt", "x"], "one of --model DIR and --tiny-random"),
        (["--model", "m", "--prompt", "x"], "one of --video FILE, --image FILE and --shapes SEED"),
        (["--model", "m", "--video", "a.mp4"], "--prompt TEXT is needed"),
        (["--tiny-random", "--video", "missing.mp4"], "missing.mp4: no such video file"),
        (["--tiny-random", "--video", "a.mp4", "--task", "rec"], "--task rec is about an? image, got --video"),
    ],
)
def test_errors_end_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code != 0
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(message, said)


@pytest.mark.filterwarnings("ignore:'llava_st.demo' found in sys.modules")
def test_it_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("llava_st.demo", run_name="__main__")
    assert "--tiny-random" in capsys.readouterr().out


def test_tasks_without_words_of_their_own_need_a_prompt():
    with pytest.raises(ValueError, match="--task stvg needs a --prompt: its question"):
        demo._fields(TASKS["stvg"], None)
    assert demo._fields(TASKS["captioning"], None) == {}
