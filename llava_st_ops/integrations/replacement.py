"""Another forward in the place of a module's own: how it gets there, when it steps aside, and how it goes again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves

from ..nn.foldable import Kept
from ..ops.registration import autocast_is_on

# How far, relative to its norm, the first result may be from that of the module's own forward: rounding, and TF32 in
# float32, stay below. It is there to find a forward that computes something else.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Replacement:
    """The forward of one module, as an attribute of the instance. `why_not_these`, `inputs`, `compute` and `describe`
    are to be defined.

    The module's own forward stays where it is, in its class, and takes over
    - calls of another form than is known here (`inputs`);
    - all calls while the module's parts are not what they were (`why_not`): adapters, hooks, dropout in training;
    - all calls from the first one on, if that one shows that the module computes something else;
    - all calls once it is retired.

    Deep copies and pickles of the module keep it, bound to the copy.

    Args:
        module: whose forward it is.
        check: compare the first result with that of the module's own forward.
        layers: the names, with dots, of what it computes with.
    """

    def __init__(self, module: nn.Module, check: bool, layers: Sequence[str]) -> None:
        self.module = module
        self.unchecked = check
        self.needed = tuple(layers)
        self.retired = False
        self.stepped_aside: str | None = None  # the reason last warned of
        self.kept = Kept()

    def why_not(self) -> str | None:
        """Why the module, as it is now, cannot be computed here; None where it can."""
        gone = next((name for name in self.needed if _layer(self.module, name) is None), None)
        return self.why_not_these() if gone is None else f"it has no {gone} any more"

    def why_not_these(self) -> str | None:
        """Why its layers, which are all there, cannot be computed with; None where they can."""
        raise NotImplementedError

    def inputs(self, *arguments: Any, **options: Any) -> tuple[Any, ...] | None:
        """The arguments of `compute` from those of forward; None if the call is of another form."""
        raise NotImplementedError

    def compute(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def describe(self) -> str:
        """Sizes, for the report."""
        raise NotImplementedError

    def original(self, *arguments: Any, **options: Any) -> Any:
        return type(self.module).forward(self.module, *arguments, **options)

    def retire(self) -> None:
        """The module's own forward takes over for good, also where something was wrapped around this one meanwhile."""
        self.retired = True
        _remove(self.module, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.retired:
            return self.original(*arguments, **options)
        reason = self.why_not()
        inputs = self.inputs(*arguments, **options) if reason is None else None
        if reason is not None and not torch.compiler.is_compiling() and reason != self.stepped_aside:
            self.stepped_aside = reason
            warnings.warn(f"{type(self.module).__name__} takes its own forward: {reason}", stacklevel=4)
        if inputs is None or not _of_its_dtype(self.module, inputs):
            return self.original(*arguments, **options)
        result = self.compute(*inputs)
        can_compare = self.unchecked and _can_compare(result) and not _is_random(self.module)
        if can_compare and not self._agrees(result, arguments, options):
            report = f"{type(self.module).__name__} computes something else than is known of its kind"
            warnings.warn(f"{report}; it takes its own forward from now on", stacklevel=4)
            self.retire()
            return self.original(*arguments, **options)
        return result

    def _agrees(self, result: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        with torch.no_grad():
            expected = self.original(*arguments, **options)
        found, wanted = tree_leaves(result), tree_leaves(expected)
        if any(isinstance(x, Tensor) and not x.isfinite().all() for x in wanted):
            return True  # nothing can be told; the next call is looked at
        self.unchecked = False
        return len(found) == len(wanted) and all(map(_alike, found, wanted))


def _layer(module: nn.Module | None, name: str) -> nn.Module | None:
    """What is below a module under this name, as wrappers that pass attributes on do not show it."""
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _is_random(module: nn.Module) -> bool:
    """Whether two calls differ: of dropouts in training."""
    dropouts = (layer for layer in module.modules() if isinstance(layer, nn.modules.dropout._DropoutNd))
    return any(layer.training and layer.p > 0 for layer in dropouts)


def _of_its_dtype(module: nn.Module, inputs: Any) -> bool:
    """Whether numbers are of the dtype of a module's parameters, or autocast makes them so."""
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dtype != torch.bool]
    dtype = next(module.parameters()).dtype
    return all(x.dtype == dtype or autocast_is_on(x.device.type) for x in tensors)


def _can_compare(result: Any) -> bool:
    """Whether the numbers of a result can be looked at."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if any(is_fake(x) or x.is_meta for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def _alike(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return bool(found == wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    wide = torch.promote_types(wanted.dtype, torch.float32)
    difference = (found.detach().to(wide) - wanted.to(wide)).norm()
    return bool(difference <= _TOLERANCES[wanted.dtype] * wanted.to(wide).norm())


# Recognising and replacing -------------------------------------------------------------------------------------------

# The name and the module -> its replacement; why there is none for a module that looks alike; None for all others.
Recogniser = Callable[[str, nn.Module], "Replacement | str | None"]


@dataclass(frozen=True)
class Entry:
    """A line of a report: the module's name in the model, its class, and sizes or a reason."""

    name: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({self.kind}): {self.text}"


class Report:
    """What was replaced and what was not. Printed, it says so; as a context manager it undoes all at the end.

    Attributes:
        replaced: modules with another forward now, and their sizes.
        skipped: modules that look alike and were left as they are, and why.
    """

    def __init__(
        self, family: str, replaced: Sequence[Entry], skipped: Sequence[Entry], made: Sequence[Replacement]
    ) -> None:
        self.family = family
        self.replaced = list(replaced)
        self.skipped = list(skipped)
        self._made = list(made)

    def undo(self) -> None:
        """Gives every module that this call replaced its own forward again."""
        for replacement in self._made:
            replacement.retire()
        self._made.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.family}: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [f"  replaced {entry}" for entry in self.replaced]
        lines += [f"  skipped {entry}" for entry in self.skipped]
        if not self.replaced and not self.skipped:
            lines.append("  no module of the model looks like one")
        return "\n".join(lines)


def accelerate(model: nn.Module, family: str, recognise: Recogniser) -> Report:
    """Replaces the forward of every module that `recognise` knows."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced, skipped, made = [], [], []
    for name, module in model.named_modules():
        kind = type(module).__name__
        found = None if isinstance(module, torch.jit.ScriptModule) else recognise(name, module)
        if found is None:
            continue
        own = vars(module).get("forward")
        if isinstance(own, Replacement) and not own.retired:
            found = "already accelerated"
        elif own is not None and not isinstance(own, Replacement):
            found = "another forward was set on it"
        elif isinstance(found, Replacement):
            found = found.why_not() or found
        if isinstance(found, str):
            skipped.append(Entry(name, kind, found))
            continue
        # An attribute that is no module and no parameter: the state dict does not see it.
        module.forward = found
        made.append(found)
        replaced.append(Entry(name, kind, found.describe()))
    return Report(family, replaced, skipped, made)


def restore(model: nn.Module) -> int:
    """Gives every accelerated module of a model its own forward again: also of a copy, or of one that was pickled.

    Args:
        model: any module; what is not accelerated stays as it is.

    Returns:
        How many modules that were.
    """
    return sum(_remove(module, vars(module).get("forward")) for module in model.modules())


def _remove(module: nn.Module, replacement: Any) -> bool:
    if not isinstance(replacement, Replacement) or vars(module).get("forward") is not replacement:
        return False
    del module.forward
    return True
