"""Guards engines and learner that take turns on their GPUs (`placement.sleep`): a whole run with real system, session,
pools, pipeline and records over invented actors, which know what lies on the GPU and refuse what cannot run there."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run import system as system_module
from launch.run.session import Session
from launch.run.state import RunState
from launch.run.system import System
from launch.train import train
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, Config, PlacementConfig, RolloutConfig
from perception.types import Group, ImageSource, LearnerReport, Work
from perception.weights import UpdateReport, WeightBucket
from runtime.actors import ActorError, Call, Slot
from runtime.placement import Seat
from tests import builders
from tests.builders import changed, group, measured, noise_image, prompt, sample, turn

GPUS, STEPS = 2, 2
ROLES = {"rollout engine", "reward worker", "learner rank"}


class Gpus:
    """What is there, what was called, and the call that fails."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.engines, self.states, self.version = {"weights", "kv_cache"}, True, 0
        self.log, self.closed, self.fails = list[str](), set[str](), ""
        self.turns = True

    def call(self, role: str, wanted: Call[Any, Any]) -> Any:
        (inner,) = wanted.arguments if wanted.method == "send" else (wanted,)
        method, arguments = inner.method, inner.arguments
        name = f"{role} {method}" + (f" {'+'.join(arguments[0])}" if method == "wake" else "")
        self.log.append(name)
        if name == self.fails:
            raise ActorError(f"{name} failed")
        if role == "reward worker":
            return _scored(*arguments[:1])
        return getattr(self, method)(*arguments)

    # Engines.

    def sleep(self) -> None:
        self._expect({"weights", "kv_cache"})
        self.engines = set()

    def wake(self, parts: Sequence[str]) -> None:
        assert not self.engines & set(parts) and not self.states
        self.engines |= set(parts)

    def generate(self, asked: Any, sampling: Any) -> Group:
        self._expect({"weights", "kv_cache"}, states=False)
        said = turn("<answer>[]</answer>", range(5), version=self.version)
        return group(*(builders.trajectory(said) for _ in range(sampling.n)), about=asked)

    def stage(self, bucket: WeightBucket, receiver: int) -> None:
        self._expect({"weights"}, states=False)
        assert bucket.payload == {"GPU-0": b"0", "GPU-1": b"1"}

    def end_update(self, version: int, checksum: bool) -> UpdateReport:
        self._expect({"weights"}, states=False)
        self.version = version
        return UpdateReport(version=version, transfer_seconds=0.0, pause_seconds=0.0, nbytes=1)

    # Learner ranks.

    def open_store(self) -> tuple[str, int]:
        self._expect(set())
        return "127.0.0.1", 1

    def offload(self) -> None:
        self._expect(set(), states=True)
        self.states = False

    def reload(self) -> None:
        self._expect(set(), states=False)
        self.states = True

    def update(self, batches: Any) -> LearnerReport:
        self._expect(set(), states=True)
        numbers = (catalog.LOSS, catalog.GRAD_NORM, catalog.LR, catalog.OPTIMIZER_STEPS)
        return LearnerReport(metrics=dict.fromkeys(numbers, 1.0), seconds=0.0)

    def logprobs(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        self._expect(set(), states=True)
        return [[np.full(one.sampled_tokens, -0.5) for one in each.trajectories] for each in groups]

    def kl(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        self._expect(set(), states=True)
        return [tuple(0.1 * one.index for one in each.trajectories) for each in groups]

    def save(self, folder: str) -> dict[str, str]:
        self._expect(set(), states=True)
        return {}

    def load(self, folder: str, weights_only: bool) -> None:
        self._expect(set(), states=True)

    def export(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    def open(self, receivers: tuple[str, ...]) -> int:
        assert len(receivers) == GPUS
        return 1

    def fill_bucket(self, index: int) -> WeightBucket:
        rank = self.log.count("learner rank fill_bucket") % GPUS
        return WeightBucket(slots=(), nbytes=1, transport="ipc", payload={f"GPU-{rank}": b"%d" % rank})

    def flush(self) -> None: ...

    release = flush

    def _expect(self, engines: set[str], states: bool | None = None) -> None:
        """What must be on the GPU: parts of the engines, and the learner's states (None: either way)."""
        if self.turns:
            assert self.engines == engines and states in (None, self.states)


def _scored(one: Group) -> Group:
    made = [measured(mask_iou=0.1 + 0.5 * (i % 2), parsed=1.0, point_score=0.5) for i in range(len(one.trajectories))]
    pairs = zip(one.trajectories, made, strict=True)
    return replace(one, trajectories=tuple(replace(each, score=new.score) for each, new in pairs))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Invented actors in real pools."""
    played = Gpus()

    class Actors:
        def __init__(self, role: str, kind: Any, arguments: Any, seats: Sequence[Seat], **_: Any) -> None:
            self.role, self.slots, self.restarts = role, [Slot(i, actor=i) for i in range(len(seats))], 0

        def make(self) -> None: ...

        def worked(self) -> list[Work]:
            return []

        def running(self) -> list[Slot]:
            return self.slots

        async def start(self, *arguments: Any) -> list[Any]:
            played.log.append(f"{self.role} start")
            await asyncio.sleep(0.01)  # whatever may run beside it has begun
            played.log.append(f"{self.role} ready")
            info = SimpleNamespace(version="0", seconds=1.0)
            return [info if self.role == "rollout engine" else 1.0 for _ in self.slots]

        async def ask(self, wanted: Call[Any, Any], route: Any, limit: Any) -> Any:
            return played.call(self.role, wanted)

        async def each(self, calls: Any, limit: Any, slots: Sequence[Slot] | None = None, doing: str = "") -> list[Any]:
            """Actors of one pool do the same; the state of a GPU changes once."""
            if calls[0].method not in ("sleep", "wake", "offload", "reload", "save", "load"):
                return [played.call(self.role, one) for one in calls]
            return [played.call(self.role, calls[0])] * len(calls)

        async def shutdown(self, goodbye: Any = None) -> None:
            played.closed.add(self.role)

    for pool in ("rollout", "learner", "reward_workers"):
        monkeypatch.setattr(f"{pool}.pool.ActorPool", Actors)
    reserved = SimpleNamespace(seats=dict.fromkeys(("engine", "reward", "learner"), [Seat(1, 0.4)] * GPUS), free=list)
    monkeypatch.setattr(system_module.placement, "reserve", lambda config: reserved)
    monkeypatch.setattr("launch.run.memory.measure", lambda *_: SimpleNamespace(parameters=1, trained=1))
    monkeypatch.setattr(system_module, "read_policy_spec", lambda model: builders.policy_spec())
    monkeypatch.setattr(system_module, "PromptMaker", _Prompts)
    monkeypatch.setattr(system_module, "handle", lambda asked: noise_image(0))
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # the process may share a Ray with other tests
    return played


class _Prompts:
    def __init__(self, *_: Any) -> None: ...

    def prompt(self, asked: Any, image: Any, seed: int, inline: bool) -> Any:
        return prompt(asked, images=(image,), seed=seed)


def settings(output: Path, sleep: bool = True, **algorithm: Any) -> Config:
    plain = builders.config(
        output,
        algorithm=AlgorithmConfig(steps=STEPS, prompts_per_step=2, group_size=2, **algorithm),
        rollout=RolloutConfig(engines=GPUS),
        placement=PlacementConfig(name="colocated", device="cuda", transport="ipc", sleep=sleep),
    )
    return changed(plain, "run", rollouts_kept=0, checkpoint_every=1, eval_every=1)


def run(config: Config, folder: Path) -> None:
    questions = [sample(f"scene-{i}", image=ImageSource(path=str(folder / "image.png"))) for i in range(8)]
    progress = Progress(STEPS, console=Console(file=io.StringIO()))
    state = RunState.start(config, questions)
    with Recorder(config, resume_step=state.step if config.run.resume else None) as recorder:
        session = Session(config, questions, {"": questions[:2]}, state, System(config), recorder, progress)
        asyncio.run(session.run(train))


ANSWERS, WAKE = "answers", "rollout engine wake weights+kv_cache"
SYNC = [
    "learner rank fill_bucket",
    "rollout engine wake weights",
    "rollout engine stage",
    "rollout engine end_update",
    "rollout engine wake kv_cache",
    "learner rank release",
]


def turn_of(call: str, sleeping: bool = False) -> list[str]:
    """The learner's turn; `sleeping`: the engines have not woken since the last one."""
    falls = [] if sleeping else ["rollout engine sleep"]
    return [*falls, "learner rank reload", f"learner rank {call}", "learner rank offload"]


def stages(log: Sequence[str]) -> list[str]:
    """What was called, in order: answers are sampled and scored side by side, and what is repeated counts once."""
    names = [ANSWERS if name in ("rollout engine generate", "reward worker score") else name for name in log]
    names = [name for name in names if name not in ("learner rank open", "learner rank flush")]
    return [name for before, name in zip(["", *names], names, strict=False) if name != before]


def test_a_whole_run_takes_turns_in_this_order(gpus: Gpus, tmp_path: Path) -> None:
    run(settings(tmp_path), tmp_path)
    began = [name for name in gpus.log if name != "learner rank open_store"]
    assert began[:2] == ["rollout engine start", "rollout engine ready"]
    beside = {f"{role} {what}" for role in ("reward worker", "learner rank") for what in ("start", "ready")}
    assert set(began[2:7]) == beside | {"rollout engine sleep"}
    assert stages(began[7:]) == [
        *("learner rank offload", WAKE, ANSWERS),  # evaluation of the starting policy, and step 1
        *turn_of("logprobs"),  # parity gate
        *turn_of("update", sleeping=True),
        *SYNC,
        *turn_of("save"),
        *(WAKE, ANSWERS, "learner rank export", ANSWERS),  # evaluation of the best policy so far, and step 2
        *turn_of("update"),
        *SYNC,
        *turn_of("save"),
        *(WAKE, ANSWERS, "learner rank export"),
    ]
    assert gpus.closed == ROLES


def test_an_export_that_fails_leaves_the_summary_and_no_half_policy(gpus: Gpus, tmp_path: Path) -> None:
    config, gpus.fails = changed(settings(tmp_path), "run", eval_every=0), "learner rank export"
    with pytest.raises(ActorError, match="export failed"):
        run(config, tmp_path)
    left = {file.name for file in (tmp_path / config.run.name).iterdir()}
    assert json.loads((tmp_path / config.run.name / "summary.json").read_text())["steps"] == STEPS
    assert "policy" not in left and not [name for name in left if "partial" in name]


def test_a_whole_run_leaves_a_policy_with_its_card(gpus: Gpus, tmp_path: Path) -> None:
    config = settings(tmp_path)
    run(config, tmp_path)
    assert f"# {config.run.name}" in (tmp_path / config.run.name / "policy" / "README.md").read_text()


def test_the_kl_in_the_reward_is_a_turn_of_its_own(gpus: Gpus, tmp_path: Path) -> None:
    run(settings(tmp_path, kl_coef=0.1, kl_in="reward"), tmp_path)
    found = stages(gpus.log)
    first = found.index("learner rank kl")
    assert found[first - 2 : first + 2] == turn_of("kl")
    assert found.count("learner rank kl") == STEPS


def test_a_resumed_run_loads_its_checkpoint_in_a_turn(gpus: Gpus, tmp_path: Path) -> None:
    run(settings(tmp_path), tmp_path)
    gpus.begin()
    again = changed(settings(tmp_path), "run", resume="quickstart")
    run(changed(again, "algorithm", steps=3), tmp_path)
    after = stages(gpus.log)
    loaded = after.index("learner rank load")
    assert after[loaded - 1 : loaded + 2 + len(SYNC)] == [*turn_of("load", sleeping=True), *SYNC]
    assert gpus.version == 3


def test_without_sleep_nobody_leaves_the_gpu_but_engines_still_start_first(gpus: Gpus, tmp_path: Path) -> None:
    gpus.turns = False
    run(settings(tmp_path, sleep=False), tmp_path)
    assert gpus.log[:2] == ["rollout engine start", "rollout engine ready"]
    assert not {name.split()[-1] for name in gpus.log} & {"sleep", "weights", "kv_cache", "offload", "reload"}


FAILURES = [
    "rollout engine sleep",
    "learner rank reload",
    "learner rank update",
    "learner rank offload",
    "learner rank fill_bucket",
    "rollout engine wake weights",
    "rollout engine stage",
    "rollout engine end_update",
    "rollout engine wake kv_cache",
    "rollout engine wake weights+kv_cache",
    "learner rank save",
]


@pytest.mark.parametrize("fails", FAILURES)
def test_a_failure_in_the_middle_ends_the_run_by_its_own_name(gpus: Gpus, tmp_path: Path, fails: str) -> None:
    gpus.fails = fails
    with pytest.raises(ActorError, match=f"^{fails} failed$".replace("+", r"\+")):
        run(settings(tmp_path), tmp_path)
    assert set(gpus.log[gpus.log.index(fails) :]) <= {fails, "reward worker ready"}  # which start beside the learner
    assert gpus.closed == ROLES


@pytest.mark.parametrize("comes_back", [True, False])
async def test_engines_sleep_only_when_no_one_of_them_is_being_restarted(
    gpus: Gpus, tmp_path: Path, comes_back: bool
) -> None:
    async def revive() -> None:
        await asyncio.sleep(0.05)
        gpus.log.append("revived")
        if not comes_back:
            raise ActorError("it died too often")

    engines = System(settings(tmp_path)).engines
    engines.actors.slots[1].revival = asyncio.create_task(revive())
    if comes_back:
        await engines.sleep()
        await engines.sleep()  # they sleep already
        assert gpus.log == ["revived", "rollout engine sleep"]
    else:
        with pytest.raises(ActorError, match="died too often"):
            await engines.sleep()
        assert gpus.log == ["revived"]
