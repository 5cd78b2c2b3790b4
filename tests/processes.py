"""Python processes that tests start: forked off one that has imported other people's large packages.

A new interpreter takes ten seconds to import PyTorch, PEFT and diffusers before a test's code begins. Neither diffusers
nor anything of ours is imported beforehand, so a process here does import those, in the order of its code. A test of
what the environment or an import hook does to PyTorch or huggingface_hub needs an interpreter of its own instead.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

#: Where processes cannot fork, each one imports everything. What the large packages ask CUDA is lost to a fork.
FORKS = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
LARGE = ["torch._dynamo", "torch.distributed.run", "accelerate", "peft", "scipy.stats", "transformers.generation.utils"]
#: Stands before a process's code, which finds its own streams, environment, folder and arguments.
BEFORE = """
import os, sys
for _descriptor, _file in enumerate(_streams, 1):
    os.dup2(os.open(_file, os.O_WRONLY | os.O_CREAT), _descriptor)
os.environ.clear()
os.environ.update(_environment)
os.chdir(_folder)
sys.argv = ["-c", *_arguments]
"""

if FORKS:
    from multiprocessing import forkserver

    # Now, because the first test to need it may have changed the environment. It goes on by itself, and ends with us.
    CONTEXT.set_forkserver_preload(LARGE)
    forkserver.ensure_running()


class Child:
    """A running process; `returncode`, `stdout` and `stderr` once it has been waited for."""

    def __init__(self, code: str, arguments: tuple[object, ...], names: dict[str, Any], env: dict[str, str] | None):
        self._streams = tempfile.TemporaryDirectory()
        self.files = [Path(self._streams.name) / name for name in ("stdout", "stderr")]
        given = {
            "_streams": [str(f) for f in self.files], "_environment": dict(os.environ if env is None else env),
            "_folder": os.getcwd(), "_arguments": [str(a) for a in arguments],
        }  # fmt: skip
        space = {"__name__": "__main__", **given, **names}
        self.process = CONTEXT.Process(target=exec, args=(BEFORE + code, space), daemon=True)
        self.process.start()

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()

    def wait(self, timeout: float = 200) -> Child:
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"the process ran for more than {timeout} s")
        self.stdout, self.stderr = (f.read_text() if f.exists() else "" for f in self.files)
        return self


def start(code: str, *arguments: object, env: dict[str, str] | None = None, **names: Any) -> Child:
    """Begin a process that runs `code` with sys.argv[1:] = `arguments`; `names` are variables that it has."""
    return Child(code, arguments, names, env)


def run(code: str, *arguments: object, env: dict[str, str] | None = None, **names: Any) -> Child:
    """Run `code` to its end."""
    return start(code, *arguments, env=env, **names).wait()


def together(code: str, *arguments: object, processes: int = 2) -> list[Child]:
    """Run `code` in several processes that make one group of torch.distributed, in the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common["LOCAL_WORLD_SIZE"] = str(processes)
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    children = [start(code, *arguments, env=common | rank) for rank in ranks]
    return [child.wait() for child in children]
