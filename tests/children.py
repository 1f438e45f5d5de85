"""Processes of their own for tests, without the seconds in which each would import PyTorch anew."""

import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager

FORK = multiprocessing.get_context("fork")  # of this process, and all that it has imported
WITH_TORCH = multiprocessing.get_context("forkserver")  # of one that has imported PyTorch and nothing else
WITH_TORCH.set_forkserver_preload(["torch"])


def begin(function, say, *given):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(say, *given)


@contextmanager
def child(function, *given):
    """A process that executes `function(say, *given)`, and a connection that receives what it says.

    It begins as a copy of this one, and is killed with the block.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=begin, args=(function, sender.send, *given))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        process.kill()
        process.join()


def execute(code, variables, folder, output):
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    with open(output, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def executed(code, folder, **variables):
    """Exit code and output of `code` in a process that has imported nothing of the book.

    `folder` is one for the output.
    """
    output = folder / "output"
    given = (code, {**os.environ, **variables}, os.getcwd(), output)
    process = WITH_TORCH.Process(target=execute, args=given)
    process.start()
    process.join()
    return process.exitcode, output.read_text()
