"""Whether the commands of a page can be given: programs, options, targets and extras are those that there are."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .code_blocks import ROOT

_EXTRAS = re.compile(r"(?:llava_st_ops|\.)\[([\w,]+)\]")
# What is not checked beyond its name: programs of others.
FOREIGN = {".", "cd", "cmake", "ctest", "export", "git", "nvcc", "source", "twine"}


class Parsed(Exception):  # noqa: N818 - no error: the parser has taken the command's arguments
    """A command's arguments were parsed; nothing of it ran."""


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without prompts, comments and environment variables."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        for between, words in itertools.groupby(lexer, lambda word: word.strip(";&|") == ""):
            command = list(itertools.dropwhile(re.compile(r"\w+=.*").fullmatch, words))
            if command and not between:
                yield command


def check(words: list[str]) -> None:
    """Raises AssertionError where a command cannot be given like this."""
    program = words[0].rpartition("/")[2]
    if program in ("python", "python3", "torchrun") or (program == "accelerate" and words[1:2] == ["launch"]):
        _check_python(words)
    elif program in ("pip", "pip3"):
        _check_pip(words)
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(known), f"the Makefile has no target {set(targets) - set(known)}"
    elif "/" in words[0]:
        assert words[0].startswith("build/") or (ROOT / words[0]).exists(), f"there is no {words[0]}"
    else:
        assert program in FOREIGN, f"nothing is known of {program}"


def _check_pip(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", text, re.MULTILINE))
    wanted = {extra for word in words for match in _EXTRAS.finditer(word) for extra in match[1].split(",")}
    assert wanted <= known, f"pyproject.toml has no extra {wanted - known}"


def _check_python(words: list[str]) -> None:
    if "-m" not in words:
        script = next((word for word in words[1:] if word.endswith(".py")), None)
        if script is not None and "/" in script:
            assert (ROOT / script).exists(), f"there is no {script}"
        return
    at = words.index("-m")
    module, arguments = words[at + 1], words[at + 2 :]
    if module.partition(".")[0] not in ("llava_st", "llava_st_ops", "benchmarks", "tests") or "..." in arguments:
        return
    # In usage lines brackets are around what may be left out.
    parse(module, [word.strip("[]") for word in arguments])


def parse(module: str, arguments: list[str]) -> None:
    """Starts `python -m module`, and stops it when its arguments have been parsed."""
    original: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        original(parser, *given, **options)
        raise Parsed

    code, errors = None, io.StringIO()
    argv, sys.argv = sys.argv, [module, *arguments]
    argparse.ArgumentParser.parse_args = stop
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, where the module was imported before
            runpy.run_module(module, run_name="__main__")
    except Parsed:
        pass
    except SystemExit as end:
        code = end.code
    finally:
        argparse.ArgumentParser.parse_args = original
        sys.argv = argv
    assert not code, f"{module} {' '.join(arguments)}: {errors.getvalue()}"
