"""A vision tower that knows moving shapes: trained to name, at every patch, what is there and where its edges are.

Nothing here is pre-trained, and a language model that has to teach its own tower learns neither in an hour. This stands
for the pictures and captions that SigLIP has seen. The truth comes from the scenes themselves; the tower is frozen
afterwards, and its heads are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from ..synthesis.scenes import COLOURS, SHAPES, Scene

# A patch shows an object if at least this part of it is covered; the topmost one that does.
_COVERED = 0.3
# Edges are said in waves, as positions are: features from which a linear layer reads them then suit a language model.
_WAVES, _FASTEST = 6, 4.0
_EMPTY_WEIGHT = 0.3  # most patches are empty
_EDGE_WEIGHT = 2.0


@dataclass(frozen=True)
class PatchTruth:
    """What the patches of pictures show.

    Attributes:
        colours: uint8 `[N, rows, columns]`, 0 for none and else 1 + the index in `COLOURS`.
        shapes: likewise, of `SHAPES`.
        edges: float32 `[N, rows, columns, 4]`: left, top, right and bottom of the object's box, in parts of the
            picture; 0 where there is none. They are the same for all patches of an object, and stay what they are where
            patches are packed into one token.
    """

    colours: Tensor
    shapes: Tensor
    edges: Tensor

    @classmethod
    def join(cls, parts: Sequence[PatchTruth]) -> PatchTruth:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("colours", "shapes", "edges")))

    def __getitem__(self, index: Tensor) -> PatchTruth:
        return PatchTruth(self.colours[index], self.shapes[index], self.edges[index])


def patch_truth(scene: Scene, grid: int) -> PatchTruth:
    """What the patches of a scene's frames show, `grid` x `grid` of them in a picture."""
    colours = torch.zeros(scene.frames, grid, grid, dtype=torch.uint8)
    shapes, edges = colours.clone(), torch.zeros(scene.frames, grid, grid, 4)
    low = torch.arange(grid) / grid

    def shares(first: float, last: float) -> Tensor:
        """Of each row or column, the part between two edges."""
        return ((low + 1 / grid).clamp(max=last) - low.clamp(min=first)).clamp(min=0) * grid

    for shape in scene.objects:  # later ones cover earlier ones
        for frame in range(shape.first, shape.last + 1):
            box = shape.box(frame)
            shown = shares(box.top, box.bottom)[:, None] * shares(box.left, box.right) > _COVERED
            colours[frame][shown] = 1 + COLOURS.index(shape.colour)
            shapes[frame][shown] = 1 + SHAPES.index(shape.shape)
            edges[frame][shown] = torch.tensor([box.left, box.top, box.right, box.bottom])
    return PatchTruth(colours, shapes, edges)


class _Heads(nn.Module):
    """What the last layer says of each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.colours, self.shapes = nn.Linear(width, 1 + len(COLOURS)), nn.Linear(width, 1 + len(SHAPES))
        self.edges = nn.Linear(width, 4 * 2 * _WAVES)

    def loss(self, features: Tensor, truth: PatchTruth) -> Tensor:
        objects = truth.colours > 0
        weights = torch.where(objects, 1.0, _EMPTY_WEIGHT)
        loss = features.new_zeros(())
        for head, wanted in ((self.colours, truth.colours), (self.shapes, truth.shapes)):
            scores = head(features).movedim(-1, 1)
            loss = loss + (nn.functional.cross_entropy(scores, wanted.long(), reduction="none") * weights).mean()
        found = self.edges(features[objects])
        return loss + _EDGE_WEIGHT * nn.functional.mse_loss(found, _edge_waves(truth.edges[objects]))

    def scores(self, features: Tensor, truth: PatchTruth) -> dict[str, float]:
        """On patches that show an object: shares of right colours and shapes, and the mean error of edges' waves."""
        objects = truth.colours > 0
        features, truth = features[objects], truth[objects]
        return {
            "colours": (self.colours(features).argmax(-1) == truth.colours).float().mean().item(),
            "shapes": (self.shapes(features).argmax(-1) == truth.shapes).float().mean().item(),
            "edges": (self.edges(features) - _edge_waves(truth.edges)).abs().mean().item(),
        }


def waves(values: Tensor, count: int, fastest: float) -> Tensor:
    """Numbers from 0 to 1, `[...]`, as cosines and sines of a quarter of a period over that range to `fastest` of them:
    `[..., 2 * count]`."""
    frequencies = torch.logspace(-2, math.log2(fastest), count, base=2)
    angles = 2 * math.pi * values[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _edge_waves(edges: Tensor) -> Tensor:
    return waves(edges, _WAVES, _FASTEST).flatten(-2)


def train_tower(
    tower: SiglipVisionModel,
    pixels: Tensor,
    truth: PatchTruth,
    steps: int,
    seed: int,
    report: Callable[[int, dict[str, float]], None],
    batch: int = 64,
    rate: float = 2e-3,
) -> None:
    """Trains a tower in place.

    Args:
        pixels: uint8 `[N, 3, S, S]`.
        truth: of the N pictures.
        steps: of `batch` pictures each, drawn at random.
        report: called every 100 steps with the step and how well it does on pictures that it is about to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    side = tower.embeddings.image_size // tower.embeddings.patch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = _Heads(tower.config.hidden_size)
    parameters = [p.requires_grad_(True) for p in (*tower.embeddings.parameters(), *tower.encoder.parameters())]
    parameters += heads.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.1)
    for step in range(1, steps + 1):
        index = torch.randint(len(pixels), (batch,), generator=generator)
        hidden = tower.embeddings(pixels[index].float() / 127.5 - 1)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        features, wanted = hidden.unflatten(1, (side, side)), truth[index]
        if step % 100 == 0:
            with torch.no_grad():
                report(step, heads.scores(features, wanted))
        optimizer.zero_grad()
        heads.loss(features, wanted).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    tower.requires_grad_(False)
