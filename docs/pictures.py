"""`python docs/pictures.py SWEEP`: copy the pictures of these pages from a finished `experiment=digits_sweep`.

pictures.json notes of which runs they are.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(sweep: Path) -> None:
    runs = [
        json.loads((folder / "facts.json").read_text()) | {"name": folder.name}
        for folder in sorted(sweep.glob("model.*"))
    ]
    shutil.copy(sweep / "report" / "plots" / "rate_distortion.png", HERE / "rate_distortion.png")
    of = {
        "reconstructions": "model.latent_dim=16,objective.beta=1",
        "latent_grid": "model.latent_dim=2,objective.beta=1",
    }
    for name, run in of.items():
        shutil.copy(sweep / run / "pictures" / f"{name}.png", HERE / f"{name}.png")
    made = {"runs": [run["name"] for run in runs], "data": runs[0]["data"], "vae": runs[0]["vae"], **of}
    (HERE / "pictures.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
