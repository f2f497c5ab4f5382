"""What `vae.evaluate` measures of a finished run: each measure by itself, kept in the run's folder as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.engine.fitted_priors import MEASURED, likelihood_under, read_prior
from vae.engine.folder import read_json
from vae.engine.module import VAEModule
from vae.engine.per_image import write_per_image
from vae.engine.run import ONE_DRAW, likelihood_of, load
from vae.engine.trainer import ACCELERATORS, build_trainer
from vae.errors import VAEError, choose, whole
from vae.evaluation.likelihood import MOST_SAMPLES
from vae.evaluation.measures import MEASURES, check_options
from vae.evaluation.work import Work
from vae.files import write_json
from vae.objectives.labels import require_labels


def measure(folder: Path, split: str, options: dict[str, Any], **changes: Any) -> dict[str, float]:
    """The measures that `options["measures"]` names, each with its own entry of `options` as keyword arguments.

    Each is kept in evaluation-SPLIT.json as soon as it is there, beside what earlier calls measured, and the likelihood of
    each image in per_image-SPLIT.npz: an interruption, or a measure that makes no sense for the model or the data, costs none
    of the others. Raises VAEError that says which those are, and for a measure or an option that does not exist.
    """
    names, known = options["measures"], ("likelihood", *MEASURES)
    names = [names] if isinstance(names, str) else names
    if not names:
        raise VAEError(f"measures={names} names nothing to measure: choose from {', '.join(known)}.")
    if unknown := [name for name in names if name not in known]:
        raise VAEError(f"measures={unknown} is unknown: choose from {', '.join(known)}.")
    choose("split", split, Splits._fields)
    whole("nll_samples", changes.get("nll_samples"), least=0, most=MOST_SAMPLES, optional=True)
    choose("accelerator", changes.get("accelerator", "auto"), ACCELERATORS)
    for name in names:
        check_options(name, options.get(name) or {})
    fitted = options.get("fitted_prior")
    if fitted is not None and (other := [name for name in names if name not in MEASURED]):
        raise VAEError(f"measures={other} does not go with fitted_prior={fitted}: choose from {', '.join(MEASURED)}.")
    run, path = load(folder, **changes), folder / f"evaluation-{split}.json"
    if changes.get("nll_samples") and run[2].vae.discrete:
        raise VAEError(f"nll_samples={changes['nll_samples']}: leave it out, since {ONE_DRAW}.")
    if fitted is not None:
        run[2].vae.prior = read_prior(folder, str(fitted), run[2].vae)
    results: dict[str, float] = {}
    refused = []
    for name in names:
        try:
            for part in _measured(name, *run, split, options):
                results |= part
                write_json(path, {**read_json(path), **part})
                if name == "likelihood" and fitted is None:
                    write_per_image(folder, split, run[2].per_image, run[2].vae, again=True)
        except VAEError as error:
            refused.append(str(error))
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
            kept = f"what was measured before is in {path}" if results else "nothing was measured"
            raise VAEError(f"Interrupted while measuring {name}: {kept}.") from error
    if refused:
        raise VAEError(" ".join(refused) + (f" What else was asked for is in {path}." if results else ""))
    return results


def _measured(
    name: str, config: DictConfig, data: ImageDataModule, module: VAEModule, split: str, options: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """The parts of one measure, as they are finished."""
    show, fitted = options.get("progress_bar", False), options.get("fitted_prior")
    prefix = split if fitted is None else f"{split}/priors/{fitted}"
    if name == "likelihood" and fitted is None:
        yield from likelihood_of(config, data, module, split, show)
        return
    if name == "likelihood":
        vae, samples = module.vae.to(build_trainer(config).strategy.root_device), module.nll_samples
        data.test_split = split
        with Work(f"nll_samples={samples}", show) as work:
            work.expect(module.nll_steps(data.test_dataloader()) if samples else 0)
            for part in likelihood_under(vae, data, split, samples, work):
                yield {f"{prefix}/{key}": value for key, value in part.items()}
        return
    require_labels(module.vae, data, split)
    with Work(name, show) as work:
        found = MEASURES[name](module.vae, data, split, work, **(options.get(name) or {}))
    yield {f"{prefix}/{name}/{key}": value for key, value in found.items()}
