"""Which sockets a process and everything below it listen on."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address

import psutil

Listener = tuple[str, str, int]
"""Command line of the process, address, port."""


def listeners() -> set[Listener]:
    """Every listening socket of this process and all its descendants."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # ended since it was listed
            name = " ".join(process.cmdline())
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    found.add((name, one.laddr.ip, one.laddr.port))
    return found


def outside(found: set[Listener]) -> set[Listener]:
    """Those that another machine could reach. gRPC's loopback is an IPv4 address mapped into IPv6."""
    return {one for one in found if not ip_address(one[1].removeprefix("::ffff:")).is_loopback}
