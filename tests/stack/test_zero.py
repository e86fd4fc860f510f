"""Guards ZeRO across ranks with unlike work, and what a rank holds: two processes, started once for all questions.

Not Ray actors, so that their modules can be patched: small chunks of logits, and no parameter too small to be sharded.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from transformers import modeling_utils

import learner.head
import learner.zero
from learner import checkpoint
from learner.loss import policy_loss
from learner.policy import Policy, load_policy
from learner.rows import pieces
from learner.step import OptimizerStep, Stepper
from learner.zero import Zero, gathered, sharded_loading
from perception.config import AlgorithmConfig, LearnerConfig, RolloutConfig
from perception.types import Group, PolicySpec
from tests import builders, tiny_policy
from tests.builders import sampled_group, with_advantages
from tests.gradients import distance

ALGORITHM = AlgorithmConfig(steps=10, prompts_per_step=2, group_size=2, importance="none", clip_high=5.0)
MICRO_BATCHES = ("one micro-batch", "five micro-batches")
CHUNK = 8
"""Tokens whose logits are held at once."""


class Rank:
    """One of the two processes. Every question is asked of both, in the order of `QUESTIONS`."""

    def __init__(self, rank: int, spec: PolicySpec, folder: Path) -> None:
        self.rank, self.spec, self.folder = rank, spec, folder

    def mine(self, name: str) -> list[Group]:
        return groups(self.spec)[name][self.rank]

    def load(self, config: LearnerConfig, dtype: str = "float32") -> Policy:
        with sharded_loading(config, dtype):
            return load_policy(replace(self.spec, dtype=dtype), 0.9, config, lambda handle: handle.ref)

    def learner(self, stage: int, dtype: str = "float32", kl: float = 0.0, **settings: Any) -> Stepper:
        config = LearnerConfig(zero_stage=stage, lr=1e-3, **{"micro_tokens": 90} | settings)  # type: ignore[arg-type]
        reference = self.load(config, dtype) if kl else None
        algorithm, rollout = replace(ALGORITHM, kl_coef=kl), RolloutConfig(max_new_tokens=16)
        return Stepper(
            self.load(config, dtype), reference, builders.config(learner=config, algorithm=algorithm, rollout=rollout)
        )

    def gradients(self, stage: int, name: str, **settings: Any) -> dict[str, Tensor]:
        """What a step over the groups of that name takes, before it is clipped."""
        from deepspeed.utils import safe_get_full_grad

        stepper, found = self.learner(stage, **settings), {}
        step = stepper.zero.step

        def stepping() -> tuple[float, float]:
            found.update({name: safe_get_full_grad(p) for name, p in stepper._policy.model.named_parameters()})
            return step()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stepper.zero, "step", stepping)
            stepper.update([self.mine(name)])
        return found

    def reductions(self, dtype: str, name: str) -> list[int]:
        """Elements of every all-reduce while gradients are added up, one micro-batch for each trajectory."""
        reduce, backward = dist.all_reduce, Zero.backward
        found: list[int] = []

        def all_reduce(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            found.append(tensor.numel())
            return reduce(tensor, *arguments, **named)

        def counted(zero: Zero, loss: Tensor, last: bool) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", all_reduce)
                backward(zero, loss, last)

        stepper = self.learner(LearnerConfig().zero_stage, dtype, micro_tokens=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Zero, "backward", counted)
            stepper.update([self.mine(name)])
        return found

    def loading(self) -> dict[str, Any]:
        """Parameters' elements on this rank while every module is loaded, and what was loaded."""
        held: list[int] = []
        into_model, into_module = modeling_utils._load_state_dict_into_zero3_model, nn.Module._load_from_state_dict

        def load(model: nn.Module, *arguments: Any) -> Any:
            def watched(module: nn.Module, *arguments: Any) -> None:
                held.append(elements(model))
                into_module(module, *arguments)

            patch.setattr(nn.Module, "_load_from_state_dict", watched)
            held.append(elements(model))
            return into_model(model, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_utils, "_load_state_dict_into_zero3_model", load)
            policy = self.load(LearnerConfig(zero_stage=3), "bfloat16")
        values = whole(policy.model) | {name: one.clone() for name, one in policy.model.named_buffers()}
        return {"held": held, "after": elements(policy), "values": values}

    def reference(self, stage: int) -> tuple[list[OptimizerStep], int]:
        """Two steps with a KL in the loss, and the elements that the reference then takes."""
        stepper = self.learner(stage, kl=0.2)
        steps = [stepper.update([self.mine("images")])[0][0] for _ in range(2)]
        assert stepper._reference is not None
        return steps, elements(stepper._reference)

    def states(self, stage: int) -> dict[str, Any]:
        """Two learners in bf16 take the same steps; one is sent away and back, saves, loads and fails once."""
        stayed, other = self.learner(stage, "bfloat16"), self.learner(stage, "bfloat16")
        found: dict[str, Any] = {}

        def step(name: str, *steppers: Stepper) -> None:
            for stepper in steppers:
                stepper.update([self.mine("images")])
            one, two = whole(stayed._policy.model), whole(other._policy.model)
            found[name] = all(torch.equal(two[key], value) for key, value in one.items())

        step("first", stayed, other)
        before = allocated()
        other.zero.offload()
        found["freed"] = before - allocated()  # what is kept for later is a storage without a tensor
        other.zero.reload()
        checkpoint.save(other.zero, self.folder / f"checkpoint-{stage}")
        step("back", stayed, other)
        checkpoint.load(other.zero, self.folder / f"checkpoint-{stage}")
        step("loaded", other)
        (failed,), _ = other.update([[with_advantages(group, [np.inf, 1.0]) for group in self.mine("images")]])
        assert not np.isfinite(failed.grad_norm)
        step("after a step that was not finite", stayed, other)
        return found


