"""Look-to-Confirm calibration on disk: `look.json` beside a policy's weights, and its evidence in a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from perception.calibration import FEATURES, CalibratorState
from perception.errors import UserError
from perception.files import write_text
from perception.types import LookState

LOOK = "look.json"
EVIDENCE = "look.npz"


def write_look(folder: Path, state: LookState) -> None:
    write_text(folder / LOOK, json.dumps({"features": FEATURES, **asdict(state)}, indent=2) + "\n")


def read_look(folder: Path) -> LookState | None:
    """None where the policy never looked again. Raises UserError for a file that does not fit this program."""
    path = folder / LOOK
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        if tuple(saved.pop("features")) != FEATURES:
            raise ValueError("it was made with other confidence features")
        weights = tuple(float(weight) for weight in saved.pop("weights"))
        if len(weights) not in (0, len(FEATURES) + 1):
            raise ValueError(f"{len(weights)} weights for {len(FEATURES)} features")
        return LookState(weights=weights, **{key: float(value) for key, value in saved.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: {error}; remove it, and it is made again") from error


def write_calibrator(folder: Path, saved: CalibratorState) -> None:
    np.savez(folder / EVIDENCE, judged=saved.judged, decisions=saved.decisions)
    write_look(folder, saved.look)


def read_calibrator(folder: Path) -> CalibratorState | None:
    """None where the checkpoint's run did not look again."""
    if (look := read_look(folder)) is None:
        return None
    with np.load(folder / EVIDENCE) as arrays:
        return CalibratorState(look=look, judged=arrays["judged"], decisions=arrays["decisions"])
