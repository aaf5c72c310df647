"""Every `python -m` command of the pages runs, in a small world: what a page names is there, and is small."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from llava_st.convert import main as convert

from tests.model.published_layout import SMALL, VISUAL_TOKENS, published_tensors, write_checkpoint, write_stage
from tests.model.test_beginning import write_onevision
from tests.model.test_lora import random_adapters, trained_with
from tests.model.training_records import make_record, write_records

from .code_blocks import PAGES, SHELL, blocks
from .commands import commands
from .page_world import make_folder

# What a command gets besides, so that it takes seconds.
_SMALL_TRAINING = ["--set", "bf16=false", "gradient_checkpointing=false", "workers=0", "batch_size=1", "accumulation=1"]
_SMALL_TRAINING += ["max_steps=1", "lora_rank=2", "lora_alpha=2"]
_BESIDES = {
    "llava_st.data synthesize": ["--clips", "2"],
    "llava_st.prove": ["--clips", "2"],
    "llava_st.demo": ["--max-new-tokens", "8"],
    "llava_st.train": _SMALL_TRAINING,
}
# Words of a page that stand for one of several things.
_STANDS_FOR = {
    "llava_st.demo": {"FILE": "clip.mp4"},
    "llava_st.evaluate": {"FILE": "stvg.json"},
    "llava_st.train": {"STAGE": "tasks"},
    "llava_st.convert --to-published": {"DIR": "CONVERTED"},
}


def _python_commands() -> dict[str, list[str]]:
    """Those that differ in more than numbers; `...` stands for what the page has said before."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page, *SHELL):
            for words in commands(block.code):
                # The benchmark takes minutes; tests/benchmarks run its cases, small ones.
                runs = words[:2] == ["python", "-m"] and words[2] != "benchmarks"
                if runs and "..." not in words and block.reason is None:
                    found.setdefault(re.sub(r"\b\d+\b", "N", " ".join(words[2:])), words[2:])
    return found


COMMANDS = _python_commands()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """All that commands name, but `OUT`, which they make."""
    folder = tmp_path_factory.mktemp("commands")
    make_folder(folder)
    shutil.rmtree(folder / "OUT")
    shutil.copytree(folder / "DIR", folder / "CHECKPOINT")
    (folder / "VIDEOS").mkdir()
    shutil.copy(folder / "clip.mp4", folder / "VIDEOS")
    write_checkpoint(folder / "OFFICIAL_DIR", published_tensors(SMALL, "released"))
    assert convert([str(folder / name) for name in ("OFFICIAL_DIR", "CONVERTED")]) == 0
    write_onevision(folder / "ONEVISION_DIR")
    first = published_tensors(SMALL, "released", lape=False)
    write_checkpoint(folder / "STAGE1_DIR", first, added=VISUAL_TOKENS)
    for stage in (2, 3):
        write_stage(folder / f"STAGE{stage}_DIR", random_adapters(stage), trained_with(stage))
    records = [make_record(("Hello?",), (f"Yes {number}.",), id=str(number), video=None) for number in range(4)]
    write_records(folder / "few.json", records)
    (folder / "DATA.yaml").write_text("datasets:\n  - json_path: few.json\n    data_folder: .\n")
    plain = make_record(("<video>\nWhen?",), ("From 1.0 to 3.0 seconds.",), id="0", meta={"duration": 10.0})
    write_records(folder / "plain.json", [plain])
    return folder


def _of(words: list[str], table: dict) -> object:
    return next((value for name, value in table.items() if " ".join(words).startswith(name)), None)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # what runs was imported before
@pytest.mark.parametrize("written", COMMANDS)
def test_command_runs(written, world, tmp_path, monkeypatch, capsys):
    module, *arguments = COMMANDS[written]
    stands_for = _of(COMMANDS[written], _STANDS_FOR) or {}
    arguments = [stands_for.get(word, word) for word in (word.strip("[]") for word in arguments)]
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments, *(_of(COMMANDS[written], _BESIDES) or [])])
    code = None
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code, capsys.readouterr().err
    if "OUT" in arguments and "--dry-run" not in arguments:
        assert list((tmp_path / "OUT").iterdir())
