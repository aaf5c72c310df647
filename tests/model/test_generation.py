"""Constrained decoding of coordinates, and positions from recorded scores."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_st.configuration_llava_st import LlavaStConfig
from llava_st.coordinate_text import CoordinateText, read
from llava_st.generation import CoordinateRecorder, CoordinateSyntax
from llava_st.tiny import tiny_config, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding

CONFIG = tiny_config()
TOKENIZER = tiny_tokenizer()
V = CONFIG.vocab_size
BLANKS = {TOKENIZER.tokenize(chr(i))[0] for i in range(128) if chr(i).isspace()}
BOX = "[<WIDTH-050><HEIGHT-020><WIDTH-098><HEIGHT-033>]"


def allowed(text: str, tokenizer=TOKENIZER, config=CONFIG, **options) -> set[str]:
    """Which tokens may follow the text."""
    ids = tokenizer(text)["input_ids"]
    scores = CoordinateSyntax(config, tokenizer, 0, **options)(
        torch.tensor([ids], dtype=torch.int64), torch.zeros(1, config.vocab_size + sum(config.num_bins))
    )
    return set(tokenizer.convert_ids_to_tokens(torch.nonzero(scores[0] == 0)[:, 0].tolist()))


def anchors(axis: str, first: int, last: int) -> set[str]:
    return {f"<{axis}-{k:03d}>" for k in range(first, last + 1)}


WORDS = set(TOKENIZER.convert_ids_to_tokens(range(V))) - set(
    TOKENIZER.convert_ids_to_tokens(list(CONFIG.token_ids.values()))
)
TIMES = anchors("TEMP", 0, 99)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", WORDS | TIMES),
        ("at [", anchors("WIDTH", 0, 98)),
        ("[<WIDTH-050>", anchors("HEIGHT", 0, 98)),
        ("[<WIDTH-050><HEIGHT-020>", anchors("WIDTH", 51, 99)),
        ("[<WIDTH-050><HEIGHT-020><WIDTH-098>", anchors("HEIGHT", 21, 99)),
        ("[<WIDTH-050><HEIGHT-020><WIDTH-098><HEIGHT-033>", {"]"}),
        (BOX, WORDS | TIMES),
        ("{", anchors("TEMP", 0, 98)),
        ("{<TEMP-098>", {"<TEMP-099>", ":"}),
        ("{<TEMP-000><TEMP-099>", {"}"}),
        ("{<TEMP-000><TEMP-099>}", WORDS | TIMES),
        # A brace behind a time or a tube would belong to it, and "[" behind a time and a colon begins an entry.
        ("Ends in <TEMP-040>", WORDS - {"}"} | TIMES),
        ("Ends in <TEMP-040>,", WORDS - {"}", ":"} | TIMES),
        ("Ends in <TEMP-040>.", WORDS | TIMES),
        ("<TEMP-040>:", {"["}),
        ("<TEMP-040>:[", anchors("WIDTH", 0, 98)),
        (f"<TEMP-040>:{BOX}", WORDS - {"}"} | anchors("TEMP", 41, 99)),
        (f"<TEMP-040>:{BOX},  ", WORDS - {"}"} | anchors("TEMP", 41, 99)),
        (f"<TEMP-010>:{BOX}, <TEMP-020>:{BOX},", WORDS - {"}"} | anchors("TEMP", 21, 99)),
        (f"<TEMP-099>:{BOX}, ", WORDS - {"}"}),
        (f"<TEMP-040>:{BOX}. Then ", WORDS | TIMES),
        (f"Box: {BOX}, ", WORDS | TIMES),
        (f"<TEMP-040> {BOX}, ", WORDS | TIMES),
        # A tube in braces ends with its brace.
        ("{<TEMP-040>:", {"["}),
        (f"{{<TEMP-040>:{BOX}", {"}", *BLANKS, ",", ";"} | anchors("TEMP", 41, 99)),
        (f"{{<TEMP-040>:{BOX}, ", {*BLANKS, ",", ";"} | anchors("TEMP", 41, 99)),
        (f"{{<TEMP-040>:{BOX}, <TEMP-050>", {":"}),
        (f"{{<TEMP-040>:{BOX}, <TEMP-099>:{BOX}", {"}"}),
        (f"{{<TEMP-040>:{BOX}}}, ", WORDS | TIMES),
        (f"{{<TEMP-040><TEMP-050>}}. <TEMP-040>:{BOX}", WORDS - {"}"} | anchors("TEMP", 41, 99)),
    ],
)
def test_what_may_follow(text, expected):
    assert allowed(text) == expected


def test_empty_spans_and_boxes_on_request():
    assert "<TEMP-099>" in allowed("{<TEMP-099>", allow_empty=True)
    assert allowed("{", allow_empty=True) == anchors("TEMP", 0, 99)
    assert allowed("[<WIDTH-050><HEIGHT-020>", allow_empty=True) == anchors("WIDTH", 50, 99)
    # Times of a tube ascend all the same.
    assert "<TEMP-040>" not in allowed(f"<TEMP-040>:{BOX},", allow_empty=True)


def test_brackets_in_the_prompt_do_not_count():
    ids = torch.tensor([TOKENIZER("Where is [")["input_ids"]])
    scores = torch.zeros(1, V + 300)
    assert torch.isfinite(CoordinateSyntax(CONFIG, TOKENIZER, ids.shape[1])(ids, scores)).sum() == len(WORDS) + 100
    assert torch.isfinite(CoordinateSyntax(CONFIG, TOKENIZER, 0)(ids, scores)).sum() == 99


@pytest.mark.parametrize("bins", [(1, 1, 1), (7, 5, 3), (2, 1, 4)])
def test_something_may_always_follow_with_few_anchors_too(bins):
    config, tokenizer = tiny_config(num_bins=bins), tiny_tokenizer(bins)
    generate(config, tokenizer, rows=16, steps=120)


def test_scores_of_another_model_are_refused():
    with pytest.raises(ValueError, match=f"scores: expected {V + 300} columns"):
        CoordinateSyntax(CONFIG, TOKENIZER, 0)(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, V))


def test_a_tokenizer_without_brackets_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[": 1, "{": 2, ":": 3, "}": 4}))
    config = copy.deepcopy(CONFIG)
    config.text_config.vocab_size = 5
    with pytest.raises(ValueError, match=r"expected a word for ']'"):
        CoordinateSyntax(config, PreTrainedTokenizerFast(tokenizer_object=words), 0)


# Longer words, as vocabularies of tens of thousands have them.
LONG_WORDS = [
    *"[]{}:,. ab",
    " [",
    ":[",
    " :[",
    "[[",
    "],",
    "]}",
    "].",
    "][",
    "], [",
    "]:[",
    " {",
    "},",
    "}{",
    ": ",
    "[]",
    "{}",
]


def long_tokenizer(blank: str) -> tuple[PreTrainedTokenizerFast, LlavaStConfig]:
    """A tokenizer with such words, and a config for it; blanks as in Qwen ("\u0120") or Llama ("\u2581")."""
    words = [word.replace(" ", blank) for word in LONG_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel() if blank == "\u0120" else decoders.Metaspace()
    special = TOKENIZER.convert_ids_to_tokens([*CONFIG.token_ids.values(), *range(V, V + 300)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = copy.deepcopy(CONFIG)
    config.token_ids = {name: len(words) + i for i, name in enumerate(config.token_ids)}
    config.text_config.vocab_size = len(words) + len(config.token_ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), config


@pytest.mark.parametrize("blank", ["\u0120", "\u2581"])
def test_brackets_are_found_within_words(blank):
    tokenizer, config = long_tokenizer(blank)

    def after(*words: str) -> set[str]:
        ids = torch.tensor([tokenizer.convert_tokens_to_ids([word.replace(" ", blank) for word in words])])
        scores = CoordinateSyntax(config, tokenizer, 0)(ids, torch.zeros(1, config.vocab_size + 300))
        found = tokenizer.convert_ids_to_tokens(torch.nonzero(scores[0] == 0)[:, 0].tolist())
        return {token.replace(blank, " ") for token in found}

    box = ("<WIDTH-001>", "<HEIGHT-001>", "<WIDTH-002>", "<HEIGHT-002>")
    everywhere = set(LONG_WORDS) | anchors("TEMP", 0, 99)
    for opener in (" [", ":[", " :[", "[[", "][", "], [", "]:["):
        assert after("a", opener) == anchors("WIDTH", 0, 98)
    assert after(" [", *box) == {"]", "],", "]}", "].", "][", "], [", "]:["}
    for opener in (" {", "}{"):
        assert after(opener) == anchors("TEMP", 0, 98)
    assert after("{", "<TEMP-090>", "<TEMP-091>") == {"}", "},", "}{"}
    assert after("{", "<TEMP-098>") == {"<TEMP-099>", ":", ": ", ":[", " :["}
    assert after("<TEMP-090>", ": ") == {"[", " ["}
    assert after("<TEMP-090>") == everywhere - {"}", "},", "}{"}
    assert after("<TEMP-090>", " ") == everywhere - {"}", "},", "}{", ":", ": ", ":[", " :["}
    end_tube = {"}", "},", "}{"}
    for closer in ("]", "],"):
        assert after("<TEMP-090>", ":[", *box, closer, " ", ",") == everywhere - end_tube - anchors("TEMP", 0, 90)
        assert after("<TEMP-090>", ": ", " [", *box, closer) == everywhere - end_tube - anchors("TEMP", 0, 90)
    # A box that another one follows in the same word is no entry whose tube goes on.
    for rest in [("].",), ("][", *box, "],")]:
        assert after("<TEMP-090>", ":[", *box, *rest) == everywhere
    assert after("<TEMP-090>", ":[", *box) == {"]", "],", "].", "][", "], [", "]:["}
    for opener in ("{", "}{"):
        assert after(opener, "<TEMP-090>", ":[", *box) == {"]", "],", "]}"}
    assert after("{", "<TEMP-099>", ":[", *box) == {"]", "]}"}
    assert after("{", "<TEMP-090>", ":[", *box, "],") - {" "} == {","} | anchors("TEMP", 91, 99)
    assert after("{", "<TEMP-099>", ":[", *box, "]") == end_tube
    assert after("{", "<TEMP-090>", ":[", *box, "]}") == everywhere
    for word in ("[]", "{}"):
        assert after(word) == everywhere


def generate(config, tokenizer, rows, steps, constrained=True, seed=0) -> list[str]:
    """Texts of random tokens, more of which are brackets and anchors than there are in a language."""
    generator = torch.Generator().manual_seed(seed)
    syntax = CoordinateSyntax(config, tokenizer, 0)
    size = config.vocab_size + sum(config.num_bins)
    likely = torch.zeros(size)
    for word, odds in {"[": 5, "{": 4, ":": 6, ":[": 5, "],": 4, "}": 4, ",": 6, " ": 4}.items():
        if word in tokenizer.get_vocab():
            likely[tokenizer.convert_tokens_to_ids(word)] = odds
    likely[config.vocab_size :] = 3
    ids = torch.zeros(rows, 0, dtype=torch.int64)
    for _ in range(steps):
        scores = likely - torch.empty(rows, size).exponential_(generator=generator).log()
        if constrained:
            scores = syntax(ids, scores)
            assert torch.isfinite(scores).any(1).all()
            assert not torch.isfinite(scores[:, list(config.token_ids.values())]).any()
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]


def faults(text: str) -> list[str]:
    """What is wrong with the coordinates of a text: what its reader finds, and what other patterns than those of the
    processor do."""
    # It may be cut off.
    text = re.sub(r"((<TEMP-\d+>\s*:\s*)?(\[(<(WIDTH|HEIGHT)-\d+>)*)?|\{<TEMP-\d+>[^}]*|\{)$", "", text)
    anchor = r"<([A-Z]+)-(\d+)>"
    positions = tuple(int(match[2]) / 99 for match in re.finditer(anchor, text))
    template = r"<[A-Z]+-(IN|OUT)PUT>"
    found = [match[0] for match in re.finditer(template, text)]
    readable = re.sub(anchor, r"<\1-OUTPUT>", re.sub(template, "", text))
    found += read(CoordinateText(readable, positions)).problems

    def box(match: re.Match) -> str:
        left, top, right, bottom = map(int, match.groups())
        if not (left < right and top < bottom):
            found.append(f"box {match[0]}")
        return "[]"

    def span(match: re.Match) -> str:
        if not int(match[1]) < int(match[2]):
            found.append(f"span {match[0]}")
        return "{}"

    text = re.sub(r"\[<WIDTH-(\d+)><HEIGHT-(\d+)><WIDTH-(\d+)><HEIGHT-(\d+)>\]", box, text)
    text = re.sub(r"\{<TEMP-(\d+)><TEMP-(\d+)>\}", span, text)
    for tube in re.findall(r"(?:<TEMP-\d+>\s?:\s*\[\][\s,;]*)+", text):
        times = [int(time) for time in re.findall(r"\d+", tube)]
        found += [f"tube {times}" for a, b in pairwise(times) if a >= b]
    found += re.findall(r"<(?:WIDTH|HEIGHT)[^>]*>", text)
    found += re.findall(r"\{<TEMP-\d+>(?!\s?:)", text)
    found += re.findall(r"<TEMP-\d+>:(?!\s*\[\])", text)
    return found


@pytest.mark.parametrize("kind", ["bytes", "\u0120", "\u2581"])
def test_random_scores_give_well_formed_coordinates(kind):
    tokenizer, config = (TOKENIZER, CONFIG) if kind == "bytes" else long_tokenizer(kind)
    texts = generate(config, tokenizer, rows=48, steps=150)
    assert [faults(text) for text in texts] == [[]] * 48
    whole = "".join(texts)
    assert len(re.findall(r"\[<WIDTH-", whole)) > 100
    assert len(re.findall(r"\{<TEMP-\d+><", whole)) > 10
    assert re.search(r"<TEMP-\d+>:\[(<[A-Z]+-\d+>){4}\],<TEMP-\d+>:\[", whole)


def test_without_constraint_random_scores_give_faults():
    texts = generate(CONFIG, TOKENIZER, rows=48, steps=150, constrained=False)
    assert sum(bool(faults(text)) for text in texts) > 40


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=3), st.integers(0, 60), st.randoms())
def test_rows_do_not_depend_on_each_other_or_on_the_past(seeds, length, random):
    """What beams need, which change rows between steps."""
    generator = torch.Generator().manual_seed(seeds[0])
    often = torch.tensor(TOKENIZER(f"[{{:],}} a{BOX}<TEMP-050>")["input_ids"])
    ids = often[torch.randint(len(often), (5, length), generator=generator)]
    scores = torch.randn(5, V + 300, generator=generator)
    order = list(range(5))
    random.shuffle(order)
    together = CoordinateSyntax(CONFIG, TOKENIZER, 0)(ids, scores)
    alone = torch.cat([CoordinateSyntax(CONFIG, TOKENIZER, 0)(ids[i : i + 1], scores[i : i + 1]) for i in range(5)])
    assert together.equal(alone)
    assert CoordinateSyntax(CONFIG, TOKENIZER, 0)(ids[order], scores[order]).equal(together[order])
    # A prompt before them changes nothing.
    prompt = often.repeat(5, 1)
    assert CoordinateSyntax(CONFIG, TOKENIZER, len(often))(torch.cat([prompt, ids], 1), scores).equal(together)


def test_nothing_is_read_back_from_a_device():
    """Tensors without data raise an error where a GPU would be waited for."""
    ids = torch.zeros(3, 20, dtype=torch.int64, device="meta")
    scores = torch.zeros(3, V + 300, device="meta")
    assert CoordinateSyntax(CONFIG, TOKENIZER, 4)(ids, scores).shape == scores.shape
    recorder = record([scores] * 20)
    assert recorder.positions(ids, ids).shape == ids.shape


def record(steps: list[torch.Tensor]) -> CoordinateRecorder:
    recorder = CoordinateRecorder(CONFIG)
    for scores in steps:
        assert recorder(torch.zeros(len(scores), 1), scores) is scores
    return recorder


def test_only_the_scores_of_anchors_are_kept():
    for rows, dtype in [(3, torch.bfloat16), (3, torch.float32), (1, torch.float32)]:
        recorder = record([torch.randn(rows, V + 300, dtype=dtype) for _ in range(4)])
        assert [step.untyped_storage().nbytes() for step in recorder.steps] == [rows * 300 * 4] * 4


@pytest.mark.parametrize("decoder", ["expectation", "anchor"])
def test_positions_are_those_of_lape(decoder):
    scores = [torch.randn(4, V + 300) for _ in range(6)]
    for step, at in zip(scores, [V, V + 100, V + 200], strict=False):
        step[0, at] = step[1, at + 99] = 50.0  # both ends of each axis
    lape = LanguageAlignedPositionalEmbedding((100, 100, 100), 8)
    ids = torch.stack([step[:, V:].argmax(1) + V for step in scores], 1)
    ids[2, 3] = 17  # a word
    positions = record(scores).positions(ids, decoder=decoder)
    assert positions.dtype == torch.float64
    for row, step in [(row, step) for row in range(4) for step in range(6)]:
        if (row, step) == (2, 3):
            assert positions[row, step].isnan()
        else:
            axis = (int(ids[row, step]) - V) // 100
            first = V + 100 * axis
            expected = lape.decode(scores[step][row, first : first + 100].double(), axis, decoder)
            assert float(positions[row, step]) == pytest.approx(float(expected), abs=1e-6)


def test_positions_lie_around_the_token_that_was_chosen():
    scores = torch.full((1, V + 300), -math.inf)
    scores[0, V + torch.tensor([39, 40, 41, 70])] = torch.tensor([0.0, 0.0, math.log(2), 9.0])
    positions = record([scores]).positions(torch.tensor([[V + 40]]))
    assert float(positions) == pytest.approx((39 / 4 + 40 / 4 + 41 / 2) / 99)


def test_what_may_not_follow_has_no_weight():
    """So ends never come before their starts, whichever tokens were drawn."""
    generator = torch.Generator().manual_seed(0)
    syntax, recorder = CoordinateSyntax(CONFIG, TOKENIZER, 0), CoordinateRecorder(CONFIG)
    brace = TOKENIZER.convert_tokens_to_ids("{")
    ids = torch.full((2000, 1), brace)
    for _ in range(2):
        scores = recorder(ids, syntax(ids, 4 * torch.randn(2000, V + 300, generator=generator)))
        scores[:, :V] = -math.inf
        around = (scores[:, V : V + 100] / 50).softmax(1)
        ids = torch.cat([ids, V + torch.multinomial(around, 1, generator=generator)], 1)
    start, end = recorder.positions(ids[:, 1:]).unbind(1)
    assert (start <= end).all()
    assert (ids[:, 2] - ids[:, 1] == 1).any()


def test_more_tokens_than_steps_are_refused():
    with pytest.raises(ValueError, match="sequences: expected at most 1 new tokens"):
        record([torch.zeros(1, V + 300)]).positions(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="decoder must be"):
        record([]).positions(torch.zeros(1, 0, dtype=torch.int64), decoder="mean")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}])
def test_positions_follow_the_rows_of_a_generation(options):
    """Compared with a pass over whole answers. A beam's tokens come from rows that change."""
    model = tiny_model()
    prompt = torch.tensor([TOKENIZER("When?")["input_ids"], TOKENIZER("Who? ")["input_ids"]])
    recorder = CoordinateRecorder(CONFIG)
    torch.manual_seed(0)
    result = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        logits_processor=[recorder],
        return_dict_in_generate=True,
        **options,
    )
    new = result.sequences[:, prompt.shape[1] :]
    with torch.no_grad():
        logits = model(input_ids=result.sequences).logits[:, prompt.shape[1] - 1 : -1]
    expected = record(list(logits.unbind(1))).positions(new)
    assert (~expected.isnan()).sum() > 10
    torch.testing.assert_close(
        recorder.positions(new, getattr(result, "beam_indices", None)), expected, equal_nan=True, atol=1e-6, rtol=0
    )


def allocated(model, steps: int) -> int:
    """Bytes that a generation of so many steps takes from the allocator, those that it gives back not taken off."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.generate(input_ids=torch.arange(40)[None], max_new_tokens=steps, min_new_tokens=steps)
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return sum(max(event.nbytes(), 0) for event in events)


def test_a_decode_step_joins_no_embedding_or_head(monkeypatch):
    """Nor copies either: a step allocates less than one of them has."""
    model = tiny_model(text_config={**CONFIG.text_config.to_dict(), "vocab_size": 20000}, token_ids=None)
    matrix = model.lm_head.weight.nbytes

    def per_step() -> float:
        return (allocated(model, 8) - allocated(model, 3)) / 5

    assert 0 < per_step() < matrix / 2
    head = LanguageAlignedPositionalEmbedding.extend_head  # the measure sees what the published code does
    monkeypatch.setattr(model, "logits", lambda hidden: hidden @ head(model.model.lape, model.lm_head.weight).T)
    assert per_step() > matrix
