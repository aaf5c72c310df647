"""What modules with a direct and a folded execution share: the choice, and matrices that are kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.registration import autocast_is_on

EXECUTIONS = ("direct", "folded")


class Foldable(nn.Module):
    """A module with two executions of one function. `why_not_folded` is to be defined."""

    def __init__(self, execution: str) -> None:
        super().__init__()
        self._kept = Kept()
        self.execution = execution

    @property
    def execution(self) -> str:
        """`"direct"` or `"folded"`; may be set at any time."""
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be 'direct' or 'folded', got {execution!r}")
        self._execution = execution

    def why_not_folded(self) -> str | None:
        """Why the folded execution cannot be had.

        Returns:
            A reason in words; None where it can be had.
        """
        raise NotImplementedError

    def refresh(self) -> None:
        """To be called after writes to parameters that torch does not see (through `.data`)."""
        self._kept.forget()

    def _runs_folded(self) -> bool:
        """Whether it was asked for and can be had; says, to who called `forward`, where it cannot."""
        if self.execution == "direct":
            return False
        reason = self.why_not_folded()
        if reason is not None and not torch.compiler.is_compiling():
            warnings.warn(f"{type(self).__name__} runs direct, not folded: {reason}", stacklevel=5)
        return reason is None

    def _apply(self, *arguments: Any, **options: Any) -> Foldable:
        self._kept.forget()
        return super()._apply(*arguments, **options)


_optimizer_steps = 0  # fused optimizers leave no trace in the tensors that they change


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Kept:
    """Matrices that are computed once and kept until a parameter changes.

    A change is seen by a tensor's version and memory, and by steps of optimizers: `load_state_dict`, `.to` and edits
    under `no_grad` are; writes through `.data` are not, after which `forget` is to be called.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._kept: tuple[Any, Any, list[torch.UntypedStorage]] | None = None

    def get(self, parameters: Sequence[Tensor], settings: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before with equal `settings`; anew, and in the graph, where a gradient may be
        wanted."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            self.forget()
            return compute()
        if torch.compiler.is_compiling() or not all(map(_shows_changes, parameters)) or not parameters:
            return compute()
        device = parameters[0].device.type
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            return compute()  # a graph must own what it reads in every replay
        key = [settings, _optimizer_steps]
        key += [(p.data_ptr(), p._version, p.dtype, p.device, p.shape, p.stride()) for p in parameters]
        if autocast_is_on(device):
            key.append(torch.get_autocast_dtype(device))
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # Their memory, too, so that no other tensor can get it while its address is a key.
                kept = (key, compute(), [parameter.untyped_storage() for parameter in parameters])
            self._kept = kept
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def _shows_changes(tensor: Tensor) -> bool:
    """Whether a tensor has memory and a version: one made in inference mode has none, nor has one that stands for
    another."""
    stands_in = is_fake(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (tensor.is_inference() or tensor.is_meta or stands_in)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module, its children apart, does what its kind does and no more: adapters, quantised and parametrised
    layers have classes of their own, or tensors of such; others hooks, or another forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = vars(module).get("forward")  # set on the module itself: accelerate leaves the method there, others replace it
    same_forward = own is None or getattr(own, "__func__", None) is kind.forward
    return (
        type(module) is kind
        and not any(hooks)
        and same_forward
        and all(
            p is None or type(p) is nn.Parameter or type(p) is Tensor or is_fake(p) for p in module._parameters.values()
        )
    )


def why_no_mlp(module: nn.Module) -> str | None:
    """Why a module is not `Linear, GELU, Linear` with an exact GELU; None where it is."""
    if not is_plain(module, nn.Sequential) or len(module) != 3:
        return f"not a Sequential of Linear, GELU and Linear, but {type(module).__name__}"
    for layer, kind in zip(module, (nn.Linear, nn.GELU, nn.Linear), strict=True):
        if not is_plain(layer, kind):
            return f"a layer is not a plain {kind.__name__}, but {type(layer).__module__}.{type(layer).__name__}"
    if module[1].approximate != "none":
        return f"its GELU is approximate, {module[1].approximate!r}"
    return None
