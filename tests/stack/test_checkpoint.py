"""Guards the learner's checkpoints with real DeepSpeed ranks: any number of them, any ZeRO stage, the same states.

Three processes, started once: two ranks of one group (`TWO`), and a group of one rank (`ONE`). Each saves, and loads
what the other has saved, into learners that have something to forget.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from learner import checkpoint
from learner.policy import load_policy
from learner.step import Stepper
from learner.zero import gathered, sharded_loading
from perception.config import AlgorithmConfig, LearnerConfig, LoraConfig
from perception.types import Group, PolicySpec
from tests import builders, tiny_policy
from tests.builders import sampled_group

ALGORITHM = AlgorithmConfig(steps=10, prompts_per_step=2, group_size=2, importance="none", clip_high=5.0)
LORA = {"lora": LoraConfig(rank=2, targets=("q_proj", "down_proj"))}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero 1": ("float32", {"zero_stage": 1}),
    "zero 1, bfloat16": ("bfloat16", {"zero_stage": 1}),
    "zero 2, two groups": ("float32", {"zero_stage": 2}),
    "zero 2, frozen vision": ("float32", {"zero_stage": 2, "freeze_vision": True}),
    "zero 2, offload": ("bfloat16", {"zero_stage": 2, "offload_optimizer": True}),
    "zero 3, two groups": ("float32", {"zero_stage": 3}),
    "zero 3, lora": ("bfloat16", {"zero_stage": 3, **LORA}),
    "zero 3, frozen vision, offload": ("float32", {"zero_stage": 3, "freeze_vision": True, "offload_optimizer": True}),
}
"""Number format and learner's settings, by name."""
ACROSS = {
    "zero 1": "zero 3, two groups",
    "zero 1, bfloat16": "zero 2, offload",
    "zero 2, two groups": "zero 3, two groups",
    "zero 2, frozen vision": "zero 3, frozen vision, offload",
    "zero 2, offload": "zero 1, bfloat16",
    "zero 3, two groups": "zero 1",
    "zero 3, frozen vision, offload": "zero 2, frozen vision",
}
"""A checkpoint of the first is also loaded by the second."""
SHARED = ("zero 1, bfloat16", "zero 2, two groups", "zero 3, lora", "zero 3, frozen vision, offload")
"""Those that `ONE` saves, too, and both load from the other."""
SKIPS = "zero 1"
"""The one with a step that was skipped."""
WAIT_S = 240.0

State = dict[str, Tensor]
"""`master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` as flat tensors, `NAME` the weights themselves, and `steps`."""


def stepper(spec: PolicySpec, case: str) -> Stepper:
    dtype, settings = CASES[case]
    config = LearnerConfig(lr=1e-2, warmup_steps=5, micro_tokens=90, **settings)
    with sharded_loading(config, dtype):
        policy = load_policy(replace(spec, dtype=dtype), 0.9, config, lambda handle: handle.ref)
    with pytest.MonkeyPatch.context() as patch:
        if "two groups" in case:
            patch.setattr("torch.optim.AdamW", in_two_groups(torch.optim.AdamW))
        return Stepper(policy, None, builders.config(learner=config, algorithm=ALGORITHM))


def in_two_groups(adam: type) -> Any:
    def make(parameters: list[nn.Parameter], **settings: Any) -> Any:
        return adam([{"params": parameters[:9]}, {"params": parameters[9:]}], **settings)

    return make


def state(learner: Stepper) -> State:
    """What this rank owns, with its place in the parameter, and the whole weights."""
    found: dict[str, Any] = {"steps": torch.tensor(learner.zero.steps)}
    for name, start, parts in learner.zero.slices():
        found |= {f"{part}.{name}": (start, values.clone()) for part, values in parts.items()}
    parameters = dict(learner._policy.named_parameters())
    with gathered(list(parameters.values())):
        return found | {name: parameter.detach().clone() for name, parameter in parameters.items()}


def saved(spec: PolicySpec, case: str, groups: list[Group], folder: Path) -> tuple[Stepper, State]:
    """A learner after a step, in one case also one that was skipped, and its checkpoint in `folder`."""
    learner = stepper(spec, case)
    for advantage in (1.0, np.inf) if case == SKIPS else (1.0,):
        learner.update([[with_advantage(group, advantage) for group in groups]])
    checkpoint.save(learner.zero, folder)
    dist.barrier()
    return learner, state(learner)


def with_advantage(group: Group, value: float) -> Group:
    return replace(group, trajectories=tuple(replace(one, advantage=value) for one in group.trajectories))


def loaded(learner: Stepper, folder: Path, weights_only: bool = False) -> State:
    checkpoint.load(learner.zero, folder, weights_only)
    return state(learner)


def stepped(learner: Stepper, groups: list[Group]) -> State:
    learner.update([groups])
    return state(learner)


