"""A LLaVA-ST small enough for tests and demonstrations on any machine: random weights, and no downloads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, LlavaStConfig, anchor_tokens

if TYPE_CHECKING:
    from .modeling_llava_st import LlavaStForConditionalGeneration
    from .processing_llava_st import LlavaStProcessor

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(
    num_bins: tuple[int, int, int] = (100, 100, 100), texts: Iterable[str] = (), phrases: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens of ChatML and LLaVA-ST in the published order.

    Args:
        num_bins: how many anchors there are: temporal, height, width.
        texts: words that are in them more than once become tokens; all else is bytes.
        phrases: each becomes one token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if texts := list(texts):
        trainer = trainers.BpeTrainer(initial_alphabet=letters, min_frequency=2, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    special = [*_CHAT_TOKENS, *VISUAL_TOKENS.values(), *TEMPLATE_TOKENS.values(), *anchor_tokens(num_bins)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def tiny_config(**changes: Any) -> LlavaStConfig:
    """Pictures of 36 pixels, a 9 x 9 grid of patches, 10 frames, two layers of 64 channels.

    `changes` are arguments of `LlavaStConfig` that replace these.
    """
    vocabulary = len(tiny_tokenizer()) - 300
    ids = {name: vocabulary - 14 + i for i, name in enumerate({**VISUAL_TOKENS, **TEMPLATE_TOKENS})}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 36,
        "patch_size": 4,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    settings = {"vision_config": vision, "text_config": text, "token_ids": ids, "num_frames": 10, "packer_dim": 32}
    return LlavaStConfig(**{**settings, "packer_heads": 4, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> LlavaStForConditionalGeneration:
    """A random model in evaluation mode; the same one for the same seed and changes.

    Args:
        seed: of the weights.
        changes: of the config, see `tiny_config`.

    Returns:
        The model, on the CPU in float32.
    """
    from .modeling_llava_st import LlavaStForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaStForConditionalGeneration(tiny_config(**changes))
    tokenizer = tiny_tokenizer(model.config.num_bins)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def tiny_processor(**changes: Any) -> LlavaStProcessor:
    """The processor of `tiny_model(**changes)`.

    Args:
        changes: the model's.

    Returns:
        A processor whose tokenizer knows a few words.
    """
    from .processing_llava_st import LlavaStProcessor

    config = tiny_config(**changes)
    return LlavaStProcessor.from_config(config, tiny_tokenizer(config.num_bins))
