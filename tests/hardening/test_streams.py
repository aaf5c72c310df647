"""Several streams of a GPU at once, each in a thread of its own. Skipped where there is no GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from llava_st_ops import backends, use_backend
from tests.hardening.op_calls import OPS, Call, example
from tests.hardening.test_threads_and_processes import bits, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_streams_do_not_disturb_each_other(name, backend):
    verdict = backends.can_run(backend, "point_to_region_attention", "cuda", torch.float32)
    if not verdict.ok:
        pytest.skip(verdict.reason)
    call = example(name)
    others = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.others.items()}
    call = Call(call.name, {k: x.cuda() for k, x in call.sources.items()}, call.run, call.plain, others)
    with use_backend(backend):
        expected = bits(call)
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        with use_backend(backend), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not same(bits(call), expected):
                    wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
