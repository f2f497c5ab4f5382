"""`python -m vae.report SWEEP_FOLDER`: write SWEEP_FOLDER/report/index.html and say what is in it; of two or three folders,
what sets the others apart from the first."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.text import Text

from vae.cli import sentences
from vae.errors import VAEError
from vae.report.comparison import compare
from vae.report.comparison_page import print_comparison, write_comparison
from vae.report.page import write_report
from vae.report.pairing import read_sides
from vae.report.sweep import read_sweep
from vae.report.tables import print_table


def main(arguments: list[str] | None = None) -> None:
    """Exits with code 1 and one sentence if no report can be written; runs that failed are part of the report."""
    parser = argparse.ArgumentParser(
        prog="python -m vae.report",
        description="Report on a sweep or a single run; of two or three, on what sets the others apart from the first.",
    )
    parser.add_argument("folder", help="of a sweep, or of one run; the report goes to FOLDER/report")
    parser.add_argument(
        "others", nargs="*", help="sweeps to set beside it, at most two; the report goes to FOLDER/report/against"
    )
    parser.add_argument("--out", help="where a report on several sweeps goes instead")
    options = parser.parse_args(arguments)
    console = Console()
    with sentences(), console.status("Reading runs and drawing"):
        if options.others:
            comparison = compare(read_sides([options.folder, *options.others]))
            page = write_comparison(comparison, options.out)
        elif options.out:
            raise VAEError("--out is for a report on several sweeps: that on one goes to FOLDER/report.")
        else:
            sweep = read_sweep(options.folder)
            page = write_report(sweep)
    if options.others:
        print_comparison(comparison, console)
    else:
        print_table(sweep, console)
    console.print(Text(f"Report: {page}"), soft_wrap=True)


if __name__ == "__main__":
    main()
