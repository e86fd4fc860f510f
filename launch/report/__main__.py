"""`python -m launch.report RUN_DIR`: build a run's report again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.errors import UserError
from launch.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="directory of a run, as in runs/quickstart")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
