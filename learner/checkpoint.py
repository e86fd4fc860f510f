"""Checkpoint of the learner: model, optimizer and random state, bit for bit."""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from learner.zero import Zero
from perception.files import replacing, scratch_path

TAG = "learner"


def save(zero: Zero, folder: Path) -> None:
    """Write to `folder`, on a file system all ranks share; it appears whole or not at all. An old one is replaced."""
    rank = dist.get_rank()
    with replacing(folder) if rank == 0 else nullcontext(scratch_path(folder)) as scratch:
        if rank == 0:
            scratch.mkdir(parents=True)
        dist.barrier()
        zero.save(str(scratch), TAG)
        random_state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save(random_state, scratch / f"random-{rank}.pt")
        dist.barrier()
    dist.barrier()


def load(zero: Zero, folder: Path) -> None:
    """Restore what `save` wrote, with the same number of ranks and ZeRO stage.

    Raises FileNotFoundError when this rank's part is missing.
    """
    mine = folder / f"random-{dist.get_rank()}.pt"
    if not mine.is_file():
        raise FileNotFoundError(f"{mine}: missing; a checkpoint is loaded with as many learner ranks as saved it")
    zero.load(str(folder), TAG)
    random_state = torch.load(mine, weights_only=True)
    torch.set_rng_state(random_state["cpu"])
    torch.cuda.set_rng_state_all(random_state["cuda"])
