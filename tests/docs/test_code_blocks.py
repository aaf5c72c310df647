"""Every code block of the pages: Python runs, commands can be given as they stand, data files can be read."""

from __future__ import annotations

import ast
import importlib
import json
import os
from pathlib import Path

import pytest
import yaml

from .code_blocks import PAGES, ROOT, SHELL, blocks, run_python
from .commands import check, commands, parse
from .page_world import make_folder, names_for

ALL = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "json", "yaml", "cpp", "cmake", "text", *SHELL}
WITH_PYTHON = [page for page in PAGES if page.name != "README.md" and blocks(page, "python")]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_folder(folder)
    return folder


def test_blocks_are_found_with_their_reasons(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n\n```bash\nmake gpu\n```\n1. x\n   ```\n   y\n   ```\n"
    )
    found = [(block.line, block.language, block.code, block.reason) for block in blocks(page)]
    assert found == [(2, "python", "a = 1\n", None), (8, "bash", "make gpu\n", "needs a GPU"), (12, "", "y\n", None)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_fence_is_a_block_of_a_known_language(page):
    fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
    assert fences == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert page.read_text().count("<!-- not run:") == sum(block.reason is not None for block in blocks(page))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_runs(page, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    run_python(page, names_for(page.stem))


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python" and b.reason], ids=str)
def test_python_that_is_not_run_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("llava_st", "llava_st_ops"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)


@pytest.mark.parametrize("block", [b for b in ALL if b.language in SHELL and b.reason is None], ids=str)
def test_commands_can_be_given(block):
    found = list(commands(block.code))
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("block", [b for b in ALL if b.language in ("json", "yaml")], ids=str)
def test_data_can_be_read(block):
    assert yaml.safe_load(block.code) if block.language == "yaml" else json.loads(block.code)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m llava_st.prove --seed 1 --model DIR --what", "unrecognized arguments: --what"),
        ("python -m llava_st.train STAGE", "required: --model, --out"),
        ("python -m llava_st.data bake OUT", "invalid choice: 'bake'"),
        ("make tests", "no target"),
        ("pip install 'llava_st_ops[models]'", "no extra"),
        ("scripts/no_such_thing.sh", "there is no"),
        ("rn -rf x", "nothing is known"),
    ],
)
def test_a_wrong_command_is_noticed(command, message):
    [words] = commands(command)
    with pytest.raises(AssertionError, match=message):
        check(words)


def test_a_command_that_parses_does_not_run(tmp_path):
    parse("llava_st.data", ["synthesize", str(tmp_path / "out"), "--clips", "3"])
    assert not os.listdir(tmp_path)
