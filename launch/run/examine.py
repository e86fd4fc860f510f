"""A model examined: checked against the settings, a drawn example printed as the model gets it, and engine and learner,
as a run has them, compared on that.

Answers of the engine are compared with what the learner makes of their tokens; then the picture changes, and then every
weight that is trained. Each time the log-probs of both must move, and agree again: an image that is dropped, and
pixels, features, prefixes or weights that are kept from before, are seen by nothing else.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from textwrap import fill

import numpy as np

from launch.run.checks import check_family, check_machine, check_model
from launch.run.command_line import told
from launch.run.config import settings
from launch.run.looking import sampled
from launch.run.models import located
from launch.run.parity import parity_gate
from launch.run.prompts import PromptMaker
from launch.run.samples import Check, make_prompts
from launch.run.system import System
from learner.pool import reported
from perception.errors import UserError
from perception.frames import Frame
from perception.registry import find_plugins
from perception.tasks import TASKS
from perception.types import Group, Prompt, Sample
from runtime.cluster import connect
from synthetic.example import example, in_frame, picture

_ANSWERS = 4
_LEAST, _CLEARLY, _ALIKE = 1e-6, 3.0, 0.01
"""Log-probs move by more than this and so many times what engine and learner differ by anyhow; after it they may differ
by as much, or by such a part of the move where that is more."""
_CAUSE = "an image is dropped, weights are not sent, or what was computed from older ones is kept"


def examine(words: Sequence[str], deep: bool) -> bool:
    """Show an example of the first task; `deep`: and whether engine and learner agree about it, which is returned.

    Ends the program with status 2 and one line where files and settings do not agree, or the example does not fit.
    """
    with told():
        config = located(settings(words))
        find_plugins(config.plugins)
        check_model(config.model)
        check_family(config)
        prompts, sample = make_prompts(config), example(next(iter(config.task)))
        for subject, shown in explained(prompts, sample, config.look.mode == "inline").items():
            print(f"{subject:8}" + shown.rstrip().replace("\n", "\n" + " " * 8))
        Check(config, prompts, {sample.task: (frozenset(), "")})(sample)
        if deep:
            check_machine(config, say=print)
            connect(config.placement, config.plugins)
            return asyncio.run(compare(System(config), sample))
        return True


def explained(prompts: PromptMaker, sample: Sample, inline: bool) -> dict[str, str]:
    """The sample as the model gets it and its ideal answer, by subject."""
    asked, made = prompts.tokens(sample, inline), prompts.shown(picture(sample))
    image, grid = made["input_ids"][0].tolist(), made.get("image_grid_thw")
    place, patch = asked.index(prompts.image_token_id), getattr(prompts.processor.image_processor, "patch_size", 1)
    tall, wide = made["pixel_values"].shape[-2:] if grid is None else (grid[0, 1:] * patch).tolist()
    frame = Frame(*prompts.answer_frame(sample.height, sample.width))
    ideal = in_frame(sample, frame)
    old, new = (" ".join(f"{edge:.0f}" for edge in one.boxes[0]) for one in (sample.target, ideal))
    return {
        "family": prompts.config.model_type,
        "image": f"{sample.width} x {sample.height} pixels, resized to {wide} x {tall}: {len(image)} tokens",
        "prompt": prompts.tokenizer.decode(asked),
        "tokens": _pieces(prompts, [*asked[:place], *image, *asked[place + 1 :]]),
        "stops": _pieces(prompts, prompts.ends),
        "ideal": TASKS[prompts.form(sample.task)].write(ideal, frame, inline),
        "frame": f"box {old} of the image becomes {new} in this model's frame, {frame.width} x {frame.height}",
    }


def _pieces(prompts: PromptMaker, ids: Iterable[int]) -> str:
    """Each token as "id:piece", a run of the same one as "id:piece x count"."""
    name, runs = prompts.tokenizer.convert_ids_to_tokens, ((token, len(list(run))) for token, run in groupby(ids))
    words = (f"{token}:{name(token)}" + f" x {many}" * (many > 1) for token, many in runs)
    return fill("  ".join(words), 110, break_on_hyphens=False, break_long_words=False)


async def compare(system: System, sample: Sample) -> bool:
    """Start engine and learner, and end them whatever happens; whether they agree."""
    try:
        print(await system.start(scoring=False))
        return await agree(system, sample)
    finally:
        await system.shutdown()


async def agree(system: System, sample: Sample) -> bool:
    """Print a line for each change. Raises UserError where the two differ before any weight changes (`parity_gate`), or
    the engine answers nothing."""
    learner, first = system.learner, await _answers(system, sample)
    print(f"answer: {first.trajectories[0].text[:300]!r}")
    noise = _apart(reported([first]), await learner.logprobs([first]))
    group = await _answers(system, example(sample.task, turned=True))
    now, before = await learner.logprobs([group]), await learner.logprobs([_about(first.prompt, group)])
    seen = _moved("picture", group, now, before, noise)
    await parity_gate(system, [first], print)
    await learner.perturb()
    await system.sync_weights(system.version + 1)
    group = await _answers(system, sample)
    now = await learner.logprobs([group])
    await learner.perturb(back=True)
    return _moved("weights", group, now, await learner.logprobs([group]), noise) and seen


async def _answers(system: System, sample: Sample) -> Group:
    asked = system.prompt(sample, step=0, place=0)
    group = await system.engines.generate(asked, sampled(_ANSWERS, system.config.rollout))
    if not reported([group]).size:
        raise UserError(f"the engine answers nothing: {group.trajectories[0].failure}")
    return group


def _about(prompt: Prompt, group: Group) -> Group:
    """The same tokens as answers to another prompt, of another picture."""
    turns = (tuple(replace(turn, images=prompt.images) for turn in one.turns) for one in group.trajectories)
    answers = map(lambda one, own: replace(one, turns=own), group.trajectories, turns)
    return replace(group, prompt=prompt, trajectories=tuple(answers))


def _moved(change: str, group: Group, learner: np.ndarray, before: np.ndarray, noise: float) -> bool:
    """Whether a change came to both, by the (N,) log-probs of the group's tokens: the learner's, and those `before`.
    `noise`: what the two differ by anyhow."""
    engine, least = reported([group]), _CLEARLY * noise + _LEAST
    apart, *moves = _apart(engine, learner), _apart(engine, before), _apart(learner, before)
    most = max(least, _ALIKE * max(moves))
    fine = min(moves) > least and apart <= most
    figures = f"log-probs move by {moves[0]:.1e} in the engine, {moves[1]:.1e} in the learner (at least {least:.1e})"
    cause = "" if fine else f": {_CAUSE}"
    print(f"{'ok' if fine else 'fail':6}{change}: {figures}, then differ by {apart:.1e} (at most {most:.1e}){cause}")
    return fine


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())
