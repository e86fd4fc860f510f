"""`python -m launch.report RUN_DIR`: build a run's report again."""

import argparse
from pathlib import Path

from launch.report import write_report
from launch.run.command_line import told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="directory of a run, as in runs/quickstart")
    with told():
        print(write_report(parser.parse_args().run_dir))


if __name__ == "__main__":
    main()
