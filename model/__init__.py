"""LLaVA-ST itself, a thin consumer of llava_st_ops. Installed under the import name `llava_st`.

Importing it makes LLaVA-ST known to the Auto classes of transformers, where that is installed
(`pip install llava_st_ops[model]`); reading videos does without.
"""

from __future__ import annotations

import importlib.util

__all__: list[str] = []

if importlib.util.find_spec("transformers") is not None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_llava_st import LlavaStConfig
    from .modeling_llava_st import LlavaStForConditionalGeneration, LlavaStModel
    from .pipeline import LlavaStPipeline
    from .processing_llava_st import LlavaStProcessor

    AutoConfig.register("llava_st", LlavaStConfig)
    AutoProcessor.register(LlavaStConfig, LlavaStProcessor)
    AutoModel.register(LlavaStConfig, LlavaStModel)
    AutoModelForImageTextToText.register(LlavaStConfig, LlavaStForConditionalGeneration)
    __all__ += [
        "LlavaStConfig",
        "LlavaStForConditionalGeneration",
        "LlavaStModel",
        "LlavaStPipeline",
        "LlavaStProcessor",
    ]
