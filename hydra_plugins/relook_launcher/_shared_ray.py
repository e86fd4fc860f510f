"""A local Ray that several runs share. As a program it prints its address, and stays until its starter goes away."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from threading import Timer

import ray

from perception.config import PlacementConfig
from perception.errors import UserError
from runtime import cluster

START_S = 120.0


@contextmanager
def shared_ray(wanted: bool) -> Iterator[dict[str, str]]:
    """What the environment of those who share it needs; nothing where RAY_ADDRESS names a cluster, which all join.

    Raises UserError where it does not start.
    """
    if not wanted or cluster.cluster_address() is not None:
        yield {}
        return
    program = (sys.executable, "-m", __name__)
    with Popen(program, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None, "a pipe"
        (limit := Timer(START_S, process.kill)).start()
        address = process.stdout.readline().strip()
        limit.cancel()
        if not address:
            raise UserError(f"the Ray that the combinations were to share did not start within {START_S:g} s")
        yield {"RAY_ADDRESS": address}


if __name__ == "__main__":
    cluster.connect(PlacementConfig(name="shared", device="cpu"))
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
