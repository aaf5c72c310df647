"""The site: its navigation has every page, its reference every public function and class."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from .code_blocks import PAGES, ROOT
from .public_surface import exported

DOCS = ROOT / "docs"


def leaves(navigation: Any) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    else:
        for entry in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from leaves(entry)


def resolve(path: str) -> Any:
    """What the name of a directive stands for: the longest importable part, then attributes."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"nothing is called {path}")


@pytest.fixture(scope="module")
def directives() -> list[str]:
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    # Tags of Python in the file would be those of plug-ins; there are none.
    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(pages)


def test_everything_public_is_in_the_reference_once(directives):
    documented = [resolve(name) for name in directives]
    missing = [public.name for public in exported() if public.value not in documented]
    assert not missing
    assert len(directives) == len(set(directives)) == len({id(value) for value in documented})


def test_pages_link_to_what_there_is():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
