"""What a case runs: the calls to compare, what they should return, and the bytes for the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import llava_st_ops

from .peers import available_backends

Call = Callable[[], tuple[Tensor, ...]]


@dataclass
class Contender:
    """One implementation of a workload: a call, or the reason why there is none."""

    name: str
    role: str  # "ours", "reference", "peer", or "yardstick": what shows how fast the machine is
    call: Call | None
    reason: str = ""
    checked: bool = True  # whether its results are compared; a yardstick has none to compare


@dataclass
class Workload:
    """Everything that the runner needs for one case."""

    description: dict[str, object]  # of the case, for the record
    contenders: list[Contender]
    truth: Callable[[], dict[str, Tensor]]  # float64; named in the order in which the calls return tensors
    reference: str  # the contender whose error the others' are compared with
    passes: list[tuple[list[Tensor], list[int]]]  # inputs read and output bytes written, for the floor; may be empty
    dtype: torch.dtype
    rounds: int | None = None  # fewer than usual, where a single call takes many seconds

    @property
    def name(self) -> str:
        return str(self.description["name"])

    @property
    def baseline(self) -> str:
        return str(self.description["baseline"])


def call_of(
    function: Callable[..., object],
    inputs: Sequence[Tensor],
    differentiated: Sequence[Tensor],
    grads: tuple[Tensor, ...] | None,
) -> Call:
    """A call of `function(*inputs)`, followed by the gradients of `differentiated` where `grads` is given."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, differentiated, grads)
        return (*(output.detach() for output in outputs), *gradients)

    return forward if grads is None else forward_and_backward


Function = Callable[..., object]


def seeded(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def on_each_backend(function: Function, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, Function]]:
    """Name, role and `function` of each of our backends."""

    def on(backend: str) -> Function:
        def call(*arguments: object) -> object:
            with llava_st_ops.use_backend(backend):
                return function(*arguments)

        return call

    reasons = available_backends(device, dtype)
    return [(f"llava_st_ops, {name}", "ours", on(name)) for name, reason in reasons.items() if not reason]


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe(name: str, mode: str, dtype: torch.dtype, reason: str, baseline: str, **more: object) -> dict[str, object]:
    """Of a case whose name begins with its kind."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "name": f"{name}, {mode}, {dtype_name}",
        "kind": name.split()[0],
        "dtype": dtype_name,
        "mode": mode,
        "reason": reason,
        "baseline": baseline,
        **more,
    }


REFERENCE = "reference, PyTorch"


def workload_of(
    description: dict[str, object],
    names: Sequence[str],
    tensors: Sequence[Tensor],
    grads: tuple[Tensor, ...],
    plain: Function,
    contenders: Sequence[tuple[str, str, Function]],
    passes: Sequence[tuple[list[Tensor], list[int]]] = (),
    rounds: int | None = None,
) -> Workload:
    """Of functions of the same tensors; where the case's mode says so, with the gradients of all of these.

    Args:
        description: of the case.
        names: of the results, then of the gradients.
        tensors: what the functions take.
        grads: gradients of the results.
        plain: the reference, which is the truth, too, in float64.
        contenders: name, role and function of the others.
        passes: of the forward and of the backward pass, see `Workload`.
        rounds: see `Workload`.
    """
    backward = description["mode"] != "forward"
    inputs = [x.detach().requires_grad_(backward) for x in tensors]

    def truth() -> dict[str, Tensor]:
        exact = [x.detach().double().requires_grad_(backward) for x in tensors]
        results = call_of(plain, exact, exact, tuple(g.double() for g in grads) if backward else None)()
        return dict(zip(names, results, strict=False))

    return Workload(
        description=description,
        contenders=[
            Contender(name, role, call_of(function, inputs, inputs, grads if backward else None))
            for name, role, function in (*contenders, (REFERENCE, "reference", plain))
        ],
        truth=truth,
        reference=REFERENCE,
        passes=list(passes[: 2 if backward else 1]),
        dtype=tensors[0].dtype,
        rounds=rounds,
    )
