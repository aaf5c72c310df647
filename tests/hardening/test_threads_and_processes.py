"""Ops in several threads at once, in forked and spawned processes, and with any number of threads: the same bits."""

from __future__ import annotations

import dataclasses
import multiprocessing
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence

import pytest
import torch

from tests.hardening.op_calls import OPS, Call, example

# Long enough for a machine that is busy; what hangs takes for ever.
PATIENCE = 600
# What torch itself multiplies matrices for: their bits depend on the number of threads.
BY_MATRIX_PRODUCTS = ("coordinate_cross_entropy", "lape_mlp")


def bits(call: Call) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in call.sources.values()]
    output = call.of(call.run, leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    grads = torch.autograd.grad(output, leaves, weights, allow_unused=True)
    return [output.detach(), *(x.new_zeros(0) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in OPS if name not in BY_MATRIX_PRODUCTS])
def test_any_number_of_threads_gives_the_same_bits(name, threads):
    call, found = example(name), []
    for count in (1, 2, 7):
        threads(count)
        found.append(bits(call))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_several_threads_at_once_give_the_same_bits(threads):
    """All ops, forward and backward, in eight threads, each in another order."""
    threads(2)
    examples = [example(name) for name in OPS]
    expected = [bits(call) for call in examples]
    wrong: list[str] = []
    together = threading.Barrier(8)

    def work(first: int) -> None:
        torch.set_num_threads(2)  # OpenMP has a number for each thread
        try:
            together.wait(PATIENCE)
            for step in range(3 * len(examples)):
                k = (first + step) % len(examples)
                if not same(bits(examples[k]), expected[k]):
                    wrong.append(examples[k].name)
        except Exception as error:  # a thread's errors are nobody's
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(first,), daemon=True) for first in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a thread hangs"
    assert wrong == []


def all_bits(arguments: Sequence[tuple[dict, dict]]) -> list[list]:
    """Of each op, with these sources and other arguments."""
    calls = zip(map(example, OPS), arguments, strict=True)
    found = [bits(dataclasses.replace(call, sources=sources, others=others)) for call, (sources, others) in calls]
    return [[x.tolist() for x in outputs] for outputs in found]


def _send(connection, arguments) -> None:
    torch.set_num_threads(1)  # as torch's own DataLoader has it: OpenMP's threads do not survive a fork
    connection.send(all_bits(arguments))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_give_the_same_bits(method, threads):
    """Also where a process is forked after its parent has run ops with several threads. Arguments are handed over: what
    hypothesis draws depends on the modules that a process has imported."""
    arguments = [(call.sources, call.others) for call in map(example, OPS)]
    threads(2)
    all_bits(arguments)
    threads(1)
    expected = all_bits(arguments)
    threads(2)
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, arguments), daemon=True)
    process.start()
    try:
        assert receive.poll(PATIENCE), "the other process hangs, or has ended without a result"
        assert receive.recv() == expected
    finally:
        process.join(5)
        process.kill()


def test_a_fork_may_use_several_threads():
    """Where the parent has not run anything in parallel before."""
    program = """
        import os, torch, llava_st_ops
        x = torch.randn(1, 8, 9, 9, 2, 8)
        run = lambda: llava_st_ops.point_to_region_attention(x[:, :, :3, :3], x, x, (1, 3, 3))
        torch.set_num_threads(1)
        expected = run()
        child = os.fork()
        torch.set_num_threads(2)
        assert torch.equal(run(), expected)
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=PATIENCE)
