"""Processes of their own for tests, without the seconds in which each would import PyTorch anew."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["scsa_book.training.run"])


def begin(variables, function, say, *given):
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(say, *given)


@contextmanager
def child(function, *given):
    """A process that executes `function(say, *given)`, and a connection that receives what it says.

    It begins as a copy of one that has imported what a run needs and done nothing: PyTorch cannot compute
    gradients in a copy of a process that has threads for them. It is killed with the block.
    """
    receiver, sender = START.Pipe(duplex=False)
    process = START.Process(target=begin, args=(dict(os.environ), function, sender.send, *given))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        process.kill()
        process.join()


def wait_at(task, epoch, batch, say):
    "Makes runs of a class of tasks say that they have begun this step, and wait there to be asked to leave."
    step = task.training_step

    def waiting(self, images, index):
        if (self.trainer.current_epoch, index) == (epoch, batch):
            say("in the middle")
            while not self.trainer.received_sigterm:
                time.sleep(0.01)
        return step(self, images, index)

    task.training_step = waiting


SERVER = """
import gc, json, os, sys
gc.disable()
import torch
gc.freeze()  # a copy that looked through these objects would copy their memory
gc.enable()
for line in sys.stdin:
    code, variables, output = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    exec(code, {"__name__": "__main__"})
    break
"""


@pytest.fixture(scope="session")
def server():
    "A process that has imported PyTorch and nothing else, and executes code in copies of itself."
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes) as process:
        yield process


@pytest.fixture
def executed(server, tmp_path):
    "A function: exit code and output of code in a process that has imported PyTorch alone."

    def execute(code, **variables):
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        server.stdin.write(json.dumps([code, variables, str(output)]) + "\n")
        return int(server.stdout.readline()), output.read_text()

    return execute
