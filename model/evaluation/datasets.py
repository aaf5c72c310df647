"""Which benchmark a task is evaluated on."""

from __future__ import annotations

from os import PathLike

from .charades import Unit, read_charades
from .records import Dataset
from .refcoco import read_refcoco
from .st_align import read_st_align

EVALUATED_TASKS = ("stvg", "svg", "elc", "tvg", "rec")


def read_dataset(task: str, path: str | PathLike[str], seed: int = 0, unit: Unit = "auto") -> Dataset:
    """What a data file holds: of ST-Align for STVG, SVG and ELC, of Charades-STA for TVG, of RefCOCO's kind for REC.

    Args:
        task: one of `EVALUATED_TASKS`.
        path: the file.
        seed: of wordings that are drawn for each record.
        unit: of Charades-STA's timestamps, see `read_charades`.

    Returns:
        Samples to ask about, with their truth, and what is wrong with records that are none.

    Raises:
        ValueError: the file is not of the benchmark's form. Single broken records are listed in the result.
    """
    if task == "tvg":
        return read_charades(path, unit)
    if task == "rec":
        return read_refcoco(path, seed)
    if task in EVALUATED_TASKS:
        return read_st_align(path, task, seed)
    raise ValueError(f"task: expected one of {', '.join(EVALUATED_TASKS)}, got {task!r}")
