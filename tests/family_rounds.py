"""What an engine samples of a family's tiny policy, against its learner: before and after an update of all weights.

    python -m tests.family_rounds idefics3 mistral3

prints a line of JSON for each. A process of its own: it imports vLLM once for all of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from launch.run.prompts import PromptMaker, read_policy_spec
from learner.policy import Policy, load_policy
from learner.rows import pieces
from perception.config import LearnerConfig, ModelConfig, PlacementConfig, RolloutConfig, TaskConfig
from perception.families import family_of
from perception.types import Feed, Group, ImageHandle, Prompt, SamplingSpec, Trajectory
from rollout.defaults import by_placement
from rollout.engine import RolloutEngine
from runtime.weights import shard_sum, total
from tests import builders, tiny_families
from tests.gradients import evaluate
from tests.hf_reference import buckets, perturb

FORM = TaskConfig(system="Be brief.", template="Find {question}.", inline="", again="Again.")
SAMPLING = SamplingSpec(n=2, temperature=0.8, max_new_tokens=12)
PLACEMENT = PlacementConfig(name="test", device="cpu", threads=1)
CONFIG = by_placement(RolloutConfig(max_model_len=1024, kv_cache_mb=64, request_timeout_s=120), PLACEMENT)


@dataclass(frozen=True, slots=True)
class Round:
    """Largest |log-prob difference| between engine and learner ..."""

    before: float
    after: float
    """... of the update; ..."""
    stale: float
    """... between the engine before it and the learner after it; ..."""
    unseen: float
    """... and where the learner is shown other images."""
    same_rows: bool
    """The learner's own rows are those that the engine expanded."""
    same_weights: bool
    """The engine's sum of its weights is the learner's."""
    looks: int
    """Trajectories with a second image."""


async def play(family: str, folder: Path) -> Round:
    tiny_families.build(family, folder)
    model = ModelConfig(path=str(folder), segmenter="")
    spec, maker = read_policy_spec(model), PromptMaker(model, {"segment": FORM})
    engine = RolloutEngine(spec, CONFIG, "cpu", 1)
    await engine.start()
    policy = load_policy(spec, SAMPLING.temperature, LearnerConfig(), lambda handle: handle.ref)
    prompts = [prompt(maker, seed, *size) for seed, size in enumerate([(112, 140), (61, 84), (56, 168)])]
    looks = family_of(maker.config.model_type).images_alone
    first = await sampled(engine, maker, prompts, looks)
    before = difference(policy, first)
    unseen = difference(policy, [other_images(group) for group in first])
    same_rows = rows(policy, first) == rows(policy, [unexpanded(group) for group in first])
    perturb(policy.model, seed=1)
    for bucket in buckets(policy.model):
        await engine.stage(bucket, receiver=1)
    report = await engine.end_update(1, checksum=True)
    sums = total(shard_sum(name, parameter) for name, parameter in policy.model.named_parameters())
    second = await sampled(engine, maker, prompts, looks)
    await engine.shutdown()
    return Round(
        before=before,
        after=difference(policy, second),
        stale=difference(policy, first),
        unseen=unseen,
        same_rows=same_rows,
        same_weights=report.checksum == sums,
        looks=sum(len(one.turns) == 2 for group in first for one in group.trajectories),
    )


def prompt(maker: PromptMaker, seed: int, height: int, width: int) -> Prompt:
    asked = builders.sample(f"s{seed}", question="the cat", height=height, width=width)
    return maker.prompt(asked, builders.noise_image(seed, height, width), seed)


async def sampled(engine: RolloutEngine, maker: PromptMaker, prompts: Sequence[Prompt], looks: bool) -> list[Group]:
    """A group of every prompt; one trajectory of the first has a second image, where the family can."""
    groups = list(await asyncio.gather(*(engine.generate(one, SAMPLING) for one in prompts)))
    if looks:
        feed = Feed(input_ids=maker.again("segment"), images=(builders.noise_image(9, 84, 84),), view=None)
        begun, *others = groups[0].trajectories
        whole = await engine.sample(prompts[0], 0, begun.turns, feed, SAMPLING)
        groups[0] = replace(groups[0], trajectories=(whole, *others))
    assert all(one.turns for group in groups for one in group.trajectories), groups
    return [builders.with_advantages(group, [1.0] * SAMPLING.n) for group in groups]


def difference(policy: Policy, groups: Sequence[Group]) -> float:
    worst = 0.0
    for (group, index), logprobs in evaluate(policy, groups, 1 << 20)[0].items():
        said = [value for turn in groups[group].trajectories[index].turns for value in turn.logprobs]
        worst = max(worst, float((logprobs - torch.tensor(said)).abs().max()))
    return worst


def rows(policy: Policy, groups: Sequence[Group]) -> list[list[int]]:
    made = pieces(groups, policy.layout, 1 << 20)
    return [torch.cat([p.prompt.ids, *(i for tail in p.tails for i in tail.ids)]).tolist() for p in made]


def unexpanded(group: Group) -> Group:
    def plain(one: Trajectory) -> Trajectory:
        return replace(one, turns=tuple(replace(turn, expanded_ids=()) for turn in one.turns))

    return replace(group, trajectories=tuple(map(plain, group.trajectories)))


def other_images(group: Group) -> Group:
    """With images of the same sizes and other pixels."""

    def others(images: Sequence[ImageHandle]) -> tuple[ImageHandle, ...]:
        return tuple(builders.noise_image(99, image.height, image.width) for image in images)

    def shown(one: Trajectory) -> Trajectory:
        return replace(one, turns=tuple(replace(turn, images=others(turn.images)) for turn in one.turns))

    about = replace(group.prompt, images=others(group.prompt.images))
    return replace(group, prompt=about, trajectories=tuple(map(shown, group.trajectories)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with TemporaryDirectory() as made:
            found = asyncio.run(play(name, Path(made)))
        print(json.dumps({"family": name, **asdict(found)}), flush=True)
