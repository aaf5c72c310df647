"""The published model at its full size, without weights: names, shapes, counts, ids and memory."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterable
from math import prod
from pathlib import Path

import pytest
import torch
from llava_st.checkpoints import memory
from llava_st.checkpoints.names import to_ours, to_published
from llava_st.checkpoints.published import full_size_config
from llava_st.checkpoints.reading import TensorSpec
from llava_st.checkpoints.settings import read_config
from llava_st.checkpoints.skeleton import expected_shapes, skeleton
from llava_st.checkpoints.tokens import add_tokens, read_token_ids
from llava_st.convert import main
from llava_st.tiny import tiny_config, tiny_model
from llava_st.vision_tower import vision_features
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.models.qwen2 import Qwen2Tokenizer

from .published_layout import CHAT_TOKENS, FULL, TABLES, VISUAL, published_config, published_shapes

PACKERS = ("token_packer", "token_packer_slow", "token_packer_fast")
VOCABULARY = 151_660


@pytest.fixture(scope="module")
def model():
    return skeleton(full_size_config())


# Names and shapes ---------------------------------------------------------------------------------------------------


def test_every_tensor_is_a_published_one_and_has_its_shape(model):
    ours = {to_published(name): shape for name, shape in expected_shapes(model).items()}
    published = published_shapes(FULL, VOCABULARY)
    assert ours == published
    assert {to_ours(name): shape for name, shape in published.items()} == expected_shapes(model)


def test_parts_are_as_large_as_published(model):
    shapes = {to_published(name): shape for name, shape in expected_shapes(model).items()}
    for packer in PACKERS:
        prefix = f"model.vision_resampler.{packer}."
        assert sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) == 22_036_480
    assert sum(name.startswith("model.vision_resampler.") for name in shapes) == 3 * 23
    assert [shapes[name] for name in TABLES] == [(100, 3584)] * 6
    assert sum(name.startswith("model.vision_tower.") for name in shapes) == 421 == 26 * 16 + 2 + 1 + 2


def test_the_model_has_as_many_parameters_as_arithmetic_says(model):
    attention = 2 * (3584 * 3584 + 3584 * 512) + 3584 + 2 * 512
    layer = attention + 3 * 3584 * 18944 + 2 * 3584
    language = 2 * VOCABULARY * 3584 + 28 * layer + 3584
    vision_layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    vision = 26 * vision_layer + 3 * 14 * 14 * 1152 + 1152 + 729 * 1152 + 2 * 1152
    projector = 1152 * 3584 + 3584 + 3584 * 3584 + 3584
    expected = language + vision + projector + 3 * 22_036_480 + 6 * 100 * 3584
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(part.parameters for part in memory.weights(full_size_config())) == expected


def test_the_config_is_what_the_published_files_say():
    config = full_size_config()
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in published_shapes(FULL, VOCABULARY).items()}
    published = published_config(FULL, VOCABULARY) | {"bos_token_id": 151643, "eos_token_id": 151645}
    read = read_config(published, specs, VOCABULARY, config.token_ids)
    read.compat = "released"
    assert read.to_dict() == {**config.to_dict(), "architectures": ["LlavaStForConditionalGeneration"]}
    assert config.video_grids(100) == ((100, 3, 3), (20, 9, 9))
    assert config.image_grid() == (27, 27)
    assert memory.video_tokens(config) == 900 + 1620


# The vocabulary -----------------------------------------------------------------------------------------------------


def split_in_two(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that a token was merged from: what byte pair encoding makes of it with the merges before."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], limit))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Qwen's vocabulary, which the package dashscope ships. The package itself is not imported."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the package dashscope, of the extra [test], is not installed"
    path = Path(spec.submodule_search_locations[0], "resources", "qwen.tiktoken")
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="module")
def qwen(ranks):
    """A function that makes Qwen2's tokenizer, with more tokens of its own if they are given."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [tuple(map(spell, split_in_two(token, ranks))) for token in ordered]

    def make(*more: str) -> Qwen2Tokenizer:
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
        tokenizer.add_tokens([*CHAT_TOKENS, *more], special_tokens=True)
        return tokenizer

    return make


