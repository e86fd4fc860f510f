"""Where a training step's time goes: seconds per stage, and the controller's own share.

    python -m benchmarks.step [--recipe quickstart] [--steps 12] [--json]
    python -m benchmarks.step --rival trl --json

A real run of `launch.train`, from the end of a step to the end of the next; the first steps, which warm everything up,
are left out of the medians. The controller's share is everything that is neither generation, scoring, learning nor
sync. With `--rival trl` it takes turns with TRL's GRPOTrainer on the same policy, samples, prompts and reward
(`benchmarks.step_sides`), twice: as TRL comes (8 rows per forward pass), and tuned (`--rival-rows` a forward pass, with
the allocator settings of our workers). The learning rate is next to nothing, so that all go on sampling answers of one
policy; the run fails where theirs are of other lengths than ours. `ratio`: answers per second, ours over the tuned one.
`cpu_s`: processor time of a side's processes in a step. `saved_s`: what each part of their step takes more than ours.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any

from benchmarks.common import parser, print_result
from benchmarks.step_sides import PARTS, serve_program, serve_trl
from benchmarks.trl_step import REQUIREMENT
from benchmarks.turns import Side, take_turns
from launch.record.environment import version_of
from launch.run.config import compose
from perception.config import Config
from runtime.cluster import KEEP_FREED_MEMORY, cpus
from synthetic.prepare import prepare

WARM_UP = 3
TRL_ROWS = 8
"""Rows per forward pass that TRL takes by default."""
TOLERANCE = 0.1
"""Relative, of the mean length of answers."""
Steps = Sequence[Mapping[str, float]]


def measure(recipe: str, steps: int, overrides: Sequence[str], rival_rows: int = 0) -> dict[str, dict[str, Any]]:
    """Figures of the program, "ours", and with `rival_rows` of both TRLs."""
    with tempfile.TemporaryDirectory() as output:
        run = [f"run.output={output}", "run.name=step", "run.checkpoint_every=0", "data.eval_samples=8"]
        words = [f"recipe={recipe}", f"algorithm.steps={steps}", "learner.lr=1e-7", *run, *overrides]
        config = compose(words)
        prepare(config, say=lambda line: None)
        sides = {"ours": Side("ours", serve_program, words)}
        if rival_rows:
            check(config, rival_rows)
            threads = {"OMP_NUM_THREADS": str(cpus())}
            sides["trl"] = Side("trl", serve_trl, words, TRL_ROWS, **threads)
            sides["trl_tuned"] = Side("trl_tuned", serve_trl, words, rival_rows, **threads, **KEEP_FREED_MEMORY)
        taken = take_turns(sides, steps)
    answers = config.algorithm.prompts_per_step * config.algorithm.group_size
    return {name: summary(all_[WARM_UP:], answers) for name, all_ in taken.items()}


def summary(steps: Steps, answers: int) -> dict[str, Any]:
    """Medians over the steps, of `answers` answers each."""
    middle = {name: median(step[name] for step in steps) for name in steps[0]}
    rest = median(step["step"] - sum(step[part] for part in PARTS) for step in steps)
    return {
        "seconds": {part: middle[part] for part in PARTS} | {"controller": rest},
        "step_s": middle["step"],
        "cpu_s": middle["cpu_s"],
        "samples_per_s": answers / middle["step"],
        "tokens_per_s": median(step["tokens"] / step["step"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps) / len(steps) / answers,
    }


def compared(ours: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any]:
    """Raises RuntimeError if the two did not sample answers of the same policy."""
    if abs(rival["tokens"] / ours["tokens"] - 1.0) > TOLERANCE:
        lengths = f"ours of {ours['tokens']:.1f} tokens, TRL's of {rival['tokens']:.1f}"
        raise RuntimeError(f"mean answers are {lengths}; the two did not do the same work")
    saved = {part: rival["seconds"][part] - own for part, own in ours["seconds"].items()}
    return {"ratio": rival["step_s"] / ours["step_s"], "saved_s": saved}


def check(config: Config, rows: int) -> None:
    """Raises SystemExit where the two could not do the same work."""
    answers = config.algorithm.prompts_per_step * config.algorithm.group_size
    if answers % rows or answers % TRL_ROWS:
        raise SystemExit(f"rows per forward pass ({rows} and {TRL_ROWS}) must divide a step's {answers} answers")
    if config.look.mode != "none" or config.reward.rank == "ecdf" or config.pipeline.max_staleness:
        raise SystemExit("TRL has no second looks, no ranks against earlier steps and no rollouts ahead")


def rounded(figures: Any) -> Any:
    return {key: rounded(value) for key, value in figures.items()} if isinstance(figures, dict) else round(figures, 4)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="quickstart", help="of conf/recipe")
    made.add_argument("--steps", type=int, default=12, help=f"of training, {WARM_UP} to warm up included")
    made.add_argument("--rival", choices=("trl",))
    made.add_argument("--rival-rows", type=int, default=128, help="per forward pass of the tuned rival")
    made.add_argument("overrides", nargs="*", help="as for launch.train")
    arguments = made.parse_args()
    if arguments.steps <= WARM_UP or arguments.rival_rows < 1:
        made.error(f"--steps must be more than {WARM_UP}, --rival-rows at least 1")
    if arguments.rival and not find_spec("trl"):
        made.error(f"--rival trl needs TRL: pip install {REQUIREMENT}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = arguments.rival_rows if arguments.rival else 0
    figures = measure(arguments.recipe, arguments.steps, arguments.overrides, rival_rows=rows)
    ours = figures.pop("ours")
    against = {name: compared(ours, rival) for name, rival in figures.items()}
    settings = {key: value for key, value in vars(arguments).items() if key != "json"} | {"trl": version_of("trl")}
    print_result(
        "step",
        rounded(ours),
        rounded(figures) or None,
        rounded(against["trl_tuned"]["ratio"]) if against else None,
        settings,
        controller_share=round(ours["seconds"]["controller"] / ours["step_s"], 4),
        against=rounded(against),
    )


if __name__ == "__main__":
    main()
