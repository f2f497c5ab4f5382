"""What was measured, as tables: in the terminal, and as NAME.json and NAME.md beside what is there of other sections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vae.engine.folder import environment
from vae.files import write_json, write_text


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) of every section that was measured."""
    if steps := results.get("step"):
        rows = []
        for name, row in steps.items():
            if "failed" in row:
                rows.append([name, row["failed"], *[""] * 5])
                continue
            cpu = f"{row['cpu_ratio']:.3f}" if "cpu_ratio" in row else ""
            nats = f"{row['nats']:+.2f}" if "nats" in row else ""
            alike = f"{row['settled_ratio']:.3f}" if "settled_ratio" in row else ""
            times = [f"{row['bare_ms']:.2f}", f"{row['project_ms']:.2f}"]
            rows.append([name, *times, f"{row['ratio']:.3f}", cpu, alike, nats])
        heads = [
            "",
            "bare loop, ms",
            "project, ms",
            "ratio",
            "ratio of CPU time",
            "of CPU time, to a bare loop whose process is settled alike",
            "val/elbo gained, nats",
        ]
        yield "A training step", heads, rows
    if peers := results.get("peers"):
        rows = [
            [
                name,
                f"{row['seconds_an_epoch']:.2f}",
                f"{row['bare_ms']:.2f}",
                f"{row['project_ms']:.2f}",
                f"{row['ratio']:.2f}",
            ]
            for name, row in peers.items()
        ]
        heads = ["", "seconds per epoch of 55,000", "bare loop, ms a step", "ms a step", "ratio"]
        yield "784-400-20 on MNIST, batch 128", heads, rows
    if sweep := results.get("sweep"):
        rows = [
            ["bare loop, one after another", f"{sweep['bare_seconds']:.1f}", ""],
            [f"project, {sweep['jobs']} jobs", f"{sweep['project_seconds']:.1f}", f"{sweep['ratio']:.3f}"],
        ]
        rows += [[f"  {part}", f"{s:.1f}", f"{s / sweep['bare_seconds']:.3f}"] for part, s in sweep["seconds"].items()]
        title = f"A sweep of {sweep['runs']} runs of {sweep['epochs']} epochs, from command to report"
        yield title, ["", "seconds", "ratio"], rows
    if growth := results.get("growth"):
        rows = []
        for name, curve in growth.items():
            first, last, exponent = curve["points"][0], curve["points"][-1], curve["exponent_at_the_end"]
            for point in (first, last):
                rows.append(
                    [
                        f"{name} = {point['value']}",
                        curve["unit"],
                        f"{point['seconds']:.3f}",
                        f"{point['bytes'] / 2**20:.0f}",
                        "",
                    ]
                )
            rows[-1][-1] = f"{exponent['seconds']:.2f}, {exponent['bytes']:.2f}"
        yield "How cost grows", ["", "of what", "seconds", "MiB added", "exponent of time, memory"], rows

    if denormals := results.get("denormals"):
        row = [f"{denormals['kept_ms']:.1f}", f"{denormals['flushed_ms']:.1f}", f"{denormals['ratio']:.2f}"]
        heads = ["", "kept, ms", "taken as 0, ms", "ratio"]
        yield (
            "Numbers below 1e-38 in a training step, one thread",
            heads,
            [["VampPrior, 500 pseudo-inputs, batch 100", *row]],
        )


def conditions(threads: str, load: float) -> dict[str, Any]:
    """What a section is measured on; threads: of a process, auto for one; load: before its start."""
    return {**environment(), "threads": 1 if threads == "auto" else threads, "load": load}


def markdown(results: dict[str, Any]) -> str:
    """The tables, each with what it was measured on."""
    lines = []
    for section, facts in results["environments"].items():
        for title, heads, rows in tables({section: results[section]}):
            lines += [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
            lines += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
            load = f" Load before the start: {facts['load']:.2f} processes." if "load" in facts else ""
            lines += [
                "",
                f"Measured {facts['date']} on {facts['device']}, {facts['cores']} cores, {facts['threads']} threads a process, "
                f"torch {facts['torch']}, pytorch-lightning {facts['pytorch_lightning']}, Python {facts['python']}, commit "
                f"{facts['git_commit']}.{load}",
                "",
            ]
    return "\n".join(lines)


def write_results(out: Path, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """NAME.json and NAME.md: these sections beside what is there of others, all of which are returned."""
    path = out / f"{name}.json"
    whole = json.loads(path.read_text()) if path.is_file() else {"environments": {}}
    environments = {**whole["environments"], **results["environments"]}
    whole = {**whole, **results, "environments": environments}
    write_json(path, whole)
    write_text(out / f"{name}.md", markdown(whole))
    return whole


def show(results: dict[str, Any]) -> None:
    console = Console()
    for title, heads, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for column, head in enumerate(heads):
            table.add_column(head, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
