"""Commands: train, evaluate, sft, world, doctor; their parts in run/, record/, report/."""

import io
import sys

from runtime.loopback import confine_ray

confine_ray()  # before any module below imports Ray
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a terminal that knows ASCII alone is no reason to end a run
        stream.reconfigure(errors="backslashreplace")
