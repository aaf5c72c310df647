"""What pages take as given: a folder with a small model, videos and data in it, and names that readers bring along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from llava_st.evaluation.datasets import read_dataset
from llava_st.evaluation.predictions import Prediction
from llava_st.tiny import tiny_model, tiny_processor
from torch import nn

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer
from tests.model.annotations import st_align_record, write_json
from tests.model.clips import moving_square, write_video
from tests.model.training_records import make_record, write_records

SECONDS_TO_ANSWER = 0.2  # random models do not stop by themselves


def make_folder(folder: Path) -> None:
    """Files under the names that pages use."""
    model = tiny_model()
    model.generation_config.max_time = SECONDS_TO_ANSWER
    for name in ("DIR", "OUT"):
        model.save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    for name in ("clip.mp4", "street.mp4"):
        write_video(folder / name, moving_square(10, 384, 368), rate=1)  # boxes and spans of the pages lie within
    records = [make_record(("<video>\nWhen?",), ("Never.",), id=str(number)) for number in range(404)]
    write_records(folder / "records.json", records)
    (folder / "train.yaml").write_text("datasets:\n  - json_path: records.json\n    data_folder: .\n")
    dataset = read_dataset("stvg", write_json(folder / "stvg.json", [st_align_record("stvg", "clip.mp4")]))
    lines = [Prediction(sample.index, sample.id, "I do not know.").to_line() for sample in dataset.samples]
    (folder / "stvg.jsonl").write_bytes(b"".join(lines))


def names_for(page: str) -> dict[str, Any]:
    """What the blocks of a page refer to and do not make: the prose around them says what it is."""
    if page in ("folding", "export"):
        projector = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64))
        lape = LanguageAlignedPositionalEmbedding(num_bins=100, hidden_size=64)
        packer = SpatialTemporalPacker(visual_dim=64, embed_dim=128, num_heads=8)
        names = {"projector": projector, "lape": lape, "packer": packer, "features": torch.randn(1, 1, 27, 27, 48)}
        return {**names, "tokenizer": VisualTokenizer(projector, lape, packer)}
    if page in ("prompts", "generation", "data"):
        model = tiny_model()
        model.generation_config.max_time = SECONDS_TO_ANSWER
        conversation = [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, "What happens?"]}]
        return {"model": model, "processor": tiny_processor(), "conversation": conversation}
    return {}
