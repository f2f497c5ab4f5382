"""A finished sweep -> one page, a CSV and plots. Knows run folders, nothing of models: it never imports torch."""

from vae.report.page import write_report
from vae.report.runs import Run
from vae.report.sweep import Sweep, read_sweep
from vae.report.tables import print_table

__all__ = ["Run", "Sweep", "print_table", "read_sweep", "write_report"]