def answer(process: int, spec: PolicySpec, folder: Path) -> None:
    world, rank = (2, process) if process < 2 else (1, 0)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "DS_ACCELERATOR": "cpu"}
    os.environ |= {name: str(value) for name, value in names.items()}
    logging.disable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / f"store-{world}"), world), rank=rank, world_size=world
    )
    rng = np.random.default_rng(4)
    groups = [sampled_group(spec, rng, n=2) for _ in range(2)]
    mine = groups[rank::world]
    found: dict[Any, State] = {}
    own, others = (folder / f"saved by {count}" for count in (world, 3 - world))
    own.mkdir(exist_ok=True)
    learners: dict[str, Stepper] = {}
    for case in CASES if world == 2 else SHARED:
        learners[case], found["saved", case] = saved(spec, case, mine, own / case)
        if world == 2:
            found["went on", case] = stepped(learners[case], mine)
            learners[case] = stepper(spec, case)
            found["loaded", case] = loaded(learners[case], own / case)
            found["went on again", case] = stepped(learners[case], mine)
    (own / f"done-{rank}").touch()
    for case in ACROSS if world == 2 else ():
        found["across", case] = loaded(learners[ACROSS[case]], own / case)
    if world == 2:
        found["weights"] = loaded(stepper(spec, "zero 1"), own / "zero 1", weights_only=True)
    began = time.monotonic()
    while not all((others / f"done-{other}").exists() for other in range(3 - world)):
        assert time.monotonic() < began + WAIT_S, "the other ranks"
        time.sleep(0.1)
    for case in SHARED:
        found["of others", case] = loaded(learners[case], others / case)
    torch.save(found, folder / f"{process}.pt")


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[Any, State]]]:
    """What the ranks of each group answered."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(answer, (tiny_policy.build(folder / "policy"), folder), nprocs=3, start_method="spawn")
    found = [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(3)]
    return {"TWO": found[:2], "ONE": found[2:]}


def whole(ranks: list[dict[Any, State]], question: Any) -> State:
    """The states of all ranks put together, whose parts must be all there and fit without a gap."""
    found: State = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in ranks:
        for name, value in rank[question].items():
            if isinstance(value, tuple):
                parts.setdefault(name, []).append(value)
            else:
                assert name not in found or torch.equal(found[name], value), f"ranks differ in {name}"
                found[name] = value
    for name, own in parts.items():
        end = 0
        for start, values in sorted(own, key=lambda part: part[0]):
            assert start == end, name
            end += len(values)
        assert end == found[name.partition(".")[2]].numel()
        found[name] = torch.cat([values for _, values in sorted(own, key=lambda part: part[0])])
    return found


def same(one: State, other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def trained(found: State) -> set[str]:
    return {name.partition(".")[2] for name in found if name.startswith("master.")}


@pytest.mark.parametrize("case", CASES)
def test_as_many_ranks_go_on_bit_for_bit(answers: Any, case: str) -> None:
    before, after = whole(answers["TWO"], ("saved", case)), whole(answers["TWO"], ("went on", case))
    same(whole(answers["TWO"], ("loaded", case)), before)
    same(whole(answers["TWO"], ("went on again", case)), after)
    assert before["steps"].tolist() == [1, 1 + (case == SKIPS)]
    assert after["steps"].tolist() == [2, 2 + (case == SKIPS)]
    moved = {name for name in trained(after) if not torch.equal(before[f"master.{name}"], after[f"master.{name}"])}
    assert moved == trained(after), "the step does something"
    if "frozen" in case:
        assert {name for name in before if name.startswith("model.")} - moved
    assert ("lora" in case) == all("lora" in name for name in moved)


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize(("these", "those"), [("ONE", "TWO"), ("TWO", "ONE")])
def test_another_number_of_ranks_has_the_same_states(answers: Any, case: str, these: str, those: str) -> None:
    same(whole(answers[these], ("of others", case)), whole(answers[those], ("saved", case)))


@pytest.mark.parametrize("case", ACROSS)
def test_another_stage_has_the_same_states(answers: Any, case: str) -> None:
    same(whole(answers["TWO"], ("across", case)), whole(answers["TWO"], ("saved", case)))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_their_masters_rounded(answers: Any, case: str) -> None:
    found = whole(answers["TWO"], ("loaded", case))
    for name in trained(found):
        assert torch.equal(found[name].flatten(), found[f"master.{name}"].to(found[name].dtype)), name


def test_weights_alone_leave_a_fresh_optimizer(answers: Any) -> None:
    found, before = whole(answers["TWO"], "weights"), whole(answers["TWO"], ("saved", "zero 1"))
    assert found["steps"].tolist() == [0, 0]
    for name, value in found.items():
        if name.startswith("exp_avg"):
            assert not value.any()
        elif name != "steps":
            assert torch.equal(value, before[name])
