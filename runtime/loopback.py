"""A Ray that a run starts for itself is reached from this machine alone, and by nobody without its token."""

import os
import secrets
import sys

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def confine_ray() -> None:
    """Set what Ray and torch read from the environment. Call it before the first `import ray` of the process.

    Without RAY_ADDRESS everything that `ray.init` starts, and the process groups of its workers, listen on loopback
    only, and each request to Ray needs a random token, which the workers inherit. A program that joins a Ray on
    loopback must itself stay there; its token is the environment's. Any other cluster is left as it is, and so are the
    workers of a cluster, where Ray has been imported already.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address
    elsewhere = address and address.removeprefix("ray://").rpartition(":")[0].strip("[]") not in _LOOPBACK
    if elsewhere or "ray" in sys.modules:
        return
    # For Ray this makes the machine a laptop, which is no node of a cluster: its own address is then 127.0.0.1. Ray
    # turns a loopback address that it is given, in whatever other way, back into the outer one.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
