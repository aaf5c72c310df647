"""`python -m llava_st.train`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from llava_st import LlavaStForConditionalGeneration
from llava_st.synthesis import synthesize
from llava_st.tiny import tiny_model, tiny_processor
from llava_st.train import main
from PIL import Image
from safetensors.torch import load_file

FAST = ["bf16=false", "gradient_checkpointing=false", "workers=0", "log_steps=1", "batch_size=2", "accumulation=1"]


@pytest.fixture
def data(tmp_path):
    """Eight records: questions about a picture, and about nothing."""
    Image.fromarray(np.zeros((36, 36, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    records = []
    for i in range(8):
        turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "yes " * (i + 1)}]
        record = {"id": str(i), "conversations": turns, "type": "words"}
        if i % 2:
            turns[0]["value"], record["image"], record["type"] = "<image>\nWhere?", "a.png", "picture"
        records.append(record)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def packer(folder):
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if ".packer." in k}


def test_stages_follow_one_another(tmp_path, data, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--data", str(data), "--packer-between-stages", "keep", "--set", *FAST]
    assert main(["content", "--model", "tiny", "--out", str(first), *options, "max_steps=2", "save_steps=1"]) == 0
    assert "content alignment: 65,088 of" in capsys.readouterr().out
    assert main(["coordinates", "--model", str(first / "model"), "--out", str(second), *options, "lora_rank=2"]) == 0
    model = LlavaStForConditionalGeneration.from_pretrained(second / "model")
    assert model.model.lape is not None
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    # Pictures are not packed, so that no gradient moves the packer: it was kept.
    before, after = packer(first / "model"), packer(second / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["content", "--model", "tiny", "--out", str(first), *options]) == 1
    assert "the stage is done" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was(tmp_path, data, capsys):
    out = tmp_path / "out"
    options = ["content", "--model", "tiny", "--out", str(out), "--data", str(data), "--set", *FAST, "save_steps=1"]
    assert main(options) == 0
    expected = load_file(out / "model/model.safetensors")
    counts = json.loads((out / "checkpoint-4/training.json").read_text())["failures"]
    assert counts == [{"seen": 8, "skipped": 0}]  # of each process
    (out / "model").rename(tmp_path / "moved")
    (out / "checkpoint-4" / "weights.safetensors").write_bytes(b"")
    assert main([*options, "learning_rate=1e-3"]) == 1
    assert "learning_rate: the run in" in capsys.readouterr().err
    other = tiny_model(lape=False)
    with torch.no_grad():
        other.model.vision_tower.get_parameter("embeddings.patch_embedding.bias")[0] += 1  # does not train
    other.save_pretrained(tmp_path / "other")
    tiny_processor().save_pretrained(tmp_path / "other")
    assert main([*options[:2], str(tmp_path / "other"), *options[3:]]) == 1
    assert "model_fingerprint: the run in" in capsys.readouterr().err
    assert main([*options, "log_steps=2"]) == 0
    assert "goes on from" in capsys.readouterr().out
    found = load_file(out / "model/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_settings_may_be_given_one_by_one(tmp_path, data):
    arguments = ["content", "--model", "tiny", "--out", str(tmp_path), "--data", str(data), "--set", *FAST]
    assert main([*arguments, "--set", "max_steps=1", "--set", "seed=7"]) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [settings[name] for name in ("bf16", "max_steps", "seed")] == [False, 1, 7]


def test_a_packer_that_does_not_train_is_not_reset(tmp_path, data):
    arguments = ["content", "--model", "tiny", "--data", str(data), "--set", *FAST, "max_steps=1"]
    left = tmp_path / "out" / "model.partial-left"
    left.mkdir(parents=True)
    assert main([*arguments, "train=[embedding]", "--out", str(tmp_path / "out")]) == 0
    expected = tiny_model(42, lape=False).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in packer(tmp_path / "out/model").items())
    assert not left.exists()  # of a process that was killed while it wrote


def test_what_is_wrong_is_said_in_a_line(tmp_path, data, capsys):
    arguments = ["content", "--model", "tiny", "--out", str(tmp_path / "out"), "--data", str(data)]
    assert main([*arguments, "--set", "deepspeed=zero2.json"]) == 1
    assert main([*arguments, "--evaluate", "llava_st.nothing:here"]) == 1
    assert main([*arguments, "--set", "sharding=fsdp2", "bf16=false"]) == 1
    records = json.loads(data.read_text())
    records[3]["image"] = "missing.png"
    data.write_text(json.dumps(records))
    assert main([*arguments, "--set", *FAST]) == 1
    assert main([*arguments, "--deepspeed", "zero2.json"]) == 1
    assert main([*arguments, "--evaluate", "stvg=missing.json"]) == 1
    assert main([*arguments, "--evaluate", f"here={data}"]) == 1
    assert main([*arguments, "--evaluate", "os:getpid", "os:getppid"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(lines) == 8
    assert "FSDP2" in lines[0]
    assert "torchrun" in lines[2]
    assert "max_failure_share" in lines[3]
    assert "FSDP2" in lines[4]
    assert "missing.json" in lines[5]
    assert "expected one of" in lines[6]
    assert "one module:function" in lines[7]


def test_without_data_clips_are_rendered_and_tensorboard_is_told(tmp_path):
    """What the training extra brings is there, and used."""
    arguments = ["content", "--model", "tiny", "--out", str(tmp_path), "--clips", "2", "--set", *FAST, "max_steps=1"]
    assert main(arguments) == 0
    assert len(list((tmp_path / "data" / "videos").glob("*.mp4"))) == 2
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "training.png").exists()
    assert list(tmp_path.glob("runs/**/events.*"))


def test_clips_of_a_call_that_failed_are_not_taken_for_those_asked_for(tmp_path):
    arguments = ["content", "--out", str(tmp_path), "--set", *FAST, "max_steps=1"]
    assert main([*arguments, "--model", str(tmp_path / "missing"), "--clips", "1"]) == 1
    assert main([*arguments, "--model", "tiny", "--clips", "2"]) == 0
    assert len(list((tmp_path / "data" / "videos").glob("*.mp4"))) == 2


def test_benchmarks_are_scored_on_the_way(tmp_path, data):
    clips = tmp_path / "clips"
    synthesize(clips, 2, split="validation")
    files = [f"{task}={clips / 'benchmark' / f'{task}.json'}" for task in ("rec", "tvg")]
    arguments = ["content", "--model", "tiny", "--out", str(tmp_path / "out"), "--data", str(data)]
    arguments += ["--evaluate", *files, "--evaluate-media", str(clips), "--evaluate-limit", "1"]
    assert main([*arguments, "--set", *FAST, "max_steps=2", "eval_steps=1", "save_steps=2"]) == 0
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    scored = [entry["step"] for entry in history if "eval/rec Acc@0.5" in entry and "eval/tvg mIoU" in entry]
    assert scored == [1, 2]
