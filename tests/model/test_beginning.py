"""LLaVA-OneVision as the beginning of the first stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llava_st import LlavaStForConditionalGeneration
from llava_st.checkpoints.reading import open_folder
from llava_st.convert import back_to_published, from_published, main
from llava_st.train import main as train
from safetensors.torch import load_file

from .published_layout import SMALL, VISUAL_TOKENS, published_tensors, write_checkpoint
from .training_records import make_record, write_records

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
PADDING = 5  # rows of the embedding that no token has


def write_onevision(folder: Path, added: list[str] | None = None, packer: bool = False) -> Path:
    """The published layout without packers, tables and tokens of LLaVA-ST, with rows to spare."""
    tensors = published_tensors(SMALL, "paper", lape=False)
    tensors = {name: x for name, x in tensors.items() if packer or "vision_resampler" not in name}
    for name in ROWS:
        tensors[name] = tensors[name][: SMALL.words].clone()
        tensors[name] = torch.cat([tensors[name], torch.full((PADDING, SMALL.width), 9.0).bfloat16()])
    write_checkpoint(folder, tensors, added=added or [])
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    lacking = {key for key in settings if key.startswith(("mm_perceiver", "mm_resampler", "num_"))} - {
        key for key in settings if key.startswith(("num_attention", "num_hidden", "num_key"))
    }
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in lacking}))
    return folder


@pytest.fixture
def onevision(tmp_path):
    return write_onevision(tmp_path / "onevision")


def test_what_is_there_stays_and_what_is_new_is_as_initialised(onevision, tmp_path, capsys):
    assert main([str(onevision), str(tmp_path / "out"), "--new-packer", "--seed", "3"]) == 0
    assert "packer: new, seed 3; rows added: 8 for visual tokens" in capsys.readouterr().out
    model, info = LlavaStForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.compat == "paper"
    assert model.model.lape is None
    published = open_folder(onevision)
    embedding = model.get_input_embeddings().weight
    words = published.read(ROWS[0])[: SMALL.words]
    assert torch.equal(embedding[: SMALL.words], words)
    mean = words.double().mean(0).bfloat16()
    new = embedding[SMALL.words : SMALL.words + len(VISUAL_TOKENS)]
    assert torch.equal(new, mean.expand_as(new))
    assert len(embedding) == SMALL.words + 8 + 6
    assert torch.equal(model.model.visual_tokenizer.projector[0].weight, published.read("model.mm_projector.0.weight"))
    packer = model.model.visual_tokenizer.packer.spatial
    assert not packer.key_mlp[0].bias.count_nonzero()
    assert 0.015 < packer.key_mlp[0].weight.float().std() < 0.025


def test_the_seed_is_that_of_the_packer(onevision):
    name = "model.vision_resampler.token_packer.devide_attention.to_k.0.weight"
    first, again, other = (from_published(onevision, new_packer=seed).tensors.read(name) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_first_stage_begins_with_it(onevision, tmp_path):
    from_published(onevision, new_packer=0).save(tmp_path / "start")
    # Two steps: the rate of the first is 0.
    records = [make_record(("Hello?",), ("Yes.",), id=str(number), video=None) for number in range(4)]
    data = write_records(tmp_path / "data.json", records)
    arguments = ["content", "--model", str(tmp_path / "start"), "--out", str(tmp_path / "run"), "--data", str(data)]
    settings = ["bf16=false", "gradient_checkpointing=false", "workers=0", "batch_size=2", "accumulation=1"]
    assert train([*arguments, "--set", *settings]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run/model"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert "model.language_model.embed_tokens.weight" in changed
    assert not any("layers" in name for name in changed)


def test_it_goes_back_to_the_published_layout(onevision, tmp_path):
    from_published(onevision, new_packer=0).save(tmp_path / "start")
    back_to_published(tmp_path / "start", tmp_path / "back")
    again = from_published(tmp_path / "back")
    assert again.config.compat == "paper"
    assert again.tensors.specs.keys() == from_published(onevision, new_packer=0).tensors.specs.keys()


def test_what_cannot_begin(tmp_path, onevision, capsys):
    tokens = write_onevision(tmp_path / "tokens", added=VISUAL_TOKENS[:1])
    packer = write_onevision(tmp_path / "packer", packer=True)
    few = tmp_path / "few"
    write_onevision(few, added=[f"<more-{i}>" for i in range(PADDING + 1)])
    for source, message in (
        (tokens, "the tokenizer has <im_start> already"),
        (packer, "has a packer already"),
        (few, "expected rows for the tokenizer's 265 tokens, got 264"),
    ):
        assert main([str(source), str(tmp_path / "out"), "--new-packer"]) == 1
        assert message in capsys.readouterr().err
    assert main([str(onevision), str(tmp_path / "out")]) == 1  # only where it is asked for
    with pytest.raises(SystemExit):
        main([str(onevision), str(tmp_path / "out"), "--new-packer", "--lora", "x"])
    assert not (tmp_path / "out").exists()
