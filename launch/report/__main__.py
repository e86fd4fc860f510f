"""`python -m launch.report RUN_DIR`: build a run's report again, or that of a sweep; several runs are compared."""

import argparse
from pathlib import Path

from launch.record.run_directory import REPORT, SWEEP
from launch.report import write_report
from launch.report.sweep import read_runs, read_sweep, write_comparison
from launch.run.command_line import told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write report.html, comparison.html.")
    parser.add_argument("runs", type=Path, nargs="+", help="directory of a run or a sweep, as runs/quickstart; several")
    with told():
        first, *others = runs = parser.parse_args().runs
        if others:
            print(write_comparison(read_runs(runs), Path("comparison.html")))
        elif (first / SWEEP).is_file():
            print(write_comparison(read_sweep(first), first / REPORT))
        else:
            print(write_report(first))


if __name__ == "__main__":
    main()
