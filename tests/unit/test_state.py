"""Guards a run's checkpoints on disk: whole or not taken, and refused where they do not fit what is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.record import run_directory
from launch.record.recorder import Recorder
from launch.run import checks
from launch.run.pipeline import Ticket
from launch.run.samples import fingerprint
from launch.run.state import RunState, made_with
from perception.config import Config, LoraConfig
from perception.datasets import Dataset
from perception.datasets.files import Images
from perception.datasets.records import Record
from perception.errors import UserError
from perception.types import Sample
from runtime.actors import ActorError
from tests import builders
from tests.builders import changed, sample

SAMPLES = [sample(f"scene-{i}", question=f"the {i}th thing") for i in range(12)]
POSITION = 10


class Learner:
    """Writes two files, and remembers what it was asked to load."""

    loaded: tuple[str, bool] | None = None
    fails = False

    async def save(self, folder: str) -> dict[str, str]:
        Path(folder).mkdir()
        if self.fails:
            raise ActorError("learner rank 1 died")
        for rank in range(2):
            (Path(folder) / f"rank-{rank}").write_bytes(bytes(range(100)))
        return {f"rank-{rank}": sha256(bytes(range(100))).hexdigest() for rank in range(2)}

    async def load(self, folder: str, weights_only: bool) -> None:
        self.loaded = (folder, weights_only)


class System(SimpleNamespace):
    async def sync_weights(self, version: int) -> None:
        self.version = version


@pytest.fixture(autouse=True)
def policy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the policy counts."""
    size = SimpleNamespace(parameters=1000, trained=900)
    monkeypatch.setattr("launch.run.memory.measure", lambda *_: size)
    made_with.cache_clear()
    return size


