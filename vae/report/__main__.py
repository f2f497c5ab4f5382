"""`python -m vae.report SWEEP_FOLDER`: write SWEEP_FOLDER/report/index.html and say what is in it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.text import Text

from vae.cli import sentences
from vae.report.page import write_report
from vae.report.sweep import read_sweep
from vae.report.tables import print_table


def main(arguments: list[str] | None = None) -> None:
    """Exits with code 1 and one sentence if no report can be written; runs that failed are part of the report."""
    parser = argparse.ArgumentParser(prog="python -m vae.report", description="Report on a sweep, or on a single run.")
    parser.add_argument("folder", help="the folder of a sweep, or of one run; the report goes to FOLDER/report")
    folder = parser.parse_args(arguments).folder
    console = Console()
    with sentences(), console.status("Reading runs and drawing"):
        sweep = read_sweep(folder)
        page = write_report(sweep)
    print_table(sweep, console)
    console.print(Text(f"Report: {page}"), soft_wrap=True)


if __name__ == "__main__":
    main()
