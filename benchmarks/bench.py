"""`make bench`: how near to the arithmetic the project runs, and how its cost grows.

step    the project's training step, TensorBoard and progress bar on, against the bare loop of bare.py, epochs in turn
sweep   16 runs from the command to the report, against the bare loop training the same 16 one after another
growth  time and peak memory against batch, latent size, images, K of the importance bound, jobs
denormals  a step with a VampPrior as training takes it, with numbers below 1e-38 taken as 0, against one that keeps them
Each is the file of that name. Writes results/bench.json, results/bench.md and a figure each of `growth` beside this file.
Only ratios within one run mean anything on another machine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import denormals
import growth
import report
import step
import sweep

# growth is the first, because it forks, which is best done before any thread has been started
SECTIONS = {"growth": growth.measure, "step": step.measure, "sweep": sweep.measure, "denormals": denormals.measure}
ON_ONE_THREAD = ("growth", "denormals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; all unless said")
    parser.add_argument("--threads", default="auto", help="of a single run; auto: one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs of the sweep side by side")
    parser.add_argument("--epochs", type=int, default=5, help="of each run of the sweep")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")

    results: dict[str, Any] = {"environments": {}}
    for name in (name for name in SECTIONS if name in (options.sections or SECTIONS)):
        print(f"{name} ...", flush=True)
        start, load = time.perf_counter(), os.getloadavg()[0]
        results[name] = SECTIONS[name](options)
        results["environments"][name] = report.conditions("auto" if name in ON_ONE_THREAD else options.threads, load)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    report.show(report.write_results(options.out, "bench", results))
    if "growth" in results:
        growth.draw(results["growth"], options.out)
    print(f"Written to {options.out}/bench.json and bench.md; sections that were not run now stand there as they were.")


if __name__ == "__main__":
    main()
