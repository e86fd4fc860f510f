"""Traces: what a worker's process computes, as torch's profiler sees it."""

from pathlib import Path
from typing import Any


class Traced:
    """A worker that can be traced: operations of torch on the CPU, and kernels on the GPU."""

    _relook_profiler: Any = None

    def trace(self, file: str = "") -> None:
        """Begin, unless it is on; with a file, end and write what was recorded there, in Chrome's trace format."""
        from torch.profiler import profile  # a reward worker without SAM2 has no torch

        if not file and self._relook_profiler is None:
            self._relook_profiler = profile(schedule=getattr(self, "_relook_schedule", None))  # None: all of it
            self._relook_profiler.start()
        elif file and self._relook_profiler is not None:  # where it was restarted in between there is none
            self._relook_profiler.stop()
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            self._relook_profiler.export_chrome_trace(file)
            self._relook_profiler = None
