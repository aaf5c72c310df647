"""Scores of captions by pycocoevalcap, which needs Java."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
# Class, module and the names of its scores.
_SCORERS = (
    ("Bleu", "bleu.bleu", NAMES[:4]),
    ("Meteor", "meteor.meteor", NAMES[4:5]),
    ("Rouge", "rouge.rouge", NAMES[5:6]),
    ("Cider", "cider.cider", NAMES[6:]),
)


class CaptionScores(NamedTuple):
    """Scores by name, in percent (CIDEr from 0 to 1000), and the reason for each that could not be had."""

    scores: dict[str, float]
    absent: dict[str, str]


def score_captions(pairs: Sequence[tuple[str, str]]) -> CaptionScores:
    """Compares predicted captions with true ones, after tokenization as in the Penn Treebank.

    Args:
        pairs: predictions, each with its truth; "" where there is no prediction.

    What cannot be computed is absent, with the reason, and never 0.
    """
    reason = None
    if not pairs:
        reason = "there are no captions to score"
    elif shutil.which("java") is None:
        reason = "java, which pycocoevalcap needs, was not found"
    else:
        try:
            predicted, true = (_tokenize([pair[side] for pair in pairs]) for side in (0, 1))
        except ImportError as error:
            reason = f"pycocoevalcap is not installed: {error}"
        except (OSError, ValueError) as error:
            reason = f"the tokenizer of pycocoevalcap failed: {error}"
    if reason is not None:
        return CaptionScores({}, dict.fromkeys(NAMES, reason))
    scores: dict[str, float] = {}
    absent: dict[str, str] = {}
    for scorer, module, names in _SCORERS:
        try:
            found = _score(scorer, module, predicted, true)
            scores.update({name: 100 * float(value) for name, value in zip(names, found, strict=True)})
        except (ImportError, OSError, ValueError) as error:
            absent.update(dict.fromkeys(names, f"pycocoevalcap's {scorer} failed: {error}"))
    return CaptionScores(scores, absent)


def _tokenize(captions: Sequence[str]) -> dict[int, list[str]]:
    tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    # The tokenizer takes one line per caption, METEOR separates them by |||.
    lines = [" ".join(caption.replace("|||", " ").split()) for caption in captions]
    tokens = tokenizer.tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if len(tokens) != len(captions):
        raise ValueError(f"expected {len(captions)} captions, got {len(tokens)}; does java run?")
    return tokens


def _score(scorer: str, module: str, predicted: dict[int, list[str]], true: dict[int, list[str]]) -> Sequence[float]:
    made: Any = getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            score, _ = made.compute_score(true, predicted)
    except (OSError, ValueError):
        if scorer == "Meteor":
            _release(made)
        raise
    return score if isinstance(score, list) else [score]


def _release(meteor: Any) -> None:
    """What a Meteor that failed holds on to: its lock, for which it would wait for ever when it is deleted, and a pipe
    that it could not close then."""
    if meteor.lock.locked():
        meteor.lock.release()
    with contextlib.suppress(OSError):
        meteor.meteor_p.stdin.close()
