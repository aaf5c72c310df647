"""A plain causal language model that has anchors as ordinary rows of its embedding and head."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding

from ..configuration_llava_st import LlavaStConfig
from ..modeling_llava_st import LlavaStForConditionalGeneration
from .names import HEAD, OUR_EMBEDDING, OUR_TABLES, to_language_model
from .reading import CheckpointError, TensorSpec, WeightFiles, open_folder
from .skeleton import check_shapes, expected_shapes, load_config, skeleton
from .tokens import load_tokenizer
from .writing import MAX_SHARD_BYTES, new_folder, write_shards


def merge(model: LlavaStForConditionalGeneration) -> PreTrainedModel:
    """The language model of `model` with anchors as rows V, V + 1, ... of embedding and head, which are not tied.

    Given `inputs_embeds` as `model.model.embed` makes them, it generates what `model` does. Embedding and head are new;
    the weights of the layers are shared with `model`.

    Args:
        model: with positions.

    Returns:
        The language model, whose vocabulary has the anchors as its last words.

    Raises:
        ValueError: the model has no positions (it is of the first training stage).
    """
    lape = _lape(model.model.lape)
    with torch.no_grad():
        matrices = lape.merge(model.get_input_embeddings().weight, model.lm_head.weight)
    inner = model.model.language_model
    # A copy of modules and config, not of tensors.
    body = copy.deepcopy(inner, {id(tensor): tensor for tensor in chain(inner.parameters(), inner.buffers())})
    _widen(body.config, model.config)
    embedding, head = (nn.Parameter(matrix, requires_grad=False) for matrix in matrices)
    words = body.get_input_embeddings()
    words.weight, words.num_embeddings = embedding, len(embedding)
    with torch.device("meta"):
        merged = AutoModelForCausalLM.from_config(copy.deepcopy(body.config))
    merged.config = body.config
    setattr(merged, merged.base_model_prefix, body)
    merged.get_output_embeddings().weight = head
    merged.generation_config = copy.deepcopy(model.generation_config)
    return merged.train(model.training)


def merge_checkpoint(source: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """`merge` for a checkpoint of ours, tensor by tensor, and its tokenizer."""
    config = load_config(source)
    tensors = open_folder(source)
    model = skeleton(config)
    check_shapes(tensors.specs, expected_shapes(model))
    _lape(model.model.lape)
    text = _widen(copy.deepcopy(config.text_config), config)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(text))
    text.architectures, text.dtype = [type(plain).__name__], config.dtype
    rows = _MergedRows(tensors, config, plain.base_model_prefix)
    check_shapes(rows.specs, expected_shapes(plain))
    generation = model.generation_config
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    with new_folder(out, sum(spec.nbytes for spec in rows.specs.values())) as folder:
        write_shards(folder, rows.specs, rows.read, max_shard_bytes)
        text.save_pretrained(folder)
        generation.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)


class _MergedRows:
    """The tensors of a plain language model, under its names, read from a checkpoint of ours."""

    def __init__(self, tensors: WeightFiles, config: LlavaStConfig, prefix: str) -> None:
        self._tensors, self._config = tensors, config
        self._ours = {
            new: ours for ours in tensors.specs if (new := to_language_model(ours, prefix)) not in (None, HEAD)
        }
        self._embedding = to_language_model(OUR_EMBEDDING, prefix)
        self._ours[HEAD] = OUR_EMBEDDING if config.tie_word_embeddings else HEAD
        self.specs: dict[str, TensorSpec] = {new: tensors.specs[ours] for new, ours in self._ours.items()}
        rows = config.vocab_size + sum(config.num_bins)
        for name in (self._embedding, HEAD):
            spec = self.specs[name]
            self.specs[name] = TensorSpec((rows, *spec.shape[1:]), spec.dtype)

    def read(self, name: str) -> Tensor:
        tensor = self._tensors.read(self._ours[name])
        if name == HEAD:
            return self._tables().extend_head(tensor)
        return self._tables().merge(tensor, tensor[:0])[0] if name == self._embedding else tensor

    @torch.no_grad()
    def _tables(self) -> LanguageAlignedPositionalEmbedding:
        width = self._config.text_config.hidden_size
        with torch.device("meta"):
            lape = LanguageAlignedPositionalEmbedding(self._config.num_bins, width, compat=self._config.compat)
        weights = {name: self._tensors.read(OUR_TABLES + name) for name in lape.state_dict()}
        lape.load_state_dict(weights, assign=True)
        return lape.requires_grad_(False)


def _lape(lape: LanguageAlignedPositionalEmbedding | None) -> LanguageAlignedPositionalEmbedding:
    if lape is None:
        raise CheckpointError("a model of the first training stage (config.lape is False) has no anchors to merge")
    return lape


def _widen(text: PreTrainedConfig, config: LlavaStConfig) -> PreTrainedConfig:
    """Gives a language model's config, which is changed in place, the rows of anchors."""
    text.vocab_size = config.vocab_size + sum(config.num_bins)
    text.tie_word_embeddings = False
    return text
