"""Guards every stage against a group of which nothing is known: engine or reward worker failed all of it, and its image
has gone, is cut off or is no image. What failed in one stage is not touched by the next."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch.record import rollouts, run_directory
from launch.record.recorder import Recorder
from launch.run import session
from launch.run.batch import Batch, check_failures
from launch.run.calibrate import calibrate
from launch.run.session import Session
from launch.run.step_metrics import look_metrics, step_metrics
from launch.run.system import Sync
from learner.advantages import with_advantages
from learner.policy import Policy, load_policy
from learner.pool import LearnerPool
from learner.rows import Layout, Picture, bins, pieces
from perception import metric_catalog as catalog
from perception.calibration import Calibrator
from perception.config import LearnerConfig, LookConfig, RewardConfig
from perception.errors import DataError, UserError
from perception.types import FailureKind, Group, ImageHandle, ImageSource, LearnerReport, LookState
from report import write_report
from reward_workers.combine import make_store, rewarded
from reward_workers.worker import RewardWorker
from runtime.objects import fetch
from tests import builders, tiny_policy, tiny_segmenter
from tests.builders import group, lost, noise, png, sampled_group, trajectory, turn
from tests.fake_run import LOOK, config, scene_group

DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "no image": lambda path: path.write_text("<html>not found</html>"),
}
LOST = [FailureKind.ENGINE, FailureKind.SCORER]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """By how their rows are."""
    spec, kinds = tiny_policy.build(tmp_path_factory.mktemp("policy")), ("packed", "padded")
    return {rows: load_policy(spec, 1.0, LearnerConfig(rows=rows), fetch) for rows in kinds}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> RewardWorker:
    model = tiny_segmenter.build(tmp_path_factory.mktemp("segmenter"))
    reward = RewardConfig(name="masked", components={"mask_iou": 1.0})
    made = RewardWorker(reward, LookConfig(mode="relook"), model, "cpu", 1)
    made.start()
    return made


def damaged(folder: Path, how: str) -> ImageHandle:
    path = folder / "street.png"
    path.write_bytes(png(noise(0)))
    DAMAGE[how](path)
    return ImageHandle(key=f"street {how}", height=112, width=112, ref=ImageSource(path=str(path)))


def unknown(image: ImageHandle, kind: FailureKind = FailureKind.ENGINE, placeholders: int = 1) -> Group:
    """All of it failed; the reward worker's failures had sampled tokens."""
    ids = (1, *(300,) * placeholders, 2)
    asked = builders.sample("street-7", image=image.ref)
    said = [turn("[]", (5, 6), input_ids=ids, images=(image,))] if kind == FailureKind.SCORER else []
    about = builders.prompt(asked, token_ids=ids, images=(image,))
    return group(*(lost(kind, turns=tuple(said)) for _ in range(4)), about=about)


# ---------------------------------------------------------------- learner


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_learner_leaves_it_alone(
    policies: dict[str, Policy], tmp_path: Path, how: str, kind: FailureKind, rows: str
) -> None:
    policy = policies[rows]
    known = sampled_group(policy.family.spec, np.random.default_rng(0))
    broken = unknown(damaged(tmp_path, how), kind)
    alone, among = (
        policy.collate(next(iter(bins(list(pieces(groups, policy.layout, 999, policy.padded)), 999, policy.padded))))
        for groups in ([known], [broken, known, broken])
    )
    assert torch.equal(alone.targets, among.targets) and torch.equal(policy(alone)[0], policy(among)[0])
    assert [tail.group for piece in pieces([broken, known], policy.layout, 999) for tail in piece.tails] == [1] * 4
    assert list(pieces([broken], policy.layout, 999)) == []


def test_a_question_with_too_many_placeholders_is_left_alone(tmp_path: Path) -> None:
    layout = Layout(
        image_token_id=300, shown_id=300, filler_id=0, picture=lambda handle: pytest.fail("nothing to prepare")
    )
    assert list(pieces([unknown(damaged(tmp_path, "gone"), placeholders=n) for n in (0, 2, 3)], layout, 99)) == []


