"""Processes for tests: forks of one that has imported everything.

Starting Python and importing PyTorch takes longer than what most tests test, so one process does it
once and is forked from then on.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback

import pytest

CRASHED = 70  # the exit status of a process that an exception ended; the command never uses it


class Forked:
    """A process that runs `function(*arguments)` with more environment variables.

    `server` is the socket of the process that is forked, see `serve`.
    """

    def __init__(self, server, function, arguments, environment):
        self.output, output_end = os.pipe()
        status, status_end = os.pipe()
        name = function.__module__, function.__name__
        message = json.dumps([*name, arguments, environment]).encode()
        socket.send_fds(server, [message], [output_end, status_end])
        os.close(output_end)
        os.close(status_end)
        self._status_lines = os.fdopen(status)
        self.text = b""  # what it has printed so far
        self.status = None
        self.pid = int(self._status_lines.readline())

    def signal(self, number, group=False):
        "Send a signal to the process, or to it and all its children."
        (os.killpg if group else os.kill)(self.pid, number)

    def poll(self):
        "The exit status, negative for a signal; None while it runs."
        if self.status is None and select.select([self._status_lines], [], [], 0)[0]:
            self.status = int(self._status_lines.readline())
        while select.select([self.output], [], [], 0)[0]:
            part = os.read(self.output, 2**16)
            if not part:
                break
            self.text += part
        return self.status

    def wait_until(self, condition, limit=300):
        "Wait until `condition()` holds; fail if the process ends before, or after `limit` seconds."
        begin = time.monotonic()
        while not condition():
            ended = self.poll() is not None and not condition()
            assert not ended, f"ended with {self.status}:\n{self.text.decode()[-3000:]}"
            if time.monotonic() - begin > limit:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"{limit} s passed:\n{self.text.decode()[-3000:]}")
            time.sleep(0.005)

    def wait(self, limit=300):
        "Exit status and output, when it has ended."
        self.wait_until(lambda: self.poll() is not None, limit)
        return self.status, self.text.decode()


def serve(connection):
    """Run the functions that messages ask for, each in a fork, until the connection is closed.

    A message brings the ends of two pipes: one takes the output, the other pid and exit status.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, pipes, *_ = socket.recv_fds(connection, 2**16, 2)
        if not message:
            return
        if not os.fork():
            connection.close()
            _watch(*json.loads(message), *pipes)
        for pipe in pipes:
            os.close(pipe)


def _watch(module, function, arguments, environment, output, status):
    "Fork once more: the child runs the function, this process reports how it ended."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(status)
        _run(module, function, arguments, environment, output)
    os.close(output)
    os.write(status, f"{pid}\n".encode())
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{ended}\n".encode())
    os._exit(0)


def _run(module, function, arguments, environment, output):
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.update(environment)
    try:
        status = getattr(importlib.import_module(module), function)(*arguments) or 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