def settings(output: Path, **run: Any) -> Config:
    config = builders.config(output)
    config = replace(config, reward=replace(config.reward, rank="ecdf", ranked={"mask_iou": 1.0}))
    return changed(config, "run", **run)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 4 and 6; that of step 2 was there and is gone."""
    with Recorder(settings(tmp_path)) as recorder:
        save(recorder.run_dir, 2, 4, 6)
        return recorder.run_dir


def save(run_dir: Path, *steps: int, learner: Learner | None = None) -> None:
    state = RunState.start(settings(run_dir.parent), SAMPLES)
    state.cursor.position, state.before = POSITION, {"segment/mask_iou/greedy": 0.25}
    state.ledger.extend(Ticket(7, place) for place in range(3))
    for step in steps:
        state.step = step
        asyncio.run(state.save(System(learner=learner or Learner()), run_dir))  # type: ignore[arg-type]


def resumed(run_dir: Path, config: Config | None = None) -> tuple[RunState, list[str]]:
    """The state that a resumed run begins with, and what it said."""
    said: list[str] = []
    config = config or settings(run_dir.parent)
    return RunState.start(changed(config, "run", resume=run_dir.name), SAMPLES, said.append), said


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_two_newest_are_kept_and_the_newest_is_taken(run_dir: Path) -> None:
    assert checkpoints(run_dir) == ["step-000004", "step-000006"]
    state, said = resumed(run_dir)
    assert (state.step, said) == (6, [])
    assert state.cursor.position == POSITION - 3 and list(state.ledger) == [Ticket(7, place) for place in range(3)]
    assert state.before == {"segment/mask_iou/greedy": 0.25}


def test_a_checkpoint_that_fails_leaves_nothing_behind(run_dir: Path) -> None:
    learner = Learner()
    learner.fails = True
    for step in (6, 8):  # one that is there, and a new one
        with pytest.raises(ActorError):
            save(run_dir, step, learner=learner)
        assert checkpoints(run_dir) == ["step-000004", "step-000006"]
    assert resumed(run_dir)[0].step == 6


def flipped(at: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "first bit": flipped(0.0),
    "a bit in the middle": flipped(0.5),
    "a bit near the end": flipped(0.9),
}
FILES = ("state.json", "SHA256SUMS", "ranks.json", "ranks.npz", "learner/rank-0", "learner/rank-1")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(run_dir: Path, file: str, damage: str) -> None:
    DAMAGES[damage](run_dir / "checkpoints/step-000006" / file)
    state, (line,) = resumed(run_dir)
    assert state.step == 4
    assert line.startswith("warning: ") and "\n" not in line and line.endswith("the checkpoint before it is taken")
    assert "step-000006" in line and (file in line or file == "SHA256SUMS")
    DAMAGES[damage](run_dir / "checkpoints/step-000004" / file)
    with pytest.raises(UserError, match="no whole checkpoint there"):
        resumed(run_dir)


def test_the_checksums_are_those_that_sha256sum_checks(run_dir: Path) -> None:
    folder = run_dir / "checkpoints/step-000006"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    expected = {f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in set(FILES) - {"SHA256SUMS"}}
    assert set(lines) == expected


# ---------------------------------------------------------------- what fits

FITS = {
    "ranks": lambda config: changed(config, "learner", ranks=3),
    "stage": lambda config: changed(config, "learner", zero_stage=3),
    "dtype": lambda config: changed(config, "model", dtype="bfloat16"),
    "rate": lambda config: changed(config, "learner", lr=1.0),
}
MISFITS = {
    "lora": lambda config: changed(config, "learner", lora=LoraConfig(rank=4)),
    "freeze_vision": lambda config: changed(config, "learner", freeze_vision=True),
}


@pytest.mark.parametrize("change", FITS)
@pytest.mark.parametrize("key", ["resume", "resume_weights"])
def test_ranks_stage_and_number_format_may_change(run_dir: Path, change: str, key: str) -> None:
    config = changed(FITS[change](settings(run_dir.parent)), "run", **{key: run_dir.name})
    assert RunState.start(config, SAMPLES).checkpoint == run_dir / "checkpoints/step-000006"


@pytest.mark.parametrize("change", MISFITS)
@pytest.mark.parametrize("key", ["resume", "resume_weights"])
def test_what_is_trained_may_not(run_dir: Path, change: str, key: str) -> None:
    config = changed(MISFITS[change](settings(run_dir.parent)), "run", **{key: run_dir.name})
    with pytest.raises(UserError, match=rf"step-000006 was made with {change}=.*, but now it is"):
        RunState.start(config, SAMPLES)


def test_nor_the_policy(run_dir: Path, policy: SimpleNamespace) -> None:
    policy.parameters = 1001
    made_with.cache_clear()
    with pytest.raises(UserError, match="was made with parameters=1000, but now it is 1001"):
        resumed(run_dir)


def others(samples: list[Sample], **change: Any) -> list[Sample]:
    return [*samples[:-1], replace(samples[-1], **change)]


@pytest.mark.parametrize(
    ("samples", "data", "key"),
    [
        (SAMPLES, {"train": "elsewhere.jsonl"}, "data.train"),
        (SAMPLES, {"format": "other"}, "data.format"),
        (SAMPLES[:-1], {}, "records"),
        (SAMPLES[::-1], {}, "ids"),
        (others(SAMPLES, id="another"), {}, "ids"),
        (others(SAMPLES, question="another"), {}, "ids"),
        (others(SAMPLES, task="count"), {}, "ids"),
    ],
)
def test_other_data_is_refused_unless_asked_for(run_dir: Path, samples: list[Sample], data: Any, key: str) -> None:
    config = changed(changed(settings(run_dir.parent), "data", **data), "run", resume=run_dir.name)
    with pytest.raises(UserError, match=rf"learned from {key}=.*, but now it is .*; with run\.new_data=true"):
        RunState.start(config, samples)
    state = RunState.start(changed(config, "run", new_data=True), samples)
    assert (state.step, state.cursor.position, len(state.ledger)) == (6, 0, 0)


def test_new_data_that_is_the_same_goes_on_where_it_was(run_dir: Path) -> None:
    state, _ = resumed(run_dir, settings(run_dir.parent, new_data=True))
    assert (state.cursor.position, len(state.ledger)) == (POSITION - 3, 3)


def test_pictures_and_truth_are_not_looked_at(tmp_path: Path) -> None:
    data = builders.config(tmp_path).data
    moved = [replace(one, height=1, width=1) for one in SAMPLES]
    assert fingerprint(data, moved) == fingerprint(data, SAMPLES)


def test_a_large_data_set_is_told_from_others_without_reading_it(tmp_path: Path) -> None:
    """By its records: not one of these pictures is there."""

    def data_set(question: str) -> Dataset:
        records = [
            Record(id=str(i), image=f"{i}.png", question=question, task="segment", truth=(), place=f"line {i}")
            for i in range(50_000)
        ]
        return Dataset("data.jsonl", records, Images(tmp_path / "data.jsonl", None, 1))

    data = builders.config(tmp_path).data
    first, again, other = (fingerprint(data, data_set(question)) for question in ("a", "a", "b"))
    assert first == again != other and first["records"] == 50_000


# ---------------------------------------------------------------- weights alone, and the best policy


@pytest.mark.parametrize("key", ["resume", "resume_weights"])
def test_a_run_takes_the_weights_of_another(run_dir: Path, key: str) -> None:
    config = settings(run_dir.parent, **{key: str(run_dir), "name": "second"})
    checks.check_output(config)
    state, system = RunState.start(config, SAMPLES), System(learner=Learner())
    asyncio.run(state.restore(system))  # type: ignore[arg-type]
    learner = str((run_dir / "checkpoints/step-000006/learner").resolve())
    assert system.learner.loaded == (learner, key == "resume_weights")
    step = 6 if key == "resume" else 0
    assert (state.step, system.version) == (step, step)
    assert (state.before is None) == (state.cursor.position == 0) == (not state.ledger) == (step == 0)


def test_a_run_does_not_replace_the_one_it_starts_from(run_dir: Path) -> None:
    config = settings(run_dir.parent, resume_weights=run_dir.name, name=run_dir.name)
    for name in (run_dir.name, str(run_dir)):
        with pytest.raises(UserError, match=r"run\.resume_weights=.* lies in .*; choose another, as run\.name="):
            run_directory.check_inputs(changed(config, "run", resume_weights=name))
    run_directory.check_inputs(changed(config, "run", name="another"))
    with pytest.raises(UserError, match=r"run\.resume_weights=absent: no run there"):
        checks.check_output(changed(config, "run", resume_weights="absent"))


def test_the_best_is_by_the_headline_metric(tmp_path: Path) -> None:
    def metrics(greedy: float, sampled: float = 0.0, count: float = 0.5) -> dict[str, float]:
        found = {"count/count_exact/greedy": count, "count/count_ratio/greedy": sampled}
        found |= {"segment/mask_iou/greedy": greedy, "segment/parsed/sampled": sampled}
        return found | {"segment/mask_iou/sampled": sampled, "segment/mask_iou/greedy@shifted": sampled}

    found = []
    with Recorder(settings(tmp_path)) as recorder:
        recorder.evaluation(0, metrics(0.9))  # the policy it started from
        for step, one in enumerate([metrics(0.5), metrics(0.4, 1.0), metrics(0.5), metrics(0.45, count=0.6)], 1):
            found.append(recorder.is_best(one))
            recorder.evaluation(step, one)
        run_directory.forget_after(recorder.run_dir, 3)
        assert recorder.is_best(metrics(0.51)) and not recorder.is_best({})
    assert found == [True, False, False, True]