def test_a_failed_second_look_is_not_prepared() -> None:
    """Its picture was made for it alone, and may have gone with an actor."""
    first, later = (replace(builders.noise_image(i), key=key) for i, key in enumerate(("whole", "view")))
    answered = turn("[]", (5,), input_ids=(1, 300), images=(first,))
    looked = turn("[]", (6,), input_ids=(300,), images=(later,))
    both = trajectory(answered), lost(turns=(answered, looked))
    prepared: list[str] = []

    def picture(handle: ImageHandle) -> Picture:
        prepared.append(handle.key)
        return Picture(key=handle.key, tokens=torch.tensor([300]), inputs={})

    about = builders.prompt(token_ids=(1, 300), images=(first,))
    (piece,) = pieces(
        [group(*both, about=about)], Layout(image_token_id=300, shown_id=300, filler_id=0, picture=picture), 99
    )
    assert prepared == ["whole"] and [tail.trajectory for tail in piece.tails] == [0]


@pytest.mark.parametrize("how", DAMAGE)
def test_an_image_that_went_before_it_was_learned_from_is_named(
    policies: dict[str, Policy], tmp_path: Path, how: str
) -> None:
    broken, policy = unknown(damaged(tmp_path, how), FailureKind.SCORER), policies["packed"]
    known = replace(broken, trajectories=tuple(replace(one, failure=None) for one in broken.trajectories))
    with pytest.raises(DataError, match=r"sample street-7: .*street\.png: the image is damaged or gone"):
        list(pieces([known], policy.layout, 999))


def test_parity_waits_for_a_step_that_holds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = group(lost(turns=(turn("a", (1,)),)), trajectory(failure=builders.failure(FailureKind.EMPTY)))
    some = group(trajectory(turn("a", (1,))), lost())
    batches = iter([[nothing], [nothing, some], [some]])
    compared: list[list[Group]] = []

    async def batch(*asked: Any) -> Any:
        return SimpleNamespace(groups=next(batches))

    async def gate(system: Any, groups: list[Group], say: Any) -> None:
        compared.append(groups)

    monkeypatch.setattr(session, "next_batch", batch)
    monkeypatch.setattr(session, "parity_gate", gate)
    given: Any = SimpleNamespace(learner=None, ranks=None, say=print)
    run = Session(builders.config(), [], {}, given, given, given, given)

    async def steps() -> None:
        for step in (1, 2, 3):
            await run.next_batch(given, step)

    asyncio.run(steps())
    assert compared == [[nothing, some]]


def test_parity_and_kl_are_of_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(lost(turns=(turn("a", (1, 2)),)), lost()), group(trajectory(turn("b", (3, 4))), lost())]
    found: list[Any] = [[np.zeros(0), np.zeros(0)], [np.array([-0.5, -0.25]), np.zeros(0)]]

    async def of_groups(method: Any, given: Any) -> Any:
        return found

    pool: Any = object.__new__(LearnerPool)
    monkeypatch.setattr(pool, "_of_groups", of_groups)
    assert asyncio.run(pool.parity(groups))[catalog.LOGPROB_MISMATCH] == pytest.approx(0.125)
    found[:] = [(0.0, 0.0), (0.7, 0.0)]
    with_kl = asyncio.run(pool.with_kl(groups))
    assert [[one.kl for one in each.trajectories] for each in with_kl] == [[None, None], [0.7, None]]


# ---------------------------------------------------------------- reward worker


@pytest.mark.parametrize("how", DAMAGE)
def test_the_reward_worker_leaves_it_alone_and_names_the_file(worker: RewardWorker, tmp_path: Path, how: str) -> None:
    image, state = damaged(tmp_path, how), LookState(weights=(), threshold=1.0, explore=0.0)
    broken = unknown(image)
    assert worker.score(broken, want_masks=True, look=state) == broken
    answered = replace(broken, trajectories=(trajectory("<answer>[]</answer>"),))
    for ask in (lambda: worker.score(answered), lambda: worker.examine(answered, state)):
        with pytest.raises(DataError, match=r"street\.png: the image is damaged or gone"):
            ask()


