"""Documents with parts that records make."""

from __future__ import annotations


def replace_part(text: str, name: str, content: str) -> str:
    """A document whose part between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is `content`.

    Raises:
        ValueError: the document has no such part.
    """
    first, last = (f"<!-- {name}:{side} -->" for side in ("begin", "end"))
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected {first} and, after it, {last}")
    return f"{before}{first}\n\n{content}\n\n{last}{after}"