def test_the_vocabulary_is_qwens(ranks, qwen):
    assert sorted(ranks.values()) == [*range(151_643)]
    tokenizer = qwen()
    assert len(tokenizer) == 151_646
    # As every tokenizer of Qwen2 has it.
    assert tokenizer("You are a helpful assistant.").input_ids == [2610, 525, 264, 10950, 17847, 13]
    assert tokenizer("<|im_start|>user\n").input_ids == [151644, 872, 198]


@pytest.mark.parametrize(("snapshot", "anchors"), [((), 151_660), (("<image>",), 151_661)])
def test_coordinates_begin_where_the_embedding_ends(qwen, snapshot, anchors):
    tokenizer = qwen(*snapshot)
    assert len(add_tokens(tokenizer, (100, 100, 100))) == 314
    ids = tokenizer.convert_tokens_to_ids(["<TEMP-000>", "<TEMP-099>", "<HEIGHT-000>", "<WIDTH-000>", "<WIDTH-099>"])
    assert ids == [anchors, anchors + 99, anchors + 100, anchors + 200, anchors + 299]
    assert len(tokenizer) == anchors + 300
    found = read_token_ids(tokenizer, (100, 100, 100), anchors)
    assert [found[name] for name in VISUAL] == [*range(anchors - 14, anchors - 6)]
    assert (found["temporal_input"], found["width_output"]) == (anchors - 6, anchors - 1)
    if not snapshot:
        assert found == full_size_config().token_ids
    text = tokenizer("{<TEMP-000><TEMP-OUTPUT>}<vid_patch><|im_end|>\n").input_ids
    assert text == [90, anchors, anchors - 5, 92, anchors - 9, 151645, 198]


# Memory -------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_memory_the_published_model_needs(capsys):
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for figure in ("8,095,709,216", "15.079", "KV cache of 3,800 tokens: 2,520 of a video of 100 frames"):
        assert figure in printed


def test_weights_are_counted_in_bytes():
    model = tiny_model().bfloat16()
    parts = memory.weights(model.config)
    assert sum(part.nbytes[0] for part in parts) == sum(parameter.nbytes for parameter in model.parameters())
    # Of a layer's linear layers, 8 bits take half and a float32 per row, 4 bits a quarter and a float32 per 64 weights.
    layers = next(part for part in parts if part.name == "LLM: layers")
    linear = [m.weight for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    count, rows = sum(weight.numel() for weight in linear), sum(len(weight) for weight in linear)
    rest = layers.nbytes[0] - 2 * count
    assert layers.nbytes[1:] == (rest + count + 4 * rows, rest + count // 2 + count // 16)


@torch.no_grad()
def test_the_cache_is_counted_in_bytes():
    model = tiny_model().bfloat16()
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.arange(50)[None], cache=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == memory.cache_bytes(model.config, 50) > 0


class Peak(TorchDispatchMode):
    """The most bytes that were alive at a time, besides those of `known` tensors."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:  # views of weights
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@torch.no_grad()
def test_the_vision_tower_needs_no_more_than_that():
    """Of a tower with the proportions of the published one."""
    vision = tiny_config().vision_config.to_dict() | {"hidden_size": 64, "intermediate_size": 240}
    config = tiny_config(vision_config=vision, vision_chunk_frames=4, num_frames=16)
    model = tiny_model(vision_config=vision, vision_chunk_frames=4, num_frames=16).bfloat16()
    pixels = torch.randn(16, 3, 36, 36)
    frames, features, layer = memory.vision_bytes(config).values()
    assert frames == pixels.nbytes
    with Peak([pixels, *model.parameters(), *model.buffers()]) as peak:
        result = vision_features(model.model.vision_tower, pixels, 4)
    assert result.nbytes == features
    assert layer <= peak.most - features <= 1.1 * layer
