"""YAML of strangers: plain values, in bounded time and memory, or a ValueError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# PyYAML takes quadratic time in the depth of brackets, and half a minute for this many bytes.
_MAX_BYTES = 2**20
_MAX_DEPTH = 50


def read_yaml(path: Path) -> Any:
    """What a file of YAML holds: mappings, lists, strings, numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, has aliases, or is too large or nested too deeply.
    """
    with open(path, "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"{path}: at most {_MAX_BYTES} bytes of YAML are read")
    try:
        return yaml.load(text, _Loader)
    # Of a tag that does not fit its value PyYAML raises whatever comes: `!!bool x` is a KeyError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few lines of aliases of aliases stand for more values than there is memory for.
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "brackets are nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)
