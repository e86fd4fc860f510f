"""`python -m launch.report RUN_DIR`: build the report of a run or a sweep again; of several runs, a comparison."""

import argparse
from pathlib import Path

from launch.run.command_line import told
from report import write_report
from report.sweep import read_runs, write_comparison


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write report.html, comparison.html.")
    parser.add_argument("runs", type=Path, nargs="+", help="directory of a run or a sweep, as runs/quickstart; several")
    with told():
        runs = parser.parse_args().runs
        print(write_comparison(read_runs(runs), Path("comparison.html")) if runs[1:] else write_report(runs[0]))


if __name__ == "__main__":
    main()
