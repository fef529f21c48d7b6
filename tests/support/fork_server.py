"""A process that has imported what a run imports, and forks one for each run: imports are four fifths of a tiny run.

What it forks is a process of its own and a child of the tests: arguments, working directory, environment, pipes, signals,
exit path and exit code are those of `python ...`. One thing differs: what Python reads once, when it starts or imports
(most environment variables, the seed of its hashes), is read once for all. So a process whose environment differs in other
variables than READ_LATE is spawned, and so are `python -c` and what tests ask for by `fork=False`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

PRELOADED = (
    *("accelerate", "jsonargparse", "pandas", "pyarrow.parquet", "tokenizers.trainers", "typeshed_client", "yaml"),
    *("torch.distributed.checkpoint.hf_storage", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.convert_slow_tokenizer", "transformers.pipelines"),
    *("recipe.checkpoint", "recipe.data.remote_files", "recipe.finish", "recipe.model", "recipe.step"),
)
READ_LATE = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FAULTY_", "PYTHONUNBUFFERED"),
    *("HF_TOKEN", "PYTHONIOENCODING", "TRACKIO_"),
)
BECOME_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: grandchildren whose parent has ended become children


class ForkServer:
    """Starts the process; it ends with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self._lock = environment, threading.Lock()
        ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())]
            variables = {**environment, "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # or pyarrow starts a thread
            self._process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()])

    def can_run(self, command: Sequence[str], environment: dict[str, str]) -> bool:
        """Whether `command` is a Python script or module whose environment differs only in what is read late."""
        differing = {name for name, _ in environment.items() ^ self.environment.items()}
        is_script = command[1] == "-m" or not command[1].startswith("-")
        return command[0] == sys.executable and is_script and all(n.startswith(READ_LATE) for n in differing)

    def fork(self, arguments: Sequence[str], cwd: str, environment: dict[str, str], files: list[int]) -> int:
        """The id of a new child of this process, which is `python arguments` with these three files."""
        with self._lock:
            socket.send_fds(self._connection, [json.dumps([arguments, cwd, environment]).encode()], files)
            process_id = int(self._connection.recv(16))
            assert self._connection.recv(16) == b"it is your child"
        return process_id


class ForkedProcess(subprocess.Popen[str]):
    """A Popen whose process is forked by a server."""

    def __init__(self, server: ForkServer, command: Sequence[str], **options: Any) -> None:
        self.server = server
        super().__init__(command, text=True, **options)

    def _execute_child(self, args: Any, *options: Any) -> None:  # all else of Popen works on any child
        cwd, environment, pipes = str(options[4]), options[5], options[9:15]
        files = [given if given != -1 else number for number, given in enumerate(pipes[i] for i in (0, 3, 5))]
        self.pid = self.server.fork(args[1:], cwd, environment, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def serve(connection: socket.socket) -> None:
    """Fork at each request. Returns in what was asked for, when that is over."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)  # the tests are over
        if os.fork():
            os.wait()  # for the one between, whose end makes the new process a child of the tests
            connection.send(b"it is your child")
            for file in files:
                os.close(file)
        elif child := os.fork():
            connection.send(str(child).encode())
            os._exit(0)
        else:
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return become_python(*json.loads(message))


def become_python(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Do what `python arguments` does after its imports."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    encoding, is_unbuffered = environment.get("PYTHONIOENCODING", "utf-8"), "PYTHONUNBUFFERED" in environment
    for number, name in enumerate(("stdout", "stderr"), start=1):  # of the files that these are now
        buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, None, None, number == 2 or os.isatty(1), is_unbuffered))
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("recipe.config.command_line").run_parser()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    gc.freeze()  # what is there stays: no run has to look at it, and copy its pages
    serve(socket.socket(fileno=int(sys.argv[1])))
