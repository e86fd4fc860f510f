"""Checkpoint of the learner: every rank writes what it owns, any number of ranks reads it.

A file for each rank, safetensors: for every trained parameter NAME that it has a part of, (n,) float32 `master.NAME`,
`exp_avg.NAME` and `exp_avg_sq.NAME`, the parameter's flat elements from metadata `starts[NAME]` on; the state of its
random generators as `random.0` (the CPU's), `random.1`, ...; in the metadata also `steps` (`Zero.steps`). States are
exact whoever reads them; as many ranks under the same ZeRO stage also go on bit for bit. What is frozen is not there.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from learner.zero import Zero
from perception.files import sha256


def save(zero: Zero, folder: Path) -> dict[str, str]:
    """Write this rank's file to `folder`, on a file system all ranks share. Returns its SHA-256 by its name."""
    random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    tensors, starts = {f"random.{index}": state for index, state in enumerate(random)}, {}
    for name, start, parts in zero.slices():
        starts[name] = start
        tensors |= {f"{part}.{name}": values for part, values in parts.items()}
    folder.mkdir(exist_ok=True)  # not its parents: a node that does not see them fails here
    path = folder / f"rank-{dist.get_rank():04d}.safetensors"
    save_file(tensors, path, {"starts": json.dumps(starts), "steps": json.dumps(zero.steps)})
    path.chmod(0o644)  # safetensors': for its owner alone
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {path.name: sha256(path)}


def load(zero: Zero, folder: Path, weights_only: bool = False) -> None:
    """Restore what any number of ranks wrote under any ZeRO stage. Collective.

    `weights_only`: the optimizer stays as it is. Raises ValueError where a parameter is not there whole.
    """
    files = [safe_open(path, "pt") for path in sorted(folder.glob("rank-*.safetensors"))]
    starts = [json.loads(file.metadata()["starts"]) for file in files]
    for name, start, parts in zero.slices():
        missing = count = len(parts["master"])
        for file, at in ((file, own[name]) for file, own in zip(files, starts, strict=True) if name in own):
            (there,) = file.get_slice(f"master.{name}").get_shape()
            low, high = max(start, at), min(start + count, at + there)
            for part in () if low >= high else ("master",) if weights_only else parts:
                parts[part][low - start : high - start].copy_(file.get_slice(f"{part}.{name}")[low - at : high - at])
            missing -= max(0, high - low)
        if missing:
            raise ValueError(f"{folder}: {missing} elements of {name} are missing: it is of another policy")
    zero.refresh()
    if not weights_only:
        zero.steps = json.loads(files[0].metadata()["steps"])
        for own in files[dist.get_rank() :][:1]:  # a rank more than there were keeps what it has
            cpu, *cuda = (own.get_tensor(name) for name in sorted(own.keys()) if name.startswith("random."))
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(cuda)
