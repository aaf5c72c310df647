"""Synthetic checkpoints in the published layout: the names are those of the published checkpoints, written out here as
they are described, and not taken from the code that maps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VISUAL = ("im_start", "im_end", "im_patch", "vid_start", "vid_end", "vid_patch", "slow_vid_start", "slow_vid_end")
VISUAL_TOKENS = [f"<{name}>" for name in VISUAL]
TEMPLATES = ("TEMP-INPUT", "TEMP-OUTPUT", "HEIGHT-INPUT", "HEIGHT-OUTPUT", "WIDTH-INPUT", "WIDTH-OUTPUT")
TEMPLATE_TOKENS = [f"<{name}>" for name in TEMPLATES]
ANCHOR_TOKENS = [f"<{axis}-{k:03d}>" for axis in ("TEMP", "HEIGHT", "WIDTH") for k in range(100)]
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TABLES = [
    f"model.{axis}_{side}_embeddings.weight"
    for axis in ("temporal", "spatial_height", "spatial_width")
    for side in ("input", "output")
]


@dataclass(frozen=True)
class Sizes:
    words: int  # of the tokenizer, ChatML's included
    width: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    vision_width: int
    vision_wide: int
    vision_layers: int
    patch: int
    image: int
    packer: int

    @property
    def grid(self) -> int:
        return self.image // self.patch


SMALL = Sizes(259, 32, 48, 2, 4, 2, 48, 64, 2, 4, 38, 16)
FULL = Sizes(151_646, 3584, 18944, 28, 28, 4, 1152, 4304, 26, 14, 384, 1024)


def published_shapes(sizes: Sizes, vocabulary: int, lape: bool = True) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint."""
    c, e, v = sizes.width, sizes.packer, sizes.vision_width
    kv = c // sizes.heads * sizes.kv_heads
    shapes = {"model.embed_tokens.weight": (vocabulary, c)}
    for i in range(sizes.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", c), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, c)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (c, c)
        shapes[f"{layer}mlp.gate_proj.weight"] = (sizes.wide, c)
        shapes[f"{layer}mlp.up_proj.weight"] = (sizes.wide, c)
        shapes[f"{layer}mlp.down_proj.weight"] = (c, sizes.wide)
        shapes[f"{layer}input_layernorm.weight"] = (c,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (c,)
    shapes["model.norm.weight"] = (c,)
    tower = "model.vision_tower.vision_tower.vision_model."
    shapes[f"{tower}embeddings.patch_embedding.weight"] = (v, 3, sizes.patch, sizes.patch)
    shapes[f"{tower}embeddings.patch_embedding.bias"] = (v,)
    shapes[f"{tower}embeddings.position_embedding.weight"] = (sizes.grid**2, v)
    for i in range(sizes.vision_layers):
        layer = f"{tower}encoder.layers.{i}."
        for name in ("k", "v", "q", "out"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (v, v)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (v,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{norm}.weight"] = shapes[f"{layer}{norm}.bias"] = (v,)
        shapes[f"{layer}mlp.fc1.weight"], shapes[f"{layer}mlp.fc1.bias"] = (sizes.vision_wide, v), (sizes.vision_wide,)
        shapes[f"{layer}mlp.fc2.weight"], shapes[f"{layer}mlp.fc2.bias"] = (v, sizes.vision_wide), (v,)
    shapes[f"{tower}post_layernorm.weight"] = shapes[f"{tower}post_layernorm.bias"] = (v,)
    shapes["model.mm_projector.0.weight"], shapes["model.mm_projector.0.bias"] = (c, v), (c,)
    shapes["model.mm_projector.2.weight"], shapes["model.mm_projector.2.bias"] = (c, c), (c,)
    for packer in ("token_packer", "token_packer_slow", "token_packer_fast"):
        prefix = f"model.vision_resampler.{packer}.devide_attention."
        for x in "qkv":
            shapes[f"{prefix}to_{x}.0.weight"], shapes[f"{prefix}to_{x}.0.bias"] = (e, c), (e,)
            shapes[f"{prefix}to_{x}.2.weight"], shapes[f"{prefix}to_{x}.2.bias"] = (e, e), (e,)
            shapes[f"{prefix}ln_{x}.weight"] = shapes[f"{prefix}ln_{x}.bias"] = (e,)
        shapes[f"{prefix}attn.in_proj_weight"], shapes[f"{prefix}attn.in_proj_bias"] = (3 * e, e), (3 * e,)
        shapes[f"{prefix}attn.out_proj.weight"], shapes[f"{prefix}attn.out_proj.bias"] = (e, e), (e,)
        shapes[f"{prefix}to_out.weight"] = (c, e)
    if lape:
        shapes |= dict.fromkeys(TABLES, (100, c))
    shapes["lm_head.weight"] = (vocabulary, c)
    return shapes


def published_config(sizes: Sizes, vocabulary: int) -> dict:
    packed = sizes.grid // 3
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "image_aspect_ratio": "square",
        "initializer_range": 0.02,
        "intermediate_size": sizes.wide,
        "max_position_embeddings": 32768,
        "mm_hidden_size": sizes.vision_width,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_perceiver_depth": 3,
        "mm_perceiver_ff_mult": 4,
        "mm_perceiver_latents": packed**2,
        "mm_perceiver_latents_fast": (packed // 3) ** 2,
        "mm_perceiver_pretrained": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": "fast_slow_resampler",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"/models/siglip-so400m-patch{sizes.patch}-{sizes.image}",
        "model_type": "llava",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "num_spatial_tokens": 100,
        "num_temporal_tokens": 100,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 32768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def published_tensors(
    sizes: Sizes, mode: str, *, words: int | None = None, lape: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random weights that look as if trained in a mode.

    Args:
        words: ids before those of LLaVA-ST; default: `sizes.words`.
        lape: False: of the first stage.
    """
    words = sizes.words if words is None else words
    generator = torch.Generator().manual_seed(7)
    shapes = published_shapes(sizes, words + 8 + 6 * lape, lape)
    tensors = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    embedding = tensors["model.embed_tokens.weight"]
    embedding[words:] = embedding[:words].float().mean(0).to(dtype)
    if mode == "released":
        embedding[[words + VISUAL.index(name) for name in ("vid_start", "vid_patch", "vid_end")]] += 0.25
        if lape:
            embedding[words + 8 + TEMPLATES.index("WIDTH-INPUT")] += 0.25
        reset_fast_packer(tensors)
    return tensors


def reset_fast_packer(tensors: dict[str, Tensor]) -> None:
    """To how biases and LayerNorms are initialised."""
    for name, tensor in tensors.items():
        if ".token_packer_fast." in name:
            if name.endswith("bias"):
                tensor.zero_()
            elif ".ln_" in name:
                tensor.fill_(1)


def write_tokenizer(folder: Path, added: list[str]) -> None:
    """Qwen2's files, with bytes for words, ChatML's tokens and `added`."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + i for i in range(256 - len(letters))]
    vocabulary = {chr(letter): i for i, letter in enumerate([*letters, *shifted])}
    known = [*CHAT_TOKENS, *added]
    entries = {
        str(len(vocabulary) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(known)
    }
    settings = {
        "added_tokens_decoder": entries,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({entry["content"]: int(i) for i, entry in entries.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shards: int = 3, pickled: bool = False) -> None:
    """As transformers did: shards and their index, or, for one shard, a file alone."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = list(tensors)
    where = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}" if shards > 1 else f"{stem}.{ending}"
        part = {name: tensors[name] for name in names[i::shards]}
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    sizes: Sizes = SMALL,
    *,
    added: list[str] = [*VISUAL_TOKENS, *TEMPLATE_TOKENS, *ANCHOR_TOKENS],  # noqa: B006
    shards: int = 3,
    pickled: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    write_weights(folder, tensors, shards, pickled)
    write_tokenizer(folder, added)
    config = published_config(sizes, len(tensors["model.embed_tokens.weight"]))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_stage(
    folder: Path,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    others: Mapping[str, Tensor],
    *,
    alpha: int = 256,
    pickled: bool = True,
    **settings: object,
) -> Path:
    """What a stage of training with adapters leaves: adapted weight -> (A, B), and the other trained tensors."""
    folder.mkdir(parents=True)
    rank = next((len(a) for a, _ in adapters.values()), 1)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.05, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False, **settings}))
    pairs = {}
    for target, (a, b) in adapters.items():
        module = f"base_model.model.{target.removesuffix('.weight')}"
        pairs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if pickled:
        torch.save(pairs, folder / "adapter_model.bin")
    else:
        save_file(pairs, folder / "adapter_model.safetensors")
    torch.save({f"base_model.model.{name}": x for name, x in others.items()}, folder / "non_lora_trainables.bin")
    return folder
