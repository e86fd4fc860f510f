"""Checkpoint of the learner: every rank writes what it owns, any number of ranks reads it; and the exported policy.

A file for each rank, safetensors: for every trained parameter NAME that it has a part of, (n,) float32 `master.NAME`,
`exp_avg.NAME` and `exp_avg_sq.NAME`, the parameter's flat elements from metadata `starts[NAME]` on; the state of its
random generators as `random.cpu` and `random.cuda.0`, ...; in the metadata also `steps` (`Zero.steps`). It is the same
for all ZeRO stages, bit for bit where it is read as it was written. What is frozen is not in it.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.policy import Policy
from learner.zero import Zero
from perception.files import sha256

RANK = "rank-{:04d}.safetensors"
TOKENIZER_AND_PROCESSOR = (".json", ".jinja", ".txt", ".model")
WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Files of the same kinds that `save_pretrained` writes itself."""


def save(zero: Zero, folder: Path) -> dict[str, str]:
    """Write this rank's file to `folder`, on a file system all ranks share. Returns its sha256 by its name."""
    cuda = {f"random.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    tensors, starts = {"random.cpu": torch.get_rng_state(), **cuda}, {}
    for name, start, parts in zero.slices():
        starts[name] = start
        tensors |= {f"{part}.{name}": values for part, values in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RANK.format(dist.get_rank())
    save_file(tensors, path, {"starts": json.dumps(starts), "steps": json.dumps(zero.steps)})
    path.chmod(0o644)  # safetensors': for its owner alone
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {path.name: sha256(path)}


def load(zero: Zero, folder: Path, weights_only: bool = False) -> None:
    """Restore what any number of ranks wrote under any ZeRO stage. Collective.

    `weights_only`: the optimizer stays as it is. Raises ValueError where a parameter is not there whole.
    """
    files = [safe_open(path, "pt") for path in sorted(folder.glob(RANK.replace("{:04d}", "*")))]
    saved = [(file, json.loads(file.metadata()["starts"])) for file in files]
    for name, start, parts in zero.slices():
        missing = end = len(parts["master"])
        for file, starts in saved:
            if name not in starts:
                continue
            there = file.get_slice(f"master.{name}").get_shape()[0]
            low, high = max(start, starts[name]), min(start + end, starts[name] + there)
            for part, values in parts.items() if low < high else ():
                if part == "master" or not weights_only:
                    theirs = file.get_slice(f"{part}.{name}")[low - starts[name] : high - starts[name]]
                    values[low - start : high - start].copy_(theirs)
            missing -= max(0, high - low)
        if missing:
            raise ValueError(f"{folder}: {missing} elements of {name} are missing; it is of another policy")
    zero.refresh()
    if weights_only:
        return
    zero.steps = json.loads(files[0].metadata()["steps"])
    if (rank := dist.get_rank()) < len(files):  # a further rank keeps the seed it has
        torch.set_rng_state(files[rank].get_tensor("random.cpu"))
        cuda = range(sum(name.startswith("random.cuda.") for name in files[rank].keys()))  # noqa: SIM118
        torch.cuda.set_rng_state_all([files[rank].get_tensor(f"random.cuda.{index}") for index in cuda])


def export(policy: Policy, weights: dict[str, Tensor], source: Path, folder: Path) -> None:
    """Write the whole weights (by `named_parameters()` name) with the tokenizer and processor files of `source`.

    The result loads in transformers and vLLM. Not collective: rank 0 calls it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(folder, state_dict=weights)
    for file in source.iterdir():
        if file.suffix in TOKENIZER_AND_PROCESSOR and file.name not in WRITTEN:
            shutil.copy2(file, folder / file.name)
