"""The module of LAPE: published vectors in both modes, decoding, and what users may give it."""

from __future__ import annotations

import math

import pytest
import torch

from llava_st_ops import lape_add, reference
from llava_st_ops.nn import CoordinateTokens, LanguageAlignedPositionalEmbedding
from tests.reference.lape_cases import AXES, load_golden

SIDES = ("input", "output")
TABLES = [f"{axis}_{side}" for axis in AXES for side in SIDES]
PUBLISHED = {
    f"model.{'' if axis == 'temporal' else 'spatial_'}{axis}_{side}_embeddings.weight": f"{axis}_{side}"
    for axis in AXES
    for side in SIDES
}


def golden_module(tensors, config, compat="paper", **options):
    """With the tables of a golden file, loaded under their published names."""
    names = [name for name in TABLES if name in tensors]
    ids = config.get("token_ids", {})
    tokens = CoordinateTokens(config["vocab_rows"], *(ids[name] for name in TABLES)) if "vocab_rows" in config else None
    bins, width = tensors[names[0]].shape
    module = LanguageAlignedPositionalEmbedding(bins, width, tokens=tokens, compat=compat, **options)
    module.to(tensors[names[0]].dtype)
    state = {old: tensors[new] for old, new in PUBLISHED.items() if new in names}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert sorted([*missing, *names]) == sorted(TABLES)
    return module


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("name", ["lape_inject_video", "lape_inject_image"])
def test_golden_injection(name, compat):
    tensors, _ = load_golden(name)
    module = golden_module(tensors, {}, compat)
    features = tensors["features"].view(1, -1, 27, 27, 4).requires_grad_()
    injected = module(features)
    torch.testing.assert_close(injected, tensors["injected"].view_as(injected), rtol=0, atol=5e-5)
    injected.backward(tensors["cotangent"].view_as(injected))
    assert torch.equal(features.grad.view_as(tensors["cotangent"]), tensors["cotangent"])
    for table in TABLES:
        expected = tensors[f"grad_{table}"]
        bound = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(getattr(module, table).grad, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("name", ["splice_video", "splice_image"])
def test_golden_splice(name, compat):
    tensors, config = load_golden(name)
    module = golden_module(tensors, config, compat)
    ids = tensors["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    if name == "splice_image":
        visual = tensors["image_features"]
        mask[:, config["image_block_start"] :][:, :729] = True
    else:
        visual = [tensors["slow"]] if compat == "released" else [tensors["fast"], tensors["slow"]]
        mask[:, config["slow_block_start"] :][:, :1620] = True
        if compat == "paper":
            mask[:, config["fast_block_start"] :][:, :900] = True
    output = module.embed(ids, tensors["embed_tokens"], config["variables"], visual, mask)
    torch.testing.assert_close(output, tensors[f"inputs_embeds_{compat}"], rtol=0, atol=1e-6)
    block = tensors[f"inputs_embeds_{compat}"][mask]
    assert torch.equal(output[mask], block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_loss(dtype):
    tensors, config = load_golden("coordinate_loss")
    module = golden_module(tensors, config, "released").to(dtype)
    hidden, head = (tensors[name].to(dtype).requires_grad_() for name in ("hidden", "lm_head"))
    loss = module.loss(hidden, tensors["labels"], config["variables"], head, reduction="per_sample_sum")
    loss.backward()
    found = {"loss": loss.detach(), "grad_hidden": hidden.grad, "grad_lm_head": head.grad}
    found |= {f"grad_{axis}_output": getattr(module, f"{axis}_output").grad for axis in AXES}
    for name, actual in found.items():
        expected = tensors[name]
        bound = 1e-11 if dtype == torch.float64 else 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)
    for b, expected in enumerate(tensors["per_sample_loss"]):
        one = module.loss(hidden[b : b + 1], tensors["labels"][b : b + 1], config["variables"][b : b + 1], head)
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-11 if dtype == torch.float64 else 1e-5)


TOKENS = CoordinateTokens(20, 10, 11, 12, 13, 14, 15, visual=(7, 8))
IDS = torch.tensor([[1, 7, 8, 10, 11, 2, 0, 0], [12, 13, 3, 14, 15, 7, 22, 34]])
VARIABLES = [
    {"temporal_input_locations": [0.25], "temporal_output_locations": [0.5, 0.9]},
    {
        "spatial_height_input_locations": [0.0],
        "spatial_height_output_locations": [1.0],
        "spatial_width_input_locations": [0.3],
        "spatial_width_output_locations": [1.7],
    },
]


def small_module(**options):
    torch.manual_seed(0)
    return LanguageAlignedPositionalEmbedding((5, 4, 6), 8, tokens=TOKENS, **options)


def test_positions_from_lists():
    nan = math.nan
    expected = [[nan, nan, nan, 0.25, 0.5, nan, nan, nan], [0.0, 1.0, nan, 0.3, 1.7, nan, nan, nan]]
    positions = TOKENS.positions(IDS, VARIABLES)
    torch.testing.assert_close(positions, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    TOKENS.check(IDS, positions)


def test_embed_by_hand():
    module, embed = small_module(), torch.randn(20, 8)
    visual = [torch.randn(1, 8), torch.randn(2, 8)]
    output = module.embed(IDS, embed, VARIABLES, visual)
    assert torch.equal(output[0, [0, 5]], embed[[1, 2]])
    assert torch.equal(torch.stack([output[0, 1], output[0, 2], output[1, 5]]), torch.cat(visual))
    assert torch.equal(output[0, 3], module.temporal_input[1])  # 0.25 of 5 anchors
    assert torch.equal(output[1, 0], module.height_input[0])
    assert torch.equal(output[1, 4], module.width_input[5])  # clipped
    torch.testing.assert_close(output[1, 3], 0.5 * module.width_input[1] + 0.5 * module.width_input[2])
    assert torch.equal(output[1, 6], module.temporal_input[2])
    assert torch.equal(output[1, 7], module.width_input[5])
    positions = TOKENS.positions(IDS, VARIABLES)
    assert torch.equal(module.embed(IDS, embed, positions, torch.cat(visual)), output)
    released = small_module(compat="released").embed(IDS, embed, VARIABLES, visual)
    assert torch.equal(released[1, 3], embed[14])
    text = torch.tensor([[1, 2, 3]])
    assert torch.equal(module.embed(text, embed), embed[text])


def test_gradients_reach_neighbours():
    module, embed = small_module(), torch.randn(20, 8, requires_grad=True)
    module.embed(torch.tensor([[22]]), embed).sum().backward()
    expected = torch.tensor([0.25, 0.5, 2, 0.5, 0.25]).unsqueeze(1).expand(5, 8)
    torch.testing.assert_close(module.temporal_input.grad, expected)
    assert not embed.grad.any()
    for name in TABLES:  # not None: DistributedDataParallel depends on it
        assert getattr(module, name).grad is not None or name.endswith("output")


def test_loss_is_that_of_the_next_token():
    module, head = small_module(), torch.randn(20, 8)
    hidden = torch.randn(2, 8, 8)
    labels = IDS.masked_fill(IDS == 0, -100)
    positions = TOKENS.positions(IDS, VARIABLES)
    loss = module.loss(hidden, labels, positions, head, reduction="sum")
    expected = 0
    rows = torch.cat([head, module.temporal_output, module.height_output, module.width_output])
    logs = (hidden @ rows.T).log_softmax(-1)
    single = {(0, 3): (22, 22), (1, 0): (28, 28), (1, 3): (34, 34)}  # coordinates that lie at anchors: 0.5, 1, clipped
    for b in range(2):
        for i in range(7):
            label = int(labels[b, i + 1])
            if label != -100:
                expected = expected - logs[b, i, single.get((b, i), (label,))[0]]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(module.loss(hidden, labels, VARIABLES, head, reduction="sum"), loss)
    mean = module.loss(hidden, labels, positions, head)
    torch.testing.assert_close(mean, loss / 12)
    torch.testing.assert_close(module.loss(hidden, labels, positions, head, normalizer=24), loss / 24)


def test_injection_options():
    module = small_module(text_aligned=True)
    features = torch.zeros(1, 3, 4, 2, 8)
    means = [(getattr(module, f"{axis}_input") + getattr(module, f"{axis}_output")) / 2 for axis in AXES]
    torch.testing.assert_close(module(features), reference.lape_add(features, *means, text_aligned=True))
    packed = module(features.flatten(0, 3), torch.tensor([[3, 4, 2]]))
    torch.testing.assert_close(packed, module(features).flatten(0, 3))
    low = small_module(compat="released").bfloat16()
    means = [(getattr(low, f"{axis}_input") + getattr(low, f"{axis}_output")) / 2 for axis in AXES]
    features = torch.randn(1, 3, 4, 2, 8).bfloat16()
    # The published forward rounds the tables on their way, too.
    assert not torch.equal(low(features), lape_add(features, *means))
    assert low(features).dtype == torch.bfloat16
    mixed = small_module()(features)
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_decode(axis):
    module = LanguageAlignedPositionalEmbedding((50, 60, 70), 4)
    bins = module.num_bins[axis]
    own = torch.full((3, bins), -9.0)
    own[0, 0], own[1, bins - 1] = 5.0, 5.0
    own[2, 20:22] = torch.tensor([3.0, 3.0])
    full = torch.cat([torch.randn(3, 11), *(torch.full((3, n), 20.0) for n in module.num_bins)], 1)
    first = 11 + sum(module.num_bins[:axis])
    full[:, first : first + bins] = own
    for logits in (own, full):
        anchors = module.decode(logits, axis, "anchor")
        torch.testing.assert_close(anchors, torch.tensor([0.0, bins - 1, 20.0]) / (bins - 1))
        expected = torch.tensor([0.0, bins - 1, 20.5]) / (bins - 1)
        torch.testing.assert_close(module.decode(logits, axis), expected, rtol=0, atol=1e-4)


def test_decoding_between_anchors_is_twice_as_exact():
    """On logits that are the logarithm of the two-bin target, plus noise."""
    torch.manual_seed(0)
    module = LanguageAlignedPositionalEmbedding(100, 4)
    positions = torch.rand(20000, dtype=torch.float64)
    anchor = positions * 99
    target = torch.zeros(20000, 100, dtype=torch.float64)
    target.scatter_(1, anchor.floor().long()[:, None], 1 - anchor.frac()[:, None])
    target.scatter_add_(1, anchor.ceil().long()[:, None], anchor.frac()[:, None])
    logits = target.log() + 0.5 * torch.randn_like(target)
    errors = {d: (module.decode(logits, 0, d) - positions).abs().mean() for d in ("anchor", "expectation")}
    assert errors["expectation"] <= errors["anchor"] / 2


def test_merged_rows_serve_generation():
    module, embed, head = small_module(), torch.randn(20, 8), torch.randn(20, 8)
    merged_embed, merged_head = module.merge(embed, head)
    ids = torch.arange(35)[None]
    ids = ids[(TOKENS.axis_of(ids, TABLES) < 0) & (ids != 7) & (ids != 8)][None]
    assert torch.equal(merged_embed[ids], module.embed(ids, embed))
    assert torch.equal(merged_head[:20], head)
    assert torch.equal(merged_head[20:], torch.cat([module.temporal_output, module.height_output, module.width_output]))
    hidden = torch.randn(1, 1, 8)
    label = torch.tensor([[0, 31]])
    loss = module.loss(hidden.expand(1, 2, 8), label, None, head)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy((hidden @ merged_head.T)[0], label[0, 1:]))
    assert module.merge(embed.bfloat16(), head.bfloat16())[0].dtype == torch.bfloat16


def test_state_dict_below_a_prefix():
    outer = torch.nn.Module()
    outer.model = torch.nn.Module()
    outer.model.lape = small_module()
    state = {f"model.lape.{old}": torch.randn_like(getattr(outer.model.lape, new)) for old, new in PUBLISHED.items()}
    wanted = {new: state[f"model.lape.{old}"] for old, new in PUBLISHED.items()}
    outer.load_state_dict(dict(state))
    for name, table in wanted.items():
        assert torch.equal(getattr(outer.model.lape, name), table)
    assert sorted(small_module().state_dict()) == sorted(TABLES)


def test_compile():
    module, embed, head = small_module(), torch.randn(20, 8), torch.randn(20, 8)
    positions, visual = TOKENS.positions(IDS, VARIABLES), torch.randn(3, 8)

    def step(ids, positions, visual):
        hidden = module.embed(ids, embed, positions, visual).tanh()
        return module.loss(hidden, ids, positions, head) + module(visual.view(1, 3, 1, 1, 8)).sum()

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, positions, visual), step(IDS, positions, visual))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, e: m.embed(IDS, e, VARIABLES, torch.randn(2, 8)),
            "visual_mask has 3 places, but there are 2",
        ),
        (lambda m, e: m.embed(IDS, e, VARIABLES[:1]), "expected one dict for each of the 2 samples, got 1"),
        (lambda m, e: m.embed(IDS[:, :1], e, [{}, {}]), "sample 1 has 1 height_input tokens, the last at position 0"),
        (lambda m, e: m.embed(IDS, e, None, torch.randn(3, 8)), r"positions\[0, 3\] must be a number"),
        (lambda m, e: m.embed(IDS + 30, e), r"input_ids\[0, 5\] must be in \[0, 35\)|input_ids\[0, 1\] must"),
        (lambda m, e: TOKENS.check(IDS, torch.full(IDS.shape, math.nan)), "got nan at sample 0, position 3"),
        (lambda m, e: TOKENS.check(IDS[1], torch.full((8,), math.nan)), "got nan at position 0"),
        (lambda m, e: m.decode(e, 3), "axis must be 0, 1 or 2, got 3"),
        (lambda m, e: m.decode(e, 0, "best"), "decoder must be 'anchor' or 'expectation', got 'best'"),
        (lambda m, e: m.decode(e, 0), "of the 5 anchors of axis 0, got 8"),
        (lambda m, e: LanguageAlignedPositionalEmbedding(5, 8).embed(IDS, e), "without tokens=CoordinateTokens"),
        (lambda m, e: LanguageAlignedPositionalEmbedding(5, 8, compat="new"), "compat must be 'paper' or 'released'"),
        (lambda m, e: LanguageAlignedPositionalEmbedding((5, 0, 2), 8), "num_bins must be one positive number or"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_module(), torch.randn(20, 8))


def test_rounded_tables_of_the_released_mode_are_computed_once_and_anew_after_a_change():
    lape = LanguageAlignedPositionalEmbedding(100, 8, compat="released")
    with torch.no_grad():
        first = lape.tables("input")
        assert lape.tables("input")[0] is first[0]
        assert lape.tables("output")[0] is not first[0]
        lape.temporal_input.add_(1)
        second = lape.tables("input")
        torch.testing.assert_close(second[0], first[0] + 1)
        assert lape.half().tables("input")[0].dtype == torch.float16
    assert lape.tables("input")[0].requires_grad


def test_visual_tokens_can_be_placed_by_index_and_shared():
    lape = LanguageAlignedPositionalEmbedding(10, 4, tokens=TOKENS)
    visual, embed = torch.randn(3, 4), torch.randn(20, 4)
    ids = torch.zeros(2, 3, dtype=torch.long)
    index = torch.tensor([[2, -1, 0], [2, 2, 1]])
    embeddings = lape.embed(ids, embed, visual=visual, visual_index=index)
    assert torch.equal(embeddings[0], torch.stack([visual[2], embed[0], visual[0]]))
    assert torch.equal(embeddings[1], visual[[2, 2, 1]])
