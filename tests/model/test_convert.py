"""Conversion of published checkpoints and back, and how the mode is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_st import LlavaStForConditionalGeneration
from llava_st.checkpoints.reading import CheckpointError, open_folder
from llava_st.checkpoints.tokens import load_tokenizer
from llava_st.convert import back_to_published, from_published, main
from llava_st.processing_llava_st import LlavaStProcessor
from torch import Tensor
from transformers import AutoTokenizer

from .published_layout import (
    ANCHOR_TOKENS,
    SMALL,
    TABLES,
    TEMPLATE_TOKENS,
    TEMPLATES,
    VISUAL,
    VISUAL_TOKENS,
    published_config,
    published_tensors,
    reset_fast_packer,
    write_checkpoint,
)

EMBEDDING = "model.embed_tokens.weight"
FAST = "model.vision_resampler.token_packer_fast.devide_attention."


def row(token: str, words: int = SMALL.words) -> int:
    return words + [*VISUAL_TOKENS, *TEMPLATE_TOKENS].index(token)


def contents(folder: Path) -> dict[str, Tensor]:
    files = open_folder(folder)
    return {name: files.read(name) for name in files.specs}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("released") / "published", published_tensors(SMALL, "released"))


@pytest.fixture(scope="module")
def converted(released) -> Path:
    out = released.parent / "converted"
    from_published(released).save(out, max_shard_bytes=20_000)
    return out


# There and back -----------------------------------------------------------------------------------------------------


def test_there_and_back_is_bitwise_the_same(released, converted, tmp_path):
    back_to_published(converted, tmp_path / "back")
    assert_same(contents(tmp_path / "back"), published_tensors(SMALL, "released"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "back"))
    assert after == {**before, "llava_st_compat": "released"}
    one, other = (load_tokenizer(folder).get_vocab() for folder in (released, tmp_path / "back"))
    assert one == other


def test_a_converted_checkpoint_loads_and_every_weight_is_where_it_belongs(converted):
    model, info = LlavaStForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.compat == "released"
    assert model.dtype == torch.bfloat16
    published = published_tensors(SMALL, "released")
    # The modules of the ops know the published names themselves.
    packer, lape = model.model.visual_tokenizer.packer, model.model.lape
    ours = [module.state_dict() for module in (packer, lape)]
    state = {name: tensor.float() for name, tensor in published.items()}
    resampler = "model.vision_resampler."
    packer.load_state_dict({n.removeprefix(resampler): t for n, t in state.items() if n.startswith(resampler)})
    lape.load_state_dict({name: state[name] for name in TABLES})
    for module, before in zip((packer, lape), ours, strict=True):
        assert_same(module.state_dict(), before)
    for name, module in {
        "model.mm_projector.0.bias": model.model.visual_tokenizer.projector[0].bias,
        "model.mm_projector.2.weight": model.model.visual_tokenizer.projector[2].weight,
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.weight": (
            model.model.vision_tower.encoder.layers[1].self_attn.out_proj.weight
        ),
        "model.layers.1.mlp.down_proj.weight": model.model.language_model.layers[1].mlp.down_proj.weight,
        EMBEDDING: model.get_input_embeddings().weight,
        "lm_head.weight": model.lm_head.weight,
    }.items():
        assert torch.equal(module, published[name]), name


def test_the_config_says_what_the_shapes_say(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlavaStForConditionalGeneration"]
    assert config["num_bins"] == [100, 100, 100]
    assert (config["spatial_factor"], config["fast_factor"], config["packer_dim"]) == (3, 3, 16)
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["token_ids"]["width_output"] == row("<WIDTH-OUTPUT>")


def test_a_model_that_was_never_published_has_a_published_form(converted, tmp_path):
    """Without the config.json that was kept."""
    (tmp_path / "ours").mkdir()
    for path in converted.iterdir():
        if path.is_file():
            (tmp_path / "ours" / path.name).symlink_to(path)
    back_to_published(tmp_path / "ours", tmp_path / "back")
    again = from_published(tmp_path / "back")
    assert again.config.to_dict() == from_published(tmp_path / "back", compat="released").config.to_dict()
    assert again.config.text_config.rope_parameters["rope_theta"] == 1e6
    assert_same(contents(tmp_path / "back"), published_tensors(SMALL, "released"))


def test_pickled_shards_are_the_same_checkpoint(tmp_path, converted):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"), pickled=True)
    from_published(source, allow_pickle=True).save(tmp_path / "out")
    assert_same(contents(tmp_path / "out"), contents(converted))


def test_tensors_without_a_part_in_the_model_come_back(tmp_path):
    tensors = published_tensors(SMALL, "released")
    tensors["model.image_newline"] = torch.randn(SMALL.width).bfloat16()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
    conversion = from_published(write_checkpoint(tmp_path / "published", tensors))
    assert "kept aside: model.image_newline, model.layers.0.self_attn.rotary_emb.inv_freq" in conversion.report
    conversion.save(tmp_path / "out")
    assert not any("newline" in name or "rotary" in name for name in contents(tmp_path / "out"))
    back_to_published(tmp_path / "out", tmp_path / "back")
    assert_same(contents(tmp_path / "back"), tensors)


def test_a_first_stage_has_no_positions_and_gets_rows_for_what_comes(tmp_path):
    tensors = published_tensors(SMALL, "released", lape=False)
    conversion = from_published(write_checkpoint(tmp_path / "published", tensors, added=VISUAL_TOKENS))
    assert not conversion.config.lape
    assert conversion.config.vocab_size == SMALL.words + 14
    assert f"tokens added: 306, <TEMP-INPUT> to {ANCHOR_TOKENS[-1]}" in conversion.report
    conversion.save(tmp_path / "out")
    model = LlavaStForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.model.lape is None
    for name, got in ((EMBEDDING, model.get_input_embeddings().weight), ("lm_head.weight", model.lm_head.weight)):
        assert torch.equal(got[:-6], tensors[name])
        assert torch.equal(got[-6:], tensors[name].double().mean(0, keepdim=True).bfloat16().expand(6, -1))


# Tokens -------------------------------------------------------------------------------------------------------------


def test_lacking_tokens_are_added_in_the_published_order(tmp_path):
    tensors = published_tensors(SMALL, "released")
    conversion = from_published(
        write_checkpoint(tmp_path / "published", tensors, added=[*VISUAL_TOKENS, *TEMPLATE_TOKENS])
    )
    ids = conversion.tokenizer.convert_tokens_to_ids([*VISUAL_TOKENS, *TEMPLATE_TOKENS, *ANCHOR_TOKENS])
    assert ids == [*range(SMALL.words, SMALL.words + 314)]
    assert conversion.config.vocab_size == ids[14]
    conversion.save(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.convert_tokens_to_ids(["<TEMP-000>", "<WIDTH-099>"]) == [ids[14], ids[-1]]
    assert saved("<t><WIDTH-099>\n<|im_end|>").input_ids[-3:] == [ids[-1], 198, 258]


def test_a_tokenizer_with_an_image_token_shifts_all_ids(tmp_path):
    tensors = published_tensors(SMALL, "released", words=SMALL.words + 1)
    added = ["<image>", *VISUAL_TOKENS, *TEMPLATE_TOKENS]
    conversion = from_published(write_checkpoint(tmp_path / "published", tensors, added=added))
    assert conversion.config.token_ids["im_start"] == SMALL.words + 1
    assert conversion.config.vocab_size == SMALL.words + 15


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        ([*VISUAL_TOKENS, "<other>", *TEMPLATE_TOKENS], "id of <TEMP-000> must be the number of rows .* 273, got 274"),
        ([*VISUAL_TOKENS, *TEMPLATE_TOKENS[:-1]], "some template tokens, but lacks <WIDTH-OUTPUT>"),
        ([*VISUAL_TOKENS, *TEMPLATE_TOKENS, ANCHOR_TOKENS[1], ANCHOR_TOKENS[0]], "<TEMP-000> .* 273, got 274"),
        (
            [*VISUAL_TOKENS, *TEMPLATE_TOKENS, ANCHOR_TOKENS[0], "<x>", *ANCHOR_TOKENS[1:]],
            "id of <TEMP-001> must be 274, got 275",
        ),
        (["<x>", *VISUAL_TOKENS[1:], *TEMPLATE_TOKENS, *ANCHOR_TOKENS], "im_start: .* id 573 is beyond .* 273 rows"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(tmp_path, added, problem):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"), added=added)
    with pytest.raises(CheckpointError, match=problem):
        from_published(source)


# The mode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("lape", [True, False])
def test_the_mode_is_found(tmp_path, mode, lape):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, mode, lape=lape), added=_added(lape))
    conversion = from_published(source)
    assert conversion.config.compat == mode
    assert [finding.mode for finding in conversion.findings] == [mode] * (3 if lape else 2)


def _added(lape: bool) -> list[str]:
    return [*VISUAL_TOKENS, *(TEMPLATE_TOKENS if lape else [])]


def train_fast(tensors):
    tensors[f"{FAST}ln_k.bias"] += 0.1


def train_all_of_fast_but_norm_weights(tensors):
    """In bf16 a small change of a weight of 1 is lost."""
    for name, tensor in tensors.items():
        if name.startswith(FAST) and name.endswith("bias"):
            tensor += 0.01


def train_width(tensors):
    tensors[EMBEDDING][row("<WIDTH-INPUT>")] += 0.1


def train_height(tensors):
    tensors[EMBEDDING][row("<HEIGHT-INPUT>")] += 0.1


def train_placeholder(tensors):
    tensors[EMBEDDING][row("<vid_patch>")] += 0.1


def forget_placeholder(tensors):
    tensors[EMBEDDING][row("<vid_patch>")] = tensors[EMBEDDING][row("<im_patch>")]


def scale_norm(tensors):
    tensors[f"{FAST}ln_q.weight"][3] = 1.01


@pytest.mark.parametrize(
    ("mode", "change", "findings"),
    [
        ("released", train_fast, [None, "released", "released"]),
        ("released", scale_norm, [None, "released", "released"]),
        ("released", train_all_of_fast_but_norm_weights, ["paper", "released", "released"]),
        ("released", train_height, ["released", None, "released"]),
        ("released", forget_placeholder, ["released", "released", "paper"]),
        ("paper", train_width, ["paper", "released", "paper"]),
        ("paper", train_height, ["paper", None, "paper"]),
        ("paper", train_placeholder, ["paper", "paper", "released"]),
        ("paper", reset_fast_packer, ["released", "paper", "paper"]),
    ],
)
def test_mixed_findings_stop_with_a_report_unless_a_mode_is_asked_for(tmp_path, mode, change, findings, capsys):
    tensors = published_tensors(SMALL, mode)
    change(tensors)
    source = write_checkpoint(tmp_path / "published", tensors)
    assert main([str(source), str(tmp_path / "out")]) == 1
    report = capsys.readouterr().err
    assert "do not agree" in report
    assert [line.split(":")[0].strip() for line in report.splitlines()[1:4]] == [f or "neither" for f in findings]
    assert "--compat" in report
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    for asked in ("released", "paper"):
        conversion = from_published(source, compat=asked)
        assert conversion.config.compat == asked
        assert f"{asked!r} was asked for" in conversion.report


def test_norm_weights_that_stayed_one_are_no_sign_where_all_biases_changed(tmp_path):
    tensors = published_tensors(SMALL, "paper")
    for x in "qkv":
        tensors[f"{FAST}ln_{x}.weight"].fill_(1)
    assert from_published(write_checkpoint(tmp_path / "published", tensors)).config.compat == "paper"


def test_a_stored_mode_is_believed(tmp_path):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"))
    config = published_config(SMALL, SMALL.words + 14)
    (source / "config.json").write_text(json.dumps({**config, "llava_st_compat": "paper"}))
    assert from_published(source).config.compat == "paper"
    (source / "config.json").write_text(json.dumps({**config, "llava_st_compat": "mine"}))
    with pytest.raises(CheckpointError, match="llava_st_compat: expected 'released' or 'paper', got 'mine'"):
        from_published(source)


def test_an_upgrade_names_what_is_untrained(released, tmp_path):
    conversion = from_published(released, upgrade=True)
    assert conversion.config.compat == "paper"
    fast = [name for name in published_tensors(SMALL, "released") if name.startswith(FAST)]
    assert f"all {len(fast)} tensors of the fast packer" in conversion.report
    assert conversion.report.count("model.visual_tokenizer.packer.fast.") == len(fast)
    assert "<WIDTH-INPUT>" in conversion.report
    conversion.save(tmp_path / "out")
    assert LlavaStForConditionalGeneration.from_pretrained(tmp_path / "out").config.compat == "paper"
    paper = write_checkpoint(tmp_path / "paper", published_tensors(SMALL, "paper"))
    with pytest.raises(CheckpointError, match="already"):
        from_published(paper, upgrade=True)


def test_the_processor_is_converted_too(converted):
    processor = LlavaStProcessor.from_pretrained(converted)
    content = [{"type": "text", "text": "Where?"}, {"type": "instant", "time": 0.5, "unit": "fraction"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    at = inputs["input_ids"][0].tolist().index(row("<TEMP-INPUT>"))
    assert inputs["positions"][0, at] == 0.5
    assert processor.first_anchor == SMALL.words + 14


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_converts_and_comes_back(released, tmp_path):
    run = [sys.executable, "-m", "llava_st.convert"]
    done = subprocess.run([*run, released, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert "compat = 'released'" in done.stdout
    assert main(["--to-published", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert_same(contents(tmp_path / "back"), published_tensors(SMALL, "released"))


def test_a_dry_run_checks_and_writes_nothing(released, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["--dry-run", str(released)]) == 0
    printed = capsys.readouterr().out
    assert "compat = 'released'" in printed
    assert "KV cache" in printed
    assert sorted(tmp_path.iterdir()) == before
    broken = published_tensors(SMALL, "released")
    del broken["model.norm.weight"]
    assert main(["--dry-run", str(write_checkpoint(tmp_path / "broken", broken))]) == 1
    assert "missing: model.norm.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["source"],
        ["--dry-run", "source", "out"],
        ["--merge", "--compat", "paper", "source", "out"],
        ["--to-published", "--lora", "x", "source", "out"],
        ["--to-published", "--merge", "source", "out"],
        ["--max-shard-size", "0", "source", "out"],
        ["--compat", "both", "source", "out"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "usage" in capsys.readouterr().err


def test_the_layouts_are_not_mixed_up(released, converted, tmp_path, capsys):
    assert main(["--to-published", str(released), str(tmp_path / "out")]) == 1
    assert "model_type: expected 'llava_st', got 'llava'" in capsys.readouterr().err
    assert main(["--merge", str(released), str(tmp_path / "out")]) == 1
    assert main([str(converted), str(tmp_path / "out")]) == 1
    assert "expected ['LlavaQwenForCausalLM']" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "config.json: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_template_tokens_are_in_the_published_order():
    assert [name.replace("-", "_").lower().replace("temp", "temporal") for name in TEMPLATES] == [
        f"{axis}_{side}" for axis in ("temporal", "height", "width") for side in ("input", "output")
    ]
    assert len(VISUAL) == 8
