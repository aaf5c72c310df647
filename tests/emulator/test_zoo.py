"""The emulator catches small kernels with one fault each, and lets their right twins pass (zoo.cuh)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.emulator.build import load
from tests.zoo_results import INPUT, KERNELS, right_result

SEEDS = range(20)

# What the error says of each fault. None: there is no error, but the result is wrong.
FAULTS = {
    "missing_barrier": r"4 bytes.* of shared memory `numbers`, which thread \d+ (writes|reads) at zoo.cuh:\d+, with no "
    r"barrier between them \(a race\), at zoo.cuh:\d+|reads .* which nobody wrote",
    "missing_warp_barrier": r"a race|which nobody wrote",
    "barrier_too_small": r"a race|which nobody wrote",
    "refilled_too_early": r"a race",
    "forgotten_reader": r"of shared memory `number`, which thread \d+ .*a race",
    "divergent_barrier": r"threads 0-31 wait at a block barrier.*; threads 32-63 wait at a block barrier",
    "skipped_barrier": r"threads 0-47 wait at a block barrier in zoo.cuh:\d+:\d+; threads 48-63 exited",
    "divergent_shuffle": r"threads 0, 2, .*wait at a warp barrier.*; threads 1, 3, .*wait at a shuffle",
    "wrong_shuffle_mask": r"threads .* wait at a shuffle in zoo.cuh:\d+:\d+; threads .* exited",
    "shuffle_from_absent_lane": r"shuffles from a lane that takes no part",
    "vote_of_strangers": r"takes part in a vote in zoo.cuh:\d+:\d+ as lane \d+, which is not among lanes 0xffff",
    "unwritten_shared_memory": r"reads 4 bytes, number \d+ and on, of shared memory `numbers`, which nobody wrote",
    "unwritten_result": r"reads 4 bytes, number \d+ and on, of a result, which nobody wrote",
    "misaligned_load": r"makes a load of 16 bytes at an address that is no multiple of it, at zoo.cuh:\d+",
    "off_by_one_store": r"writes 4 bytes out of bounds, 0 past the end of a result of 512 bytes, at zoo.cuh:\d+",
    "off_by_one_load": r"reads 4 bytes out of bounds, 4 before the beginning of an input of 1536 bytes",
    "written_input": r"writes an input, which kernels only read, at zoo.cuh:\d+",
    "lost_update": r"a race",
    "forgotten_adder": r"a race",
    "wide_store_past_the_end": r"writes 32 bytes out of bounds, 0 past the end of a result of 512 bytes, at zoo.cuh",
    "copies_collide": r"writes 8 bytes, number 0 and on, of a result, which thread \d+ writes .*a race",
    "result_loaded_as_read_only": r"which one launch changes and loads as read-only",
    "blocks_write_the_same": r"which thread \d+ of another block writes at .*a race",
    "integer_overflow": r"has undefined behaviour: an integer sum overflows, at zoo.cuh:\d+",
    "unwaited_copy": r"uses 4 bytes at zoo.cuh:\d+ that are the target of an asynchronous copy, which thread \d+ "
    r"starts at zoo.cuh:\d+ and has not waited for",
    "uncommitted_copy": r"target of an asynchronous copy|ends before the asynchronous copy",
    "too_many_copies_pending": r"target of an asynchronous copy",
    "copy_without_barrier": r"target of an asynchronous copy|a race|which nobody wrote",
    "copy_started_too_early": r"target of an asynchronous copy|a race",
    "copied_while_it_changes": r"source of an asynchronous copy|a race",
    "copy_to_global_memory": r"starts an asynchronous copy that is not from global to shared memory, at zoo.cuh:\d+",
    "copy_to_unaligned_array": r"makes an asynchronous copy of 16 bytes at an address that is no multiple",
    "wrong_fragments_bfloat16": None,
    "wrong_fragments_float16": None,
    "product_without_all_lanes": r"threads .*24-31.* exited",
}

OTHER_FAULTS = ["overrun_local_array"]  # see test_address_sanitizer.py


def run(kernel: str, twin: str, seed: int) -> np.ndarray:
    load().settings.seed = seed
    return np.array(getattr(load(), twin)[kernel](INPUT.tolist()))


def test_the_list_is_complete():
    assert {*FAULTS, *OTHER_FAULTS} == set(KERNELS) == set(load().wrong) == set(load().right)


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_twins_pass(kernel):
    expected = right_result(kernel)
    for seed in SEEDS:
        np.testing.assert_array_equal(run(kernel, "right", seed)[: len(expected)], expected)


@pytest.mark.parametrize("kernel", FAULTS)
def test_faults_are_caught(kernel):
    """With every seed, not just a lucky one; errors name kernel, block and seed."""
    pattern = FAULTS[kernel]
    for seed in SEEDS:
        if pattern is None:
            assert not np.array_equal(run(kernel, "wrong", seed), right_result(kernel))
            continue
        with pytest.raises(load().KernelError) as error:
            run(kernel, "wrong", seed)
        message = str(error.value)
        assert re.search(pattern, message), message
        assert re.match(rf"kernel \S*{kernel}<false>, block \d+", message), message
        assert message.endswith(f"(seed {seed})")


def test_errors_name_threads_and_both_lines():
    """Both ends of a race: the line that another thread made its access from, and that of this one."""
    with pytest.raises(load().KernelError, match=r"thread \d+ .*which thread \d+ \w+ at zoo.cuh:\d+.*, at zoo.cuh:\d+"):
        run("refilled_too_early", "wrong", 0)
