"""The published model, LLaVA-ST-Qwen2-7B, in numbers."""

from __future__ import annotations

from transformers import Qwen2Config

from ..configuration_llava_st import LlavaStConfig

# Words, ChatML and the tokens of LLaVA-ST, without anchors: 151,646 of Qwen2's tokenizer, 8 visual, 6 template tokens.
VOCAB_SIZE = 151_660


def full_size_config() -> LlavaStConfig:
    """The config of the published model, for a tokenizer without `<image>` (one that has it shifts LLaVA-ST's ids by
    one)."""
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,  # of 27: the last one is never used
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return LlavaStConfig(text_config=text, vision_config=vision, compat="released", dtype="bfloat16")
