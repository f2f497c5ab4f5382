"""`python -m vae.report SWEEP_FOLDER`: write SWEEP_FOLDER/report/index.html and say what is in it."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.text import Text

from vae.errors import VAEError
from vae.report.page import write_report
from vae.report.sweep import read_sweep
from vae.report.tables import print_table


def main(arguments: list[str] | None = None) -> int:
    """0 when the report was written, even if it lists runs that failed; 1 and one sentence when it could not be."""
    parser = argparse.ArgumentParser(prog="python -m vae.report", description="Report on a sweep, or on a single run.")
    parser.add_argument("folder", help="the folder of a sweep, or of one run; the report goes to FOLDER/report")
    folder = parser.parse_args(arguments).folder
    console = Console()
    try:
        with console.status("Reading runs and drawing"):
            sweep = read_sweep(folder)
            page = write_report(sweep)
    except VAEError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(sweep, console)
    console.print(Text(f"Report: {page}"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
