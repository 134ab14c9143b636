"""`Popen` and `run` as of subprocess, for Python processes that need not import torch and its companions again.

A server imports them once (5 to 10 seconds of processor time) and forks. What it forks runs its module, script or code
as `python` does, as a child of the process that asked for it. Libraries of Hugging Face read the environment while they
are imported: a process that has a Hub or a home of its own imports them itself.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

COMPANIONS = [
    *("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("scipy.stats", "sklearn.datasets", "PIL.PngImagePlugin", "PIL.ImageDraw", "httpx", "requests", "yaml", "jinja2"),
]
HUGGING_FACE = [
    *("accelerate", "datasets", "transformers.hf_argparser", "transformers.modeling_utils", "transformers.pipelines"),
    *("transformers.image_processing_utils", "transformers.models.clip.modeling_clip", "diffusers.training_utils"),
    *("diffusers.models.unets.unet_2d", "diffusers.pipelines.pipeline_utils", "diffusers.optimization"),
]
PR_SET_CHILD_SUBREAPER = 36
_servers: dict[str, socket.socket] = {}


class Popen(subprocess.Popen):
    """As subprocess.Popen, of `[sys.executable, "-m" | "-c" | a script, ...]`."""

    def _execute_child(self, args, *rest) -> None:
        cwd, env, pipes, new_session = rest[4], rest[5], rest[9:15], rest[20]
        env = dict(os.environ if env is None else env)
        stdin, _, _, stdout, _, stderr = pipes
        files = [number if file == -1 else file for number, file in enumerate((stdin, stdout, stderr))]
        request = {"args": list(map(str, args[1:])), "cwd": str(cwd or Path.cwd()), "env": env, "session": new_session}
        socket.send_fds(server := _server(env), [json.dumps(request).encode()], files)
        self.pid = int(server.recv(64))
        self._child_created = True
        self._close_pipe_fds(*pipes)


def launch(args: list[Any], processes: int, env: dict[str, str] | None = None, **more: Any) -> list[Popen]:
    """Starts processes that find each other as those of torchrun do; no launcher ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**(os.environ if env is None else env), **shared}
    return [Popen(args, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **more) for rank in range(processes)]


def run(
    args: list[Any], *, processes: int = 1, timeout: float | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with capture_output and text; of several processes the worst status, and what all wrote."""
    more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [Popen(args, **more)] if processes == 1 else launch(args, processes, **more)
    try:
        with ThreadPoolExecutor() as pool:
            written = list(pool.map(lambda process: process.communicate(timeout=timeout), started))
    finally:
        for process in started:
            process.kill()
    status = max((process.returncode for process in started), key=abs)
    return subprocess.CompletedProcess(args, status, *map("".join, zip(*written, strict=True)))


def _server(env: dict[str, str]) -> socket.socket:
    ours = ("HF_", "HUGGING")
    at_import = {name: value for name, value in env.items() if name.startswith(ours)}
    key = str(at_import) if at_import.keys() <= {"HF_HUB_OFFLINE"} else "a Hub or a home of its own"
    if key not in _servers:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _servers[key], requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        modules = COMPANIONS + (HUGGING_FACE if key == str(at_import) else [])
        others = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [sys.executable, __file__, str(requests.fileno()), *modules]
        subprocess.Popen(command, pass_fds=[requests.fileno()], env=others | at_import, cwd="/")
        requests.close()
    return _servers[key]


def _serve(requests: socket.socket) -> None:
    """Returns in each new process; ends the server when nobody is left to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        if (between := os.fork()) == 0:
            if (pid := os.fork()) == 0:
                for file in (reading, writing, requests.detach()):
                    os.close(file)
                return _become(json.loads(message), files)
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)  # its child is now one of the process that asked
        requests.send(os.read(reading, 64))
        for file in (reading, writing, *files):
            os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = _run(*request["args"])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 255)  # Python's own way takes seconds over memory that is shared


def _run(how: str, *rest: str) -> int:
    """Runs what stands behind `python` on a command line, and returns its exit status."""
    sys.argv = [*rest] if how == "-m" else ["-c", *rest[1:]] if how == "-c" else [how, *rest]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[0] = {"-m": os.getcwd(), "-c": ""}.get(how, str(Path(how).parent))
    try:
        if how == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            runpy.run_path(how, run_name="__main__")
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    for name in sys.argv[2:]:
        import_module(name)
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
