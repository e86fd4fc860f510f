"""Lets `import torchvision` succeed when its wheel was built for CUDA and torch for CPU.

Beside CPU torch such a wheel cannot load its C++ operators, and the import dies with "operator torchvision::nms does
not exist", although transforms and image processors never call them. Declaring the two schemas that torchvision
decorates at import time is enough. Where the operators load (CUDA builds, matching CPU builds) nothing is declared.

`torchvision_cpu_ops.pth` imports this file at the start of every interpreter of the environment, because vLLM and Ray
start processes of their own; so the import of torch is put off until torchvision itself is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_missing(folder: str) -> None:
    """Declare torchvision's operator schemas unless the extension in `folder` can be loaded."""
    import torch

    try:
        torch.ops.load_library(f"{folder}/_C.so")
    except OSError:
        for name, schema in SCHEMAS.items():
            torch.library.define(name, schema)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        declare_missing(module.__path__[0])
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]  # a finder needs find_spec only
