"""Where a training step's time goes: seconds per stage, and the controller's own share.

    python -m benchmarks.step [--recipe quickstart] [--steps 12] [--json]

A real run of `launch.train`; the first two steps, which warm everything up, are left out of the medians. The
controller's share is everything that is neither generation, scoring, learning nor sync. There is no rival in this
benchmark.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import options, print_result
from launch.record import run_directory
from perception import metric_catalog as catalog

WARM_UP = 2


def measure(recipe: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """Median of every metric over the steps after the warm-up. Raises CalledProcessError when the run fails."""
    with tempfile.TemporaryDirectory() as output:
        settings = [f"recipe={recipe}", f"algorithm.steps={steps}", f"run.output={output}", "run.name=step"]
        command = [sys.executable, "-m", "launch.train", *settings, "data.eval_samples=8", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = run_directory.read_lines(Path(output) / "step" / run_directory.METRICS)[WARM_UP:]
    return {name: median([row[name] for row in rows]) for name in rows[0] if name != "step"}


def main() -> None:
    arguments = options(__doc__, overrides=True, recipe=("quickstart", "of conf/recipe"), steps=(12, "of training"))
    metrics = measure(arguments.recipe, arguments.steps, arguments.overrides)
    seconds = {name.partition("/")[2]: round(metrics[name], 4) for name in catalog.STAGES}
    share = metrics[catalog.SECONDS_CONTROLLER] / metrics[catalog.SECONDS_STEP]
    ours = {
        "seconds": seconds,
        "step_s": round(metrics[catalog.SECONDS_STEP], 4),
        "samples_per_s": round(metrics[catalog.SAMPLES_PER_S], 2),
        "tokens_per_s": round(metrics[catalog.TOKENS_PER_S], 1),
    }
    print_result("step", ours, None, None, vars(arguments), controller_share=round(share, 4))


if __name__ == "__main__":
    main()