@pytest.mark.parametrize("rank", ["none", "ecdf", "group"])
def test_it_is_neither_ranked_nor_rewarded(rank: Any) -> None:
    reward = RewardConfig(name="r", components={"parsed": 1.0}, ranked={"mask_iou": 1.0}, rank=rank)
    store = make_store(reward)
    (done,) = with_advantages(rewarded([group(lost(), lost())], reward, store, kl_coef=0.1), "batch")
    assert [(one.reward, one.advantage) for one in done.trajectories] == [(None, 0.0)] * 2
    if store is not None:
        store.flush()
        assert not store.state().rows


# ---------------------------------------------------------------- a step of nothing else


@pytest.mark.parametrize(("limit", "stops"), [(0.0, True), (0.5, True), (0.99, True), (1.0, False)])
def test_a_step_of_failures_is_governed_by_the_failure_rate(tmp_path: Path, limit: float, stops: bool) -> None:
    groups = [unknown(damaged(tmp_path, "gone"))] * 3
    refused = pytest.raises(UserError, match=r"12 of 12 answers .*sample street-7 \(engine\)")
    with refused if stops else nullcontext():
        check_failures(groups, limit)


def step_of(groups: list[Group]) -> dict[str, float]:
    waits = {"generate": 1.0, "score": 1.0, "learn": 0.0}
    batch = Batch(groups=groups, teaching=groups, rounds=1, seconds=waits, began=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return step_metrics(
            1, batch, LearnerReport(metrics={}, seconds=0.0), Sync(seconds=0, pause_seconds=0, transfer_seconds=0)
        ) | look_metrics(groups)


def test_the_metrics_of_a_step_of_failures_are_unknown_not_zero(tmp_path: Path) -> None:
    found = step_of([unknown(damaged(tmp_path, "gone"))])
    unmeasured = (catalog.REWARD_MEAN, catalog.REWARD_STD, catalog.PARSE_OK, catalog.CONFIDENCE, catalog.LOOK_PASSES)
    assert all(math.isnan(found[name]) for name in unmeasured)
    assert found[catalog.failure(FailureKind.ENGINE)] == found[catalog.ZERO_VARIANCE] == 1.0


def test_looks_are_calibrated_on_what_is_known(tmp_path: Path) -> None:
    broken = unknown(damaged(tmp_path, "gone"))
    calibrator = Calibrator(LOOK)
    calibrator.learn(broken.trajectories)
    assert not calibrator.fitted

    async def answer(prompts: Any, sampling: Any) -> list[Group]:
        return [broken, group(*(builders.measured(0.5) for _ in range(4)))]

    system: Any = SimpleNamespace(
        config=builders.config(look=LOOK), calibrator=calibrator, answer=answer, prompts=lambda *asked: []
    )
    assert "calibrated on 4 answers" in asyncio.run(calibrate(system, []))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("how", DAMAGE)
def test_it_is_recorded_and_reported(tmp_path: Path, how: str) -> None:
    image = damaged(tmp_path, how)
    known = scene_group(tmp_path, 1, 5.0, np.random.default_rng(0), LOOK)
    gone = replace(known.prompt, sample=replace(known.prompt.sample, id="gone", image=image.ref))
    groups = [unknown(image), unknown(image, FailureKind.SCORER), replace(known, prompt=gone)]
    with Recorder(config(tmp_path, steps=1, look=LOOK)) as recorder:
        recorder.evaluation(0, {}, groups)
        recorder.step(1, step_of(groups[:2]), groups)
        recorder.evaluation(1, {}, groups)
    (path,) = (recorder.run_dir / run_directory.ROLLOUTS).glob("train-*.parquet")
    rows = rollouts.read(path)
    assert len(rows) == sum(len(one.trajectories) for one in groups)
    assert {row["picture"] for row in rows} == {None}
    assert {row["image"] for row in rows} == {str(image.ref)}
    page = write_report(recorder.run_dir).read_text(encoding="utf-8")
    assert "street-7" in page and "The image's bytes are gone or do not decode." in page
