"""How an op gets its autograd, autocast and vmap rules, the same way for every op and namespace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import library

_NO_TRANSFORMS = (
    "{op}: torch.func transforms (grad, jvp, jacrev, ...) do not go through the raw op; "
    "llava_st_ops.{name} takes the PyTorch reference there, but under torch.compile only inside "
    "llava_st_ops.use_backend('reference')"
)
_NO_DOUBLE_BACKWARD = (
    "{op}: double backward is not supported by the kernels; run the forward under "
    "llava_st_ops.use_backend('reference') to differentiate twice"
)


Rules = Callable[[str, torch.library.Library], None]

_namespaces = {library.NAMESPACE: library.OPS, library.TRITON_NAMESPACE: library.TRITON_OPS}
_rules: list[Rules] = []


def add_rules(rules: Rules) -> None:
    """Applies the rules of an op to every namespace of ops, and to those that `add_namespace` will add."""
    _rules.append(rules)
    for namespace, registry in _namespaces.items():
        rules(namespace, registry)


def add_namespace(namespace: str) -> None:
    """Defines all ops once more, in a namespace of their own, with the same rules and without kernels."""
    _namespaces[namespace] = library.define_ops(namespace)
    for rules in _rules:
        rules(namespace, _namespaces[namespace])


def has_tangent(*values: object) -> bool:
    """Whether any tensor among the values carries a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether derivatives are taken in a way that only plain PyTorch supports: forward mode, torch.func.grad, ..."""
    if has_tangent(*tensors):
        return True
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def places_of(tensors: int, last: int | None, count: int) -> list[int]:
    """The places of the first `tensors` of `count` arguments, and of the one at `last` where that is among them."""
    return [*range(tensors), *([last] if last is not None and last < count else [])]


def _needs_gradient(values: tuple[object, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


@dataclass(frozen=True)
class Derivative:
    """How an op is differentiated: the gradients of its first `tensors` arguments, and after those of the one at the
    place `last` where such a call has it, come from `backward_op`.

    `call(backward_op, grad_output, outputs, arguments, needed)` makes the call and gives one gradient per argument, or
    None; by default `backward_op(grad_output, *arguments)`. Of the arguments, those in `unsaved` are None there; the
    outputs are kept where `saves_outputs`. Outputs but for the first have no gradient.
    """

    backward_op: torch._ops.OpOverload
    tensors: int
    last: int | None = None
    call: Callable[..., Sequence[Tensor | None]] | None = None
    unsaved: tuple[int, ...] = ()
    saves_outputs: bool = False


def _call_backward(
    backward_op: torch._ops.OpOverload, grad: Tensor, outputs: Any, arguments: Sequence[Any], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    return backward_op(grad, *arguments)


def register_autograd(registry: torch.library.Library, op: torch._ops.OpOverload, derivative: Derivative) -> None:
    """Differentiates `op` in reverse mode.

    `torch.library.register_autograd` would do so too, but gives zeros for forward mode without a word; here that
    raises, as do the transforms of torch.func, whose gradients do not reach an op's autograd kernel.
    """
    name = op._schema.name.split("::")[1]
    backward_op = derivative.backward_op
    call = derivative.call or _call_backward

    class BackwardFunction(torch.autograd.Function):
        """The backward op, so that differentiating it again is an error and not a missing gradient."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return backward_op(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(_NO_DOUBLE_BACKWARD.format(op=op))

    class ForwardFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*arguments)
            outputs = result if isinstance(result, tuple) else (result,)
            ctx.mark_non_differentiable(*outputs[1:])
            kept = [None if i in derivative.unsaved else argument for i, argument in enumerate(arguments)]
            kept += outputs if derivative.saves_outputs else []
            ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))
            ctx.kept = [_SAVED if isinstance(value, Tensor) else value for value in kept]
            ctx.count = len(arguments)
            return result

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            kept = [next(saved) if value is _SAVED else value for value in ctx.kept]
            places = places_of(derivative.tensors, derivative.last, ctx.count)
            needed = [ctx.needs_input_grad[place] for place in places]
            grads = call(backward_op, grad_output, kept[ctx.count :], kept[: ctx.count], needed)
            wanted: list[Tensor | None] = [None] * ctx.count
            for place, grad, need in zip(places, grads, needed, strict=False):  # there may be one of no bias, too
                wanted[place] = grad if need else None
            return tuple(wanted)

    def autograd_kernel(function: type[torch.autograd.Function], inner: torch._ops.OpOverload) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            tangent = has_tangent(*arguments)
            if not tangent and not _needs_gradient(arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    return inner(*arguments)
            if tangent or torch._C._are_functorch_transforms_active():
                raise NotImplementedError(_NO_TRANSFORMS.format(op=inner, name=name))
            return function.apply(*arguments)

        return kernel

    registry.impl(op._schema.name, autograd_kernel(ForwardFunction, op), "Autograd")
    registry.impl(backward_op._schema.name, autograd_kernel(BackwardFunction, backward_op), "Autograd")


_SAVED = object()  # stands in for a tensor that autograd keeps


def register_without_gradient(registry: torch.library.Library, op: torch._ops.OpOverload, instead: str) -> None:
    """Makes it an error to want gradients through `op`, which has none; `instead` has some."""

    def kernel(*arguments: Any) -> Any:
        if has_tangent(*arguments) or _needs_gradient(arguments):
            raise RuntimeError(f"{op}: has no gradient; {instead} has one")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    registry.impl(op._schema.name, kernel, "Autograd")


def register_in_place(registry: torch.library.Library, op: torch._ops.OpOverload, instead: str) -> None:
    """The same for an op that changes its first argument."""

    def kernel(*arguments: Any) -> None:
        if has_tangent(*arguments) or _needs_gradient(arguments):
            raise RuntimeError(f"{op}: works in place and has no gradient; {instead} has one")
        with torch._C._AutoDispatchBelowAutograd():
            op(*arguments)
        torch.autograd.graph.increment_version(arguments[0])

    registry.impl(op._schema.name, kernel, "Autograd")


def register_self_adjoint(registry: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Differentiates `op(x)`, a linear map that is its own adjoint, by itself, any number of times."""
    name = op._schema.name.split("::")[1]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return op(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return op(grad)

    def kernel(x: Tensor) -> Tensor:
        tangent = has_tangent(x)
        if not tangent and not _needs_gradient((x,)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(x)
        if tangent or torch._C._are_functorch_transforms_active():
            raise NotImplementedError(_NO_TRANSFORMS.format(op=op, name=name))
        return Function.apply(x)

    registry.impl(op._schema.name, kernel, "Autograd")


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast applies; on other devices than these it never does (torch 2.10 cannot trace the question)."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where it is on, as for torch's own attention; float64 stays as it is."""
    device_type = tensors[0].device.type
    if not autocast_is_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype.is_floating_point and t.dtype != torch.float64 else t for t in tensors)


def register_autocast(
    registry: torch.library.Library, op: torch._ops.OpOverload, tensors: int, last: int | None = None
) -> None:
    """Under autocast the first `tensors` arguments of the raw op are cast, and the one at the place `last` where a call
    has it; positions and grids never are."""

    def kernel_for(key: torch._C.DispatchKey) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            cast = list(arguments)
            for place in places_of(tensors, last, len(arguments)):
                if arguments[place] is not None:
                    (cast[place],) = autocast(arguments[place])
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast)

        return kernel

    for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
        registry.impl(op._schema.name, kernel_for(key), key.name)
