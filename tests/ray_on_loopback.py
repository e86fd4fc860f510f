"""`python tests/ray_on_loopback.py start ...` is `ray start ...`, but for a node that listens on loopback only.

Ray's own command turns `--node-ip-address=127.0.0.1` into the outer address, and refuses to join a cluster where the
variable is set that makes it stay on loopback: here it is set after Ray has been imported, for what Ray starts.
"""

from __future__ import annotations

import os
import sys

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

if __name__ == "__main__":
    for name in ON_LOOPBACK:
        os.environ.pop(name, None)

    from ray._private import services
    from ray.scripts.scripts import main

    services.resolve_ip_for_localhost = lambda host: host
    os.environ.update(ON_LOOPBACK)
    sys.argv[0] = "ray"
    main()
