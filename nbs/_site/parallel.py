"""The same work for many items, one process per core, with a progress bar and the remaining time."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

MIN_ITEMS = 8  # items for which starting processes is not worth it


def usable_cores():
    "Cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(results, many, what):
    "`results` as they come, with a progress bar on a terminal."
    return tqdm(results, total=many, desc=what, disable=None, leave=False)


def tell(line):
    "A line above the progress bar."
    tqdm.write(line)
    sys.stdout.flush()


def each(what, work, things, cores=None):
    "Pairs of an item and its result of `work`, in order; `cores` processes, by default one per core."
    cores = min(cores or usable_cores(), len(things))
    if cores < 2 or len(things) <= MIN_ITEMS:
        return ((thing, work(thing)) for thing in shown(things, len(things), what))
    return spread(what, work, things, cores)


def spread(what, work, things, cores):
    with ProcessPoolExecutor(cores) as pool:
        yield from zip(things, shown(pool.map(work, things), len(things), what), strict=True)
