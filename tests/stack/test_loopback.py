"""A Ray that a run starts for itself: no other machine reaches it, and it obeys nobody without its token."""

from __future__ import annotations

import os
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray
from ray._private.parameter import RayParams

from perception.config import PlacementConfig
from runtime import cluster
from tests.listeners import Listener, listeners, outside

WAIT_S = 120.0
AGENT_PORTS = range(20000, 32000)
"""The dashboard agent takes jobs at a free one of these: its usual port may belong to another Ray, and then it takes
none. Below the ports that the kernel gives out by itself: one of those is gone again before the agent is there."""

pytestmark = pytest.mark.own_ray


@pytest.fixture(scope="module")
def agent() -> int:
    return next(port for port in random.sample(AGENT_PORTS, 50) if not listens("127.0.0.1", port))


@pytest.fixture(scope="module")
def running(agent: int) -> Iterator[set[Listener]]:
    """Everything that listens in a local run. The agents come some seconds after `ray.init` has returned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        port = property(lambda _: agent, lambda *_: None)
        patch.setattr(RayParams, "dashboard_agent_listen_port", port, raising=False)
        cluster.connect(PlacementConfig(name="cpu", device="cpu"))
        try:
            ray.get(ray.remote(num_cpus=0.1)(lambda: None).remote(), timeout=60)  # so that there is a worker
            wait("the dashboard agent", lambda: ("127.0.0.1", agent) in {one[1:] for one in listeners()})
            wait("the other agent", lambda: any("RuntimeEnvAgent" in one[0] for one in listeners()))
            yield listeners()
        finally:
            ray.shutdown()


def wait(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:g} s for {what}: {listeners()}")
        time.sleep(0.2)


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5.0)
        return probe.connect_ex((host, port)) == 0


def submit(agent: int, token: str | None) -> int:
    """HTTP status of a job submission to the agent. It has no entry point, so that no job comes of it."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    url = f"http://127.0.0.1:{agent}/api/job_agent/jobs/"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", headers=headers), timeout=5.0) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_everything_listens_on_loopback_only(running: set[Listener]) -> None:
    assert len(running) > 6  # GCS, raylet, driver, worker, agents
    assert outside(running) == set()


def test_a_job_is_taken_from_this_machine_and_with_the_token_only(agent: int, running: set[Listener]) -> None:
    assert submit(agent, None) == 401
    assert submit(agent, "0" * 64) in (401, 403)
    assert submit(agent, os.environ["RAY_AUTH_TOKEN"]) not in (401, 403)
    outer = {a.address for every in psutil.net_if_addrs().values() for a in every if a.family is socket.AF_INET}
    assert [address for address in outer if not address.startswith("127.") and listens(address, agent)] == []
