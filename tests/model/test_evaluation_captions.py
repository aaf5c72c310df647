"""Caption scores against cases worked by hand."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest
from llava_st.evaluation import captions
from llava_st.evaluation.captions import NAMES, score_captions


@pytest.fixture
def scorers():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("java is not installed")


@pytest.mark.usefixtures("scorers")
def test_hand_worked_case():
    """Case and punctuation do not count, and |||, which METEOR separates captions by, is no word.

    "the cat sat on a mat" for "the cat sat on the mat", both of 6 words: 5 of 6 words are right, 3 of 5 pairs, 2 of 4
    triples, 1 of 3 quadruples. The longest common subsequence, "the cat sat on mat", has 5 words: precision and recall
    are 5/6. Then a perfect caption of 2 words, which has no triples, and none at all for a truth of 3 words.
    """
    pairs = [("The cat ||| sat on a mat.", "the cat\nsat, on the mat"), ("a dog", "A dog!"), ("", "a man rides")]
    scores, absent = score_captions(pairs)
    assert absent == {}
    assert tuple(scores) == NAMES
    precisions = [7 / 8, 4 / 6, 2 / 4, 1 / 3]
    brevity = math.exp(1 - 11 / 8)
    for n in range(1, 5):
        expected = 100 * brevity * math.prod(precisions[:n]) ** (1 / n)
        assert scores[f"BLEU-{n}"] == pytest.approx(expected, rel=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(100 * (5 / 6 + 1 + 0) / 3)
    assert 0 < scores["METEOR"] < 100
    assert 0 < scores["CIDEr"] < 1000


def test_no_captions():
    scores, absent = score_captions([])
    assert scores == {}
    assert absent == dict.fromkeys(NAMES, "there are no captions to score")


def test_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, absent = score_captions([("a", "a")])
    assert scores == {}
    assert set(absent) == set(NAMES)
    assert "java" in absent["METEOR"]


def test_without_pycocoevalcap(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for module in ("pycocoevalcap", "pycocoevalcap.tokenizer.ptbtokenizer"):
        monkeypatch.setitem(sys.modules, module, None)
    scores, absent = score_captions([("a", "a")])
    assert scores == {}
    assert set(absent) == set(NAMES)
    assert "pycocoevalcap is not installed" in absent["CIDEr"]


def test_a_java_that_does_not_run(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    scores, absent = score_captions([("a dog", "a dog"), ("a cat", "a cat")])
    assert scores == {}
    assert "tokenizer of pycocoevalcap failed" in absent["BLEU-1"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_meteor_that_breaks_leaves_the_rest(monkeypatch, tmp_path):
    """It must not wait for ever either, as it does for its own lock when it is deleted."""
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    # The tokenizer's last argument is a file of captions; METEOR's are options.
    java.write_text('#!/bin/sh\nfor last; do :; done\n[ -f "$last" ] && cat "$last"\n')
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    scores, absent = score_captions([("a dog", "a dog"), ("a cat", "a cat")])
    assert set(absent) == {"METEOR"}
    assert absent["METEOR"].startswith("pycocoevalcap's Meteor failed")
    assert scores["BLEU-1"] == pytest.approx(100)


def test_nothing_is_imported_before_it_is_needed():
    source = Path(captions.__file__).read_text()
    assert "\nimport pycocoevalcap" not in source
    assert "\nfrom pycocoevalcap" not in source
