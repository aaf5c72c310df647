"""Reading and writing of checkpoint files: what is damaged, missing or dangerous; memory; all or nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_st.checkpoints.memory import conversion_bytes
from llava_st.checkpoints.reading import CheckpointError, TensorSpec, open_folder
from llava_st.checkpoints.writing import new_folder, write_shards
from llava_st.convert import from_published, main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .published_layout import SMALL, published_tensors, write_checkpoint, write_weights

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "b": torch.randn(5, 7).bfloat16(),
    "none": torch.empty(0, 3),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "turned": torch.randn(6, 2).T,
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in tensors.items()}


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_and_rows_are_read_as_they_were_written(tmp_path, pickled, shards):
    tensors = {name: x.contiguous() for name, x in TENSORS.items()}
    write_weights(tmp_path, tensors, shards, pickled)
    files = open_folder(tmp_path, allow_pickle=True)
    assert files.specs == specs_of(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.rows("b", [4, 0, 4]), tensors["b"][[4, 0, 4]])


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_refused_unless_it_is_allowed(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"), pickled=True)
    assert main([str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "is a pickle" in error
    assert "--allow-pickle" in error
    assert main([str(source), str(tmp_path / "out"), "--allow-pickle"]) == 0


def test_an_allowed_pickle_runs_no_program(tmp_path):
    torch.save({"x": torch.ones(2), "y": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_folder(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_folder(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ([torch.ones(2)], "expected a dict of tensors, got list"),
        ({"x": torch.ones(2), "step": 3}, "expected tensors alone, but 'step' is of type int"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, saved, problem):
    torch.save(saved, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=problem):
        open_folder(tmp_path, allow_pickle=True)


def test_a_pickle_of_the_old_kind_is_named(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch.save writes since 1.6"):
        open_folder(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path, pickled, kept):
    write_weights(tmp_path, {"x": torch.randn(100)}, 1, pickled)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{re.escape(path.name)}: is damaged"):
        open_folder(tmp_path, allow_pickle=True)


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    write_weights(tmp_path, {name: torch.ones(2) for name in "abcd"}, 2)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    edit_index(tmp_path, lambda where: where.pop("b"))
    with pytest.raises(CheckpointError, match="does not agree with the shards about b"):
        open_folder(tmp_path)
    edit_index(tmp_path, lambda where: where.update(b=shards[1], e=shards[0]))
    with pytest.raises(CheckpointError, match="does not agree with the shards about e"):
        open_folder(tmp_path)
    edit_index(tmp_path, lambda where: where.update(e="../elsewhere.safetensors"))
    with pytest.raises(CheckpointError, match=r"names of files beside it, got '\.\./elsewhere"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_folder(tmp_path)


def test_a_missing_shard_and_a_tensor_that_is_there_twice_are_named(tmp_path):
    write_weights(tmp_path, {name: torch.ones(2) for name in "abcd"}, 2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file({"a": torch.ones(2), "b": torch.ones(2), "d": torch.ones(2)}, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: a is also in .*{first.name}"):
        open_folder(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name}: no such file"):
        open_folder(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights"):
        open_folder(tmp_path)


def test_all_wrong_tensors_are_listed(tmp_path):
    tensors = published_tensors(SMALL, "released")
    missing = ["model.norm.weight", "model.vision_resampler.token_packer_slow.devide_attention.to_out.weight"]
    for name in missing:
        del tensors[name]
    tensors |= {"model.layers.2.input_layernorm.weight": torch.ones(32), "model.strange": torch.ones(1)}
    tensors["model.mm_projector.0.bias"] = torch.ones(33)
    tensors["model.spatial_width_output_embeddings.weight"] = torch.ones(99, 32)
    with pytest.raises(CheckpointError, match="6 wrong tensors") as error:
        from_published(write_checkpoint(tmp_path / "published", tensors))
    for line in [
        *(f"missing: {name}" for name in missing),
        "unexpected: model.layers.2.input_layernorm.weight",
        "unexpected: model.strange",
        "model.mm_projector.0.bias: expected shape [32], got [33]",
        "model.spatial_width_output_embeddings.weight: expected shape [100, 32], got [99, 32]",
    ]:
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.temporal_input_embeddings.weight", "missing: model.temporal_input_embeddings.weight"),
        ("model.embed_tokens.weight", "missing: model.embed_tokens.weight"),
        (
            "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
            "missing: .*patch_embedding.weight",
        ),
    ],
)
def test_a_missing_tensor_that_sizes_are_read_from_is_named(tmp_path, name, problem):
    tensors = published_tensors(SMALL, "released")
    source = write_checkpoint(tmp_path / "published", tensors)
    del tensors[name]
    for path in source.glob("model*"):
        path.unlink()
    write_weights(source, tensors)
    with pytest.raises(CheckpointError, match=problem):
        from_published(source)


# Writing ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_a_safetensors_file(tmp_path):
    write_shards(tmp_path, specs_of(TENSORS), TENSORS.get)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 100, 101, 250, 10_000])
def test_shards_are_as_large_as_they_may_be(tmp_path, limit):
    tensors = {str(i): torch.full((25,), i, dtype=torch.float32) for i in range(7)}
    paths = write_shards(tmp_path, specs_of(tensors), tensors.get, limit)
    per_shard = max(limit // 100, 1)
    assert [len(load_file(path)) for path in paths] == [min(per_shard, 7 - i) for i in range(0, 7, per_shard)]
    files = open_folder(tmp_path)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())
    if len(paths) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 700
        assert sorted(set(index["weight_map"].values())) == [path.name for path in paths]


def test_a_tensor_that_is_not_what_was_announced_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="x: expected"):
        write_shards(tmp_path, {"x": TensorSpec((2,), torch.float32)}, lambda _: torch.ones(3))


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"))
    conversion = from_published(source)
    read = conversion.tensors.read

    def fail(name):
        if name == "lm_head.weight":
            raise OSError("the disk broke")
        return read(name)

    monkeypatch.setattr(conversion.tensors, "read", fail)
    with pytest.raises(OSError, match="broke"):
        conversion.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_what_is_there_already_is_not_overwritten(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "published", published_tensors(SMALL, "released"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("only copy")
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "thesis.txt").unlink()
    assert main([str(source), str(tmp_path / "out")]) == 0


def test_a_disk_without_room_is_noticed_first(tmp_path):
    with pytest.raises(OSError, match="needs 10,000,000,000,000,000 bytes"), new_folder(tmp_path / "out", 10**16):
        pass
    assert list(tmp_path.iterdir()) == []


# Memory -------------------------------------------------------------------------------------------------------------

CONVERT = """
import sys
from pathlib import Path
from llava_st.convert import back_to_published, from_published

