"""Checkpoints from the published layout to this one, back, and to plain language models: `python -m llava_st.convert`.

Tensors are read and written one at a time. What is written appears under its name when it is complete, or not at all.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .checkpoints import memory
from .checkpoints.beginning import begin
from .checkpoints.evidence import Finding, conclude, describe, examine
from .checkpoints.lora import Adapted, GrownRows
from .checkpoints.merge import merge_checkpoint
from .checkpoints.names import EMBEDDING, HEAD, is_unused, to_ours, to_published
from .checkpoints.published import full_size_config
from .checkpoints.reading import CheckpointError, Tensors, WeightFiles, open_folder, read_json
from .checkpoints.settings import (
    MODE,
    packer_settings,
    read_config,
    read_num_bins,
    read_published,
    vocab_size,
    write_config,
)
from .checkpoints.skeleton import check_shapes, expected_shapes, load_config, skeleton
from .checkpoints.tokens import add_tokens, lacks_templates, load_tokenizer, read_token_ids, tokenizer_files
from .checkpoints.writing import MAX_SHARD_BYTES, new_folder, write_json, write_safetensors, write_shards
from .configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, LlavaStConfig

# In a converted checkpoint: the published config.json, and tensors that are no part of the model, for the way back.
_KEPT, _UNUSED = "published", "unused.safetensors"
_TURN_END = "<|im_end|>"


@dataclass
class Conversion:
    """What a published checkpoint becomes.

    Attributes:
        config: of the model.
        tokenizer: with all tokens of LLaVA-ST.
        tensors: published names, read when they are asked for.
        published: the checkpoint's `config.json`.
        findings: what the weights say about how they were trained.
        notes: what a user should know, a line each.
    """

    config: LlavaStConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: Tensors
    published: dict
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> str:
        lines = [f"compat = {self.config.compat!r}. The weights say:", describe(self.findings), *self.notes]
        return "\n".join(lines)

    def save(self, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        from .processing_llava_st import LlavaStProcessor

        names = {to_ours(name): name for name in self.tensors.specs if not is_unused(name)}
        unused = {name: spec for name, spec in self.tensors.specs.items() if is_unused(name)}
        specs = {ours: self.tensors.specs[name] for ours, name in names.items()}
        generation = skeleton(self.config).generation_config
        ids = self.tokenizer.get_vocab()
        generation.eos_token_id = ids.get(_TURN_END, self.tokenizer.eos_token_id)
        generation.pad_token_id = self.tokenizer.pad_token_id
        with new_folder(out, sum(spec.nbytes for spec in self.tensors.specs.values())) as folder:
            write_shards(folder, specs, lambda ours: self.tensors.read(names[ours]), max_shard_bytes)
            self.config.save_pretrained(folder)
            generation.save_pretrained(folder)
            LlavaStProcessor.from_config(self.config, self.tokenizer).save_pretrained(folder)
            kept = folder / _KEPT
            kept.mkdir()
            write_json(kept / "config.json", self.published)
            if unused:
                write_safetensors(kept / _UNUSED, unused, self.tensors.read)


def from_published(
    source: Path,
    adapters: Sequence[Path] = (),
    *,
    allow_pickle: bool = False,
    compat: str | None = None,
    upgrade: bool = False,
    new_packer: int | None = None,
) -> Conversion:
    """Opens and checks a published checkpoint; nothing is written.

    Args:
        source: the folder of a full model, or of the first stage's, to which `adapters` are added.
        adapters: folders of later stages, in their order.
        allow_pickle: whether `.bin` files are read.
        compat: the mode, against the evidence or without any; None: as the weights say, all of them.
        upgrade: makes a `"paper"` model of a `"released"` one; the notes name what it lacks.
        new_packer: the source is LLaVA-OneVision, which the first stage of training begins with: it gets a packer that
            is not trained, from this seed, and rows for LLaVA-ST's tokens. The mode is `"paper"` unless `compat` says
            otherwise.

    Raises:
        CheckpointError: anything is not as published, or the evidence is mixed.
    """
    published = read_published(source)
    tensors: Tensors = open_folder(source, allow_pickle)
    tokenizer = load_tokenizer(source)
    notes = []
    if new_packer is not None:
        tensors = begin(tensors, list(tokenizer.get_vocab()), new_packer)
        published = {**published, **packer_settings(tensors.specs)}
        notes.append(f"packer: new, seed {new_packer}; rows added: {len(VISUAL_TOKENS)} for visual tokens")
    if lacks_templates(tokenizer):
        if missing := [name for name in (EMBEDDING, HEAD) if name not in tensors.specs]:
            raise CheckpointError(f"missing: {', '.join(missing)}")
        tensors = GrownRows(tensors, (EMBEDDING, HEAD), len(TEMPLATE_TOKENS))
        notes.append(f"rows added: {len(TEMPLATE_TOKENS)} for template tokens, the mean of those before them")
    for folder in adapters:
        tensors = adapted = Adapted(tensors, folder, allow_pickle)
        notes.append(f"merged: {folder}: {adapted.summary}")
    bins = read_num_bins(tensors.specs)
    added = add_tokens(tokenizer, bins)
    if added:
        notes.append(f"tokens added: {len(added)}, {added[0]} to {added[-1]}")
    rows = vocab_size(tensors.specs)
    ids = read_token_ids(tokenizer, bins, rows)
    config = read_config(published, tensors.specs, rows, ids)
    unused = sorted(filter(is_unused, tensors.specs))
    if unused:
        notes.append(f"not part of the model, kept aside: {', '.join(unused)}")
    used = {name: spec for name, spec in tensors.specs.items() if name not in unused}
    check_shapes(used, {to_published(name): shape for name, shape in expected_shapes(skeleton(config)).items()})
    if new_packer is None:
        findings = examine(tensors, ids, config.lape)
        mode, reason = _decide(findings, published.get(MODE), compat)
    else:
        findings = [Finding(None, "nothing of LLaVA-ST is trained yet")]
        mode, reason = compat or "paper", "the mode of a new model is as one wishes (--compat)"
    notes.insert(0, reason)
    config.compat = mode
    if upgrade:
        if mode != "released":
            raise CheckpointError("--upgrade paper: this checkpoint is of compat='paper' already")
        config.compat = "paper"
        notes += _untrained(tensors)
    return Conversion(config, tokenizer, tensors, published, findings, notes)


def back_to_published(source: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """A checkpoint of ours in the published layout: the inverse of `from_published(...).save`."""
    config = load_config(source)
    tensors = open_folder(source)
    check_shapes(tensors.specs, expected_shapes(skeleton(config)))
    kept = source / _KEPT
    published = read_json(kept / "config.json") if (kept / "config.json").is_file() else {}
    unused = WeightFiles([kept / _UNUSED] if (kept / _UNUSED).is_file() else [])
    names = {to_published(name): name for name in tensors.specs}
    specs = {name: tensors.specs[ours] for name, ours in names.items()} | unused.specs
    settings = write_config(config, published)

    def read(name: str) -> Tensor:
        return tensors.read(names[name]) if name in names else unused.read(name)

    with new_folder(out, sum(spec.nbytes for spec in specs.values())) as folder:
        write_shards(folder, specs, read, max_shard_bytes)
        write_json(folder / "config.json", settings)
        for path in tokenizer_files(source):
            shutil.copyfile(path, folder / path.name)


def _decide(findings: Sequence[Finding], stored: str | None, compat: str | None) -> tuple[str, str]:
    """The mode, and where it is from."""
    if compat is not None:
        return compat, f"{compat!r} was asked for"
    if stored is not None:
        if stored not in ("released", "paper"):
            raise CheckpointError(f"config.json: {MODE}: expected 'released' or 'paper', got {stored!r}")
        return stored, f"{stored!r} is what config.json says ({MODE})"
    try:
        mode = conclude(findings)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nSay which mode is meant with --compat released or --compat paper.") from None
    return mode, f"{mode!r} is what all findings agree on"


def _untrained(tensors: Tensors) -> list[str]:
    """What a released checkpoint lacks that its upgrade needs."""
    fast = [name for name in map(to_ours, tensors.specs) if ".packer.fast." in name]
    return [
        "upgraded to 'paper'; to be trained before use:",
        f"  all {len(fast)} tensors of the fast packer are as initialised: " + ", ".join(fast),
        "  the language model has never seen fast visual tokens, only placeholders",
        "  the language model has never seen a width in a prompt, only the row of <WIDTH-INPUT>",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_st.convert",
        description="Converts LLaVA-ST's published checkpoints to this package's layout, and back.",
    )
    parser.add_argument("source", nargs="?", type=Path, help="folder of a checkpoint; published, unless told otherwise")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write; must not exist, or be empty")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--to-published", action="store_true", help="from this package's layout to the published one")
    what.add_argument("--merge", action="store_true", help="from this package's layout to a plain language model")
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: check the source, and say what memory the model needs; without a source, the published 7B",
    )
    parser.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="DIR", help="a later stage's folder; in their order"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, as weights alone")
    parser.add_argument("--compat", choices=("released", "paper"), help="the mode, whatever the weights say")
    parser.add_argument("--upgrade", choices=("paper",), help="of released weights, make a model to be trained anew")
    parser.add_argument(
        "--new-packer",
        action="store_true",
        help="the source is LLaVA-OneVision, with which the first stage begins: add a packer that is not trained",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a new packer; default: %(default)s")
    parser.add_argument("--max-shard-size", type=float, default=MAX_SHARD_BYTES / 1e9, metavar="GB", help="default: 5")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.source is None and not options.dry_run:
        parser.error("expected a source and an out folder")
    if (options.out is None) != options.dry_run:
        parser.error("--dry-run takes no out folder" if options.dry_run else "expected an out folder")
    if options.max_shard_size <= 0:
        parser.error(f"--max-shard-size must be positive, got {options.max_shard_size}")
    asked = options.lora or options.compat or options.upgrade or options.new_packer
    if (options.to_published or options.merge) and asked:
        parser.error("--lora, --compat, --upgrade and --new-packer are for published checkpoints")
    if options.new_packer and (options.lora or options.upgrade):
        parser.error("--new-packer: LLaVA-OneVision has neither later stages nor a mode to be upgraded")
    try:
        _run(options, int(options.max_shard_size * 1e9))
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, max_shard_bytes: int) -> None:
    if options.to_published:
        back_to_published(options.source, options.out, max_shard_bytes)
    elif options.merge:
        merge_checkpoint(options.source, options.out, max_shard_bytes)
    elif options.source is None:
        print(memory.describe(full_size_config()))
    else:
        conversion = from_published(
            options.source,
            options.lora,
            allow_pickle=options.allow_pickle,
            compat=options.compat,
            upgrade=options.upgrade == "paper",
            new_packer=options.seed if options.new_packer else None,
        )
        print(conversion.report)
        if options.dry_run:
            print(memory.describe(conversion.config))
        else:
            conversion.save(options.out, max_shard_bytes)


if __name__ == "__main__":
    sys.exit(main())
