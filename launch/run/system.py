"""System of a run: rollout engines, reward workers and learner, started together on reserved seats."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from launch.record.look_file import read_look, write_look
from launch.run.looking import Asked, Looking
from launch.run.nodes import check_nodes
from launch.run.prompts import PromptMaker, prompt_seed, read_policy_spec
from learner.pool import LearnerPool
from perception.calibration import Calibrator
from perception.config import Config, LookMode
from perception.types import Group, LookState, Prompt, Sample, SamplingSpec, Work
from reward_workers.pool import RewardPool
from rollout.pool import RolloutPool
from runtime import placement
from runtime.actors import ActorPool, Call, Limit
from runtime.cluster import cluster_address
from runtime.objects import handle


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """A weight sync, over all engines. Seconds."""

    seconds: float
    pause_seconds: float
    """The longest time for which an engine sampled nothing."""
    transfer_seconds: float


class System:
    """The workers of one run. `start` before anything else, `shutdown` at the end whatever happened."""

    def __init__(self, config: Config, run_dir: Path | None = None) -> None:
        """Reserves the seats. `run_dir` is where the learner will write; on a cluster every node must see it.

        Raises UserError where the cluster has too little, or a node misses a file.
        """
        self.config = config
        self.version = 0
        """Version of the weights that the engines sample from: the training step that made them."""
        self._syncing = asyncio.Lock()
        self.calibrator = Calibrator(config.look)
        if (saved := read_look(Path(config.model.path))) is not None:
            self.calibrator.state = saved
        self.policy = read_policy_spec(config.model)
        self._prompts = PromptMaker(config.model, config.task)
        self._reservation = placement.reserve(config)
        model, files = config.model, {"model.path": self.policy.path}
        if not model.segmenter.startswith("random:"):
            files["model.segmenter"] = str(Path(model.segmenter).resolve())
            model = replace(model, segmenter=files["model.segmenter"])
        if cluster_address() is not None:
            data = {"data.train": config.data.train, "data.eval": config.data.eval, "data.images": config.data.images}
            read = {key: str(Path(path).resolve()) for key, path in data.items() if path and Path(path).exists()}
            check_nodes(self._reservation.nodes, files | read, run_dir, config.placement.start_timeout_s)
        seats, deterministic = self._reservation.seats, config.run.deterministic
        # What vLLM computes beside a sequence changes the last bits of its log-probs; alone, it always gets the same.
        rollout = replace(config.rollout, max_num_seqs=1) if deterministic else config.rollout
        # So does SAM2 with masks decoded beside one: there a score decodes its whole group, whatever was examined when.
        reward = replace(config.reward, mask_cache=0) if deterministic else config.reward
        self.engines = RolloutPool(self.policy, rollout, config.placement, seats["engine"], self.resync)
        self.rewards = RewardPool(reward, config.look, model, config.placement, seats["reward"])
        self.looking = Looking(self.engines, self.rewards, self._prompts, config)
        self.learner = LearnerPool(self.policy, config, seats["learner"], self.learners_turn)
        actors = (self.engines.actors, self.rewards.actors, self.learner.actors)
        self._pools: dict[str, ActorPool[Any]] = dict(zip(("engine", "reward", "learner"), actors, strict=True))

    async def start(self, learner: bool = True, scoring: bool = True) -> str:
        """Everything at once, with or without the learner or SAM2, but engines first where they share GPUs: vLLM
        charges what comes there meanwhile to itself. Returns a line that says how long each took to be ready."""
        starting = asyncio.create_task(self.engines.start())
        if self.config.placement.transport == "ipc":
            await starting
        learning = self._start_learner() if learner else asyncio.sleep(0, 0.0)
        scorers = self.rewards.start() if scoring else asyncio.sleep(0, 0.0)
        engines, rewards, learner_s = await asyncio.gather(starting, scorers, learning)
        slowest = max(engine.seconds for engine in engines)
        return f"ready: vLLM {engines[0].version} {slowest:.0f} s, SAM2 {rewards:.0f} s, learner {learner_s:.0f} s"

    async def _start_learner(self) -> float:
        if not self.config.placement.sleep:
            return await self.learner.start()
        await self.engines.sleep()
        seconds = await self.learner.start()
        await self.learner.offload()
        return seconds

    @asynccontextmanager
    async def learners_turn(self) -> AsyncIterator[None]:
        """Inside, the learner has the GPUs that it shares with the engines in turns (`placement.sleep`): they sleep,
        its states are there. Afterwards these are in host memory, and engines wake when something is asked of them.

        A failure inside ends the run: nothing is put back.
        """
        if not self.config.placement.sleep:
            yield
            return
        await self.engines.sleep()
        await self.learner.reload()
        yield
        await self.learner.offload()

    async def shutdown(self) -> None:
        try:
            await self.engines.shutdown()
            await self.rewards.shutdown()
            await self.learner.shutdown()
            self._reservation.free()
        finally:
            ray.shutdown()

    @property
    def restarts(self) -> dict[str, int]:
        """Actors restarted so far, by role."""
        return {"rollout engines": self.engines.actors.restarts, "reward workers": self.rewards.actors.restarts}

    def worked(self) -> list[Work]:
        """What the workers were busy with since this was last asked."""
        return [one for pool in self._pools.values() for one in pool.worked()]

    async def trace(self, folder: Path | None = None) -> None:
        """Begin to trace the first worker of each role, or else end it, with `ROLE.json.gz` in the folder."""
        limit = Limit(self.config.placement.start_timeout_s, "placement.start_timeout_s")
        for role, pool in self._pools.items():
            file = str(folder / f"{role}.json.gz") if folder else ""
            await pool.ask(Call("trace", (file,), {}), lambda slots: slots[0], limit)

    def prompt(self, sample: Sample, step: int, place: int, mode: LookMode | None = None) -> Prompt:
        """`step` and `place` only seed the sampling: the same run, step and place draw the same answers.

        `mode` decides the prompt's form; by default it is the configured one.
        """
        inline = (mode or self.config.look.mode) == "inline"
        seed = prompt_seed(self.config.run.seed, step, place)
        return self._prompts.prompt(sample, handle(sample), seed, inline)

    def prompts(self, samples: Sequence[Sample], step: int, mode: LookMode | None = None) -> list[Prompt]:
        return [self.prompt(sample, step, place, mode) for place, sample in enumerate(samples)]

    def look_state(self, explore: bool, mode: LookMode | None = None) -> LookState | None:
        """When to look again; None where the mode has one pass. `explore`: also where it seems not to pay, to learn
        whether it does."""
        if (mode or self.config.look.mode) != "relook":
            return None
        state = self.calibrator.state
        return replace(state, explore=state.explore if explore else 0.0)

    async def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        *,
        mode: LookMode | None = None,
        masks: int = 0,
        held_out: bool = False,
    ) -> list[Group]:
        """The prompts' scored groups, in their order; the first `masks` with predicted masks. `held_out`: measured by
        their task's metrics."""
        asked = Asked(sampling=sampling, look=self.look_state(explore=False, mode=mode), held_out=held_out)
        rollouts = (self.looking.rollout(prompt, asked, i < masks) for i, prompt in enumerate(prompts))
        return list(await asyncio.gather(*rollouts))

    async def sync_weights(self, version: int) -> Sync:
        """The learner's weights into every engine: bucket by bucket while they sample, then all at once in a pause.

        Engines sample from `version` afterwards.
        """
        async with self._syncing:
            began = time.monotonic()
            self.version = version
            async for bucket in self.learner.buckets(self.engines.begin_update()):
                await self.engines.stage(bucket)
            reports = await self.engines.end_update(version)
            await self.learner.release_buckets()
            return Sync(
                seconds=time.monotonic() - began,
                pause_seconds=max(report.pause_seconds for report in reports),
                transfer_seconds=max(report.transfer_seconds for report in reports),
            )

    async def resync(self) -> None:
        """The current weights again, for an engine that was restarted."""
        await self.sync_weights(self.version)

    async def export(self, folder: Path) -> None:
        """The policy as any released one is, and beside it what it has learned about when to look again."""
        await self.learner.export(str(folder))
        if self.calibrator.fitted:
            write_look(folder, self.calibrator.state)

    @property
    def must_calibrate(self) -> bool:
        """Whether the policy looks again and its calibration has not been fitted yet."""
        look = self.config.look
        looks_again = look.mode == "relook" and look.trigger != "never"
        return looks_again and look.calibration > 0 and not self.calibrator.fitted