def resident(line):
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024

small, source, out, limit = sys.argv[1:]
from_published(Path(small), allow_pickle=True).save(Path(out, "warm"))  # imports, caches
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of imports
before = resident("VmRSS")
from_published(Path(source), allow_pickle=True).save(Path(out, "ours"), int(limit))
back_to_published(Path(out, "ours"), Path(out, "back"), int(limit))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_conversion_needs_the_memory_of_a_shard_and_a_tensor(tmp_path, pickled):
    """Of 150 MB in 8 shards; one copy of all would be twice the bound."""
    tensors = published_tensors(SMALL, "released")
    small = write_checkpoint(tmp_path / "small", tensors)
    # Wide layers alone are large.
    wide = dict(tensors)
    rows = 400_000
    for i in range(SMALL.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = torch.zeros(rows, SMALL.width, dtype=torch.bfloat16)
            wide[f"model.layers.{i}.mlp.{name}.weight"] = weight.T.contiguous() if name == "down_proj" else weight
    source = write_checkpoint(tmp_path / "large", wide, shards=8, pickled=pickled)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": rows}))
    sizes = [path.stat().st_size for path in source.glob("*-of-*")]
    largest = max(tensor.nbytes for tensor in wide.values())
    arguments = [small, source, tmp_path, str(largest * 2)]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    assert sum(sizes) > 2 * (max(sizes) + largest)
    # A mapped pickle stays so until the next one.
    bound = max(sizes) + largest if pickled else conversion_bytes(specs_of(wide), adapted=False) + 16_000_000
    assert largest / 2 < int(done.stdout) < bound
