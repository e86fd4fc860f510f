"""Matrix rate of a device: useful FLOPs (`Family.flops`) per second over it are the MFU."""

import time

import torch

_SQUARE = {"cuda": 8192, "cpu": 768}


class MatrixRate:
    """FLOP/s of a plain square matrix product on this device: the best seen so far, since other load only lowers it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._side = _SQUARE[device.type]
        self._factors = [torch.randn(self._side, self._side, device=device).to(dtype) for _ in range(2)]
        self._best = 0.0
        for _ in range(4):
            self.measure()

    def measure(self) -> float:
        """Take one more product's time, which is milliseconds; returns the best rate."""
        synchronize = torch.get_device_module(self._factors[0].device).synchronize
        synchronize()
        began = time.perf_counter()
        torch.mm(*self._factors)
        synchronize()
        self._best = max(self._best, 2.0 * self._side**3 / (time.perf_counter() - began))
        return self._best
