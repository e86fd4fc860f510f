"""TensorBoard: scalars and the settings, in `tensorboard/` of the run's directory."""

from collections.abc import Mapping

import yaml

from launch.record.trackers import TRACKERS, Tracked, Tracker


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    package = "tensorboard"

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds

        purged = None if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purged)
        self._writer.add_text("settings", f"```\n{yaml.safe_dump(dict(run.settings), sort_keys=False)}```")

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text(f"alerts/{title}", text)

    def close(self) -> None:
        self._writer.close()