def groups(spec: PolicySpec) -> dict[str, list[list[Group]]]:
    """Both ranks' groups by name."""
    rng = np.random.default_rng(4)

    def some(count: int, n: int = 2, **settings: Any) -> list[Group]:
        return [sampled_group(spec, rng, n=n, **settings) for _ in range(count)]

    return {
        "few and many tokens": [some(1, answer_tokens=4), some(1, n=9)],
        "none and many tokens": [[], some(1, n=9)],
        "text and images": [[*some(2, images=0), *some(1)], some(1, images=0)],
        "no images": [some(2, images=0), []],
        "images": [some(2), some(1)],
        "one micro-batch": [some(1, n=1), some(1, n=1)],
        "five micro-batches": [some(5, n=1), some(5, n=1)],
    }


def elements(module: nn.Module) -> int:
    """Elements of the parameters, as far as this rank has them: shards, and what is gathered."""
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in module.parameters())


def whole(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    with gathered(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def allocated() -> int:
    """Bytes of all tensors that are alive."""
    for _ in range(3):  # engines lie in cycles
        gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


QUESTIONS: dict[str, Callable[[Rank], Any]] = {
    "few and many tokens": lambda rank: rank.gradients(3, "few and many tokens"),
    "none and many tokens": lambda rank: rank.gradients(3, "none and many tokens"),
    "text and images": lambda rank: [rank.gradients(stage, "text and images", rows="padded") for stage in (1, 2, 3)],
    "no images": lambda rank: [rank.gradients(3, "no images", rows="padded")],
    "float32": lambda rank: [rank.reductions("float32", name) for name in MICRO_BATCHES],
    "bfloat16": lambda rank: [rank.reductions("bfloat16", name) for name in MICRO_BATCHES],
    "loading": Rank.loading,
    "reference": lambda rank: [rank.reference(stage) for stage in (2, 3)],
    "states": lambda rank: [rank.states(stage) for stage in (1, 2, 3)],
}


def answer(number: int, spec: PolicySpec, folder: Path) -> None:
    names = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "DS_ACCELERATOR": "cpu"}
    os.environ |= {name: str(value) for name, value in names.items()}
    logging.disable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=number, world_size=2)
    settings = learner.zero._settings

    def sharded(*arguments: Any) -> dict[str, Any]:
        found = settings(*arguments)
        found["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "overlap_comm": True}  # as on CUDA
        return found

    learner.zero._settings = sharded
    learner.head.CHUNK_LOGITS = CHUNK * 263
    rank = Rank(number, spec, folder)
    torch.save({name: ask(rank) for name, ask in QUESTIONS.items()}, folder / f"{number}.pt")


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def answers(spec: PolicySpec, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Answers of rank 0 and rank 1, by question."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(answer, (spec, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def plain_gradient(spec: PolicySpec, name: str) -> dict[str, Tensor]:
    """The same in one process: both ranks' groups in one batch of padded rows, no DeepSpeed."""
    policy = load_policy(spec, 0.9, LearnerConfig(rows="padded"), lambda handle: handle.ref)
    every = [group for rank in groups(spec)[name] for group in rank]
    batch = policy.collate(list(pieces(every, policy.layout, 1 << 20, padded=True)))
    (policy_loss(*policy(batch), batch.tokens, ALGORITHM) / len(batch.targets)).backward()
    zero = torch.zeros(())
    return {name: zero if p.grad is None else p.grad for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("name", ["few and many tokens", "none and many tokens"])
def test_ranks_with_unlike_numbers_of_chunks_take_one_step(spec: PolicySpec, answers: Any, name: str) -> None:
    tokens = [sum(one.sampled_tokens for group in rank for one in group.trajectories) for rank in groups(spec)[name]]
    assert tokens[0] <= CHUNK and tokens[1] > 4 * CHUNK
    assert distance(answers[0][name], plain_gradient(spec, name)) < 1e-5


@pytest.mark.parametrize("name", ["text and images", "no images"])
def test_padded_rows_without_an_image_wait_for_no_rank(spec: PolicySpec, answers: Any, name: str) -> None:
    expected = plain_gradient(spec, name)
    for found in answers[0][name]:
        assert distance(found, expected) < 1e-5
        assert any(value.any() for key, value in found.items() if "visual" in key) == (name == "text and images")


@pytest.fixture(scope="module")
def start(spec: PolicySpec) -> nn.Module:
    return load_policy(replace(spec, dtype="bfloat16"), 0.9, LearnerConfig(), lambda handle: handle.ref).model


def numel(model: nn.Module, recurse: bool = True) -> int:
    return sum(parameter.numel() for parameter in model.parameters(recurse))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_reduces_once_for_any_number_of_micro_batches(answers: Any, start: nn.Module, dtype: str) -> None:
    assert answers[0][dtype] == answers[1][dtype] == [[numel(start)], [numel(start)]]


def test_a_rank_never_holds_the_whole_policy(answers: Any, start: nn.Module) -> None:
    """While it loads: its half, where the head is not yet the embeddings, and one layer whole. Then its half."""
    largest = max(numel(module, recurse=False) for module in start.modules())
    half = (numel(start) + numel(start.get_submodule("lm_head"))) / 2
    assert half + largest < 0.8 * numel(start)
    expected = dict(start.named_parameters()) | dict(start.named_buffers())
    for found in (one["loading"] for one in answers):
        assert numel(start) / 2 <= found["after"] < 1.001 * numel(start) / 2
        assert max(found["held"]) < 1.001 * half + largest
        assert found["values"].keys() == expected.keys()
        for name, value in expected.items():
            loaded = found["values"][name]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), name


def test_the_sharded_reference_gives_the_same_kl(answers: Any, start: nn.Module) -> None:
    (steps, _), (sharded, held) = answers[0]["reference"]
    assert held < 1.001 * numel(start) / 2
    for one, other in zip(sharded, steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_between_steps_states_leave_the_device(answers: Any, start: nn.Module, stage: int) -> None:
    """Bytes for each parameter: 12 / 2 of masters and moments; of gradients 4 that stage 1 keeps allocated, and 4 / 2
    that stage 3 does."""
    states = {1: 12 / 2 + 4, 2: 12 / 2, 3: 12 / 2 + 4 / 2}[stage]
    for found in (one["states"][stage - 1] for one in answers):
        assert found["freed"] == pytest.approx(states * numel(start), rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("event", ["first", "back", "loaded", "after a step that was not finite"])
def test_a_step_is_the_same_bit_for_bit(answers: Any, stage: int, event: str) -> None:
    assert all(one["states"][stage - 1][event] for one in answers)
