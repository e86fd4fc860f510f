"""A real Ray cluster of two raylets on this machine: own ports, own folder, torn down by process id.

It listens on loopback only, and wants the token of this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class RayCluster:
    address: str
    """host:port, as RAY_ADDRESS takes it."""
    dashboard: str
    """http://host:port, as `ray job submit --address` takes it."""

    def submit(self, *entrypoint: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir <repository> -- ENTRYPOINT`, until the job ends; `stdout` holds its log."""
        command = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *entrypoint]
        try:
            return subprocess.run(
                command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            log = (error.stdout or b"").decode()[-4000:]  # bytes even with text=True
            raise TimeoutError(f"the job did not end within {timeout_s:g} s; the end of its log: {log}") from error


@contextlib.contextmanager
def two_nodes(cpus: tuple[int, int] = (1, 1), start_timeout_s: float = 180.0) -> Iterator[RayCluster]:
    """Head and second node with so many CPUs each; ready for jobs when entered."""
    port, dashboard, *others = _free_ports(5)
    # Short, because sockets lie below it; its own, so that no other Ray here takes this cluster for its own.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    cluster = RayCluster(address=f"127.0.0.1:{port}", dashboard=f"http://127.0.0.1:{dashboard}")
    common = ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    head = [
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={others[0]}",
        f"--ray-client-server-port={others[1]}",
        f"--num-cpus={cpus[0]}",
    ]
    second = [
        f"--address={cluster.address}",
        f"--dashboard-agent-listen-port={others[2]}",
        f"--num-cpus={cpus[1]}",
    ]
    started = []
    try:
        started.append(_start([*head, *common], folder / "head.log"))
        _wait("the head's GCS", lambda: _listens(port), folder / "head.log", start_timeout_s)
        started.append(_start([*second, *common], folder / "second.log"))
        _wait("the second node", lambda: _nodes(cluster) == 2, folder / "second.log", start_timeout_s)
        yield cluster
    finally:
        _stop(started)
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """A job's `python` is the one on the PATH of the process that started the head."""
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        command = [sys.executable, ROOT / "tests" / "ray_on_loopback.py", "start", *arguments]
        return subprocess.Popen(command, env=_environment(), stdout=out, stderr=out)


def _stop(started: Sequence[subprocess.Popen[bytes]], grace_s: float = 15.0) -> None:
    """SIGTERM, which `ray start --block` passes on; then SIGKILL to whatever it left."""
    family = [psutil.Process(p.pid) for p in started if p.poll() is None]
    family += [child for parent in family for child in parent.children(recursive=True)]
    for process in started:
        process.terminate()
    for survivor in psutil.wait_procs(family, timeout=grace_s)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    for process in started:
        process.wait(5.0)


def _wait(what: str, ready: Callable[[], bool], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not there within {timeout_s:g} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _nodes(cluster: RayCluster) -> int:
    """Nodes the head counts as alive; 0 while its dashboard, which also takes the jobs, is not up."""
    try:
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{cluster.dashboard}/nodes?view=summary", headers=headers)
        with urllib.request.urlopen(request, timeout=5.0) as reply:
            nodes = json.load(reply)["data"]["summary"]
    except OSError:
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
