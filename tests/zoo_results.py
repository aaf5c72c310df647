"""What the right twins of the emulator's zoo (tests/emulator/zoo.cuh) write, by numpy."""

from __future__ import annotations

import numpy as np

RESULTS = 128  # entries
INPUT = np.random.default_rng(0).integers(-8, 8, 384).astype(np.float32)
_THREADS = np.arange(64)
_MINE = INPUT[:64]
_NEIGHBOURS = _MINE[(_THREADS + 1) % 64]
_LOWER = _THREADS % 32 < 16  # lanes of the first half of each warp
_PRODUCT = (INPUT[:256].reshape(16, 16) @ INPUT[256:].reshape(16, 8)).ravel()

_EXPECTED = {
    "missing_barrier": _MINE + _NEIGHBOURS,
    "missing_warp_barrier": _MINE + _MINE[_THREADS ^ 1],
    "barrier_too_small": _MINE + _NEIGHBOURS,
    "refilled_too_early": _NEIGHBOURS + INPUT[64 + (_THREADS + 1) % 64],
    "forgotten_reader": _MINE + np.where(_THREADS <= 32, INPUT[0], 0),
    "divergent_barrier": _MINE,
    "skipped_barrier": _MINE,
    "divergent_shuffle": _MINE + _MINE[_THREADS ^ 2],
    "wrong_shuffle_mask": np.where(_LOWER, _MINE + _MINE[_THREADS ^ 1], _MINE),
    "shuffle_from_absent_lane": np.where(_LOWER, _MINE + _MINE[_THREADS // 32 * 32 + (_THREADS + 1) % 16], _MINE),
    "vote_of_strangers": np.where(_LOWER, _MINE + 0x5555, _MINE),
    "unwritten_shared_memory": _NEIGHBOURS,
    "unwritten_result": _MINE,
    "misaligned_load": INPUT[4 * _THREADS],
    "off_by_one_store": _MINE,
    "off_by_one_load": _MINE,
    "written_input": _MINE,
    "lost_update": np.concatenate([np.zeros(64), [2 * _MINE.sum()]]),
    "forgotten_adder": np.concatenate([[33], _MINE[1:], [33]]),
    "wide_store_past_the_end": INPUT[:16].repeat(8),
    "copies_collide": INPUT[:128],
    "result_loaded_as_read_only": np.concatenate([_MINE, _NEIGHBOURS]),
    "blocks_write_the_same": np.concatenate([_MINE, _MINE]),
    "integer_overflow": _MINE,
    "overrun_local_array": _MINE + INPUT[_THREADS + 3],
    "unwaited_copy": _MINE,
    "uncommitted_copy": _MINE,
    "too_many_copies_pending": _MINE,
    "copy_without_barrier": INPUT[4 * ((_THREADS + 1) % 64)],
    "copy_started_too_early": _NEIGHBOURS + np.where(_THREADS % 2 == 0, INPUT[64:128], 0),
    "copied_while_it_changes": np.concatenate([INPUT[1:2], _MINE[1:]]),
    "copy_to_global_memory": _MINE,
    "copy_to_unaligned_array": INPUT[4 * _THREADS],
    "wrong_fragments_bfloat16": _PRODUCT,
    "wrong_fragments_float16": _PRODUCT,
    "product_without_all_lanes": _PRODUCT,
}
KERNELS = list(_EXPECTED)


def right_result(kernel: str) -> np.ndarray:
    """The first entries of the result; of the others nothing is promised."""
    return _EXPECTED[kernel]
