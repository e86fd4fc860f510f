"""`launch.doctor --deep` as it is typed: a fit policy passes, and each silent failure that is put into its running
engine or learner is told. One engine and one learner rank for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import doctor
from launch.run import examine
from launch.run.system import System
from perception.types import Sample
from tests import tiny_policy

pytestmark = pytest.mark.own_ray
SMALL = ("rollout.max_new_tokens=24", "rollout.max_model_len=512", "learner.ranks=1", "look=none")


def engine_keeps_the_first_picture(engine: Any) -> None:
    ask = engine._request

    async def asked(ids: Any, images: Any, *rest: Any) -> Any:
        return await ask(ids, [replace(one, key="any") for one in images], *rest)

    engine._request, engine.mend = asked, lambda: setattr(engine, "_request", ask)


def learner_keeps_the_first_picture(rank: Any) -> None:
    policy, layout, first = rank._policy, rank._policy.layout, []

    def picture(handle: Any) -> Any:
        first.append(layout.picture(handle))
        return first[0]

    policy.layout, rank.mend = replace(layout, picture=picture), lambda: setattr(policy, "layout", layout)


def vision_is_not_sent(rank: Any) -> None:
    sender, plans = rank._sender, rank._sender._plans
    kept = [tuple(slot for slot in plan.slots if ".visual." not in slot.name) for plan in plans]
    assert sum(map(len, kept)) < sum(len(plan.slots) for plan in plans)
    sender._plans = [replace(plan, slots=slots) for plan, slots in zip(plans, kept, strict=True)]
    rank.mend = lambda: setattr(sender, "_plans", plans)


def caches_outlive_the_weights(engine: Any) -> None:
    updates, pause = engine._updates, engine._updates._pause
    updates._pause = lambda: engine._engine.pause_generation(mode="keep", clear_cache=False)
    engine.mend = lambda: setattr(updates, "_pause", pause)


FAULTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "engine keeps the first picture": ("engines", engine_keeps_the_first_picture),
    "learner keeps the first picture": ("learner", learner_keeps_the_first_picture),
    "vision is not sent": ("learner", vision_is_not_sent),
    "caches outlive the weights": ("engines", caches_outlive_the_weights),
}


def test_deep_passes_a_fit_policy_and_tells_every_silent_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agree, told = examine.agree, {}

    async def with_faults(system: System, sample: Sample) -> bool:
        fit = await agree(system, sample)
        told["fit"] = fit, capsys.readouterr().out
        for name, (role, fault) in FAULTS.items():
            await system.sync_weights(system.version + 1)  # what the learner has: the policy's own
            (slot,) = getattr(system, role).actors.slots
            await slot.actor.__ray_call__.remote(fault)
            told[name] = await agree(system, sample), capsys.readouterr().out
            await slot.actor.__ray_call__.remote(lambda actor: actor.mend())
        return fit

    monkeypatch.setattr(examine, "agree", with_faults)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    policy = tiny_policy.build(tmp_path / "policy").path
    assert doctor.main(["--deep", f"model.path={policy}", *SMALL, f"run.output={tmp_path}/runs"]) == 0
    fit, out = told.pop("fit")
    assert fit and "fail" not in out and "parity: mean importance ratio 1.0000" in out, out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("ok")] == [
        "ok    picture",
        "ok    weights",
    ]
    for (name, (fit, out)), bad in zip(told.items(), ("picture", "picture", "weights", "weights"), strict=True):
        lines = [line for line in out.splitlines() if line.startswith("fail")]
        assert not fit and [line.split(":")[0] for line in lines] == [f"fail  {bad}"], (name, out)
        assert "an image is dropped, weights are not sent, or what was computed from older ones is kept" in lines[0]
    assert "0.0e+00 in the learner" in told["learner keeps the first picture"][1]
