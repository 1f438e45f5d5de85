"""The same work for many things, a process a core, with a bar that tells how long it will take."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

FEW = 8  # things for which starting processes is not worth it


def usable_cores():
    "Cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(results, many, what):
    "`results` as they come, with a bar where there is a terminal."
    return tqdm(results, total=many, desc=what, disable=None, leave=False)


def tell(line):
    "A line of its own, above a bar that is being shown."
    tqdm.write(line)
    sys.stdout.flush()


def each(what, work, things, cores=None):
    "Pairs of a thing and `work` of it, in order; `cores` processes, by default as many as there are cores."
    cores = min(cores or usable_cores(), len(things))
    if cores < 2 or len(things) <= FEW:
        return ((thing, work(thing)) for thing in shown(things, len(things), what))
    return spread(what, work, things, cores)


def spread(what, work, things, cores):
    with ProcessPoolExecutor(cores) as pool:
        yield from zip(things, shown(pool.map(work, things), len(things), what), strict=True)
