"""A run's folder: what is written there, how it is read back, and what a command that resumes may change."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import vae
from vae.cli import CONFIGS, TRANSIENT, command_line
from vae.engine.stored import is_addition, renewed
from vae.errors import VAEError, typed
from vae.files import refuse_aliases
from vae.refusals import sentence

if TYPE_CHECKING:
    from vae.data.module import ImageDataModule
    from vae.engine.module import VAEModule

CGROUPS = Path("/sys/fs/cgroup")
#: Settings of a run that are groups: those that are never empty, and those that may be.
GROUPS = "data", "network", "likelihood", "prior", "objective", "optimizer", "trainer", "model", "evaluation"
OPTIONAL = "posterior", "regularizer", "lr_schedule", "logger", "callbacks"


def settings(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """The config as flat dotted keys."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(config if isinstance(config, dict) else OmegaConf.to_container(config), "")
    return flat


def require_groups(settings: Mapping[str, Any]) -> None:
    """Raises VAEError where one value, or nothing, stands in place of a group of settings."""
    for name in (*GROUPS, *OPTIONAL):
        if name not in settings or (name in GROUPS and not isinstance(settings[name], Mapping)):
            given = f"{name}={typed(settings[name])}" if name in settings else f"{name}=[]"
            raise VAEError(
                f"{given} leaves out what is set under {name}: give {name}.KEY=VALUE for one of its settings."
            )


def read_config(folder: Path) -> DictConfig:
    """The resolved config of a run. Raises VAEError if the folder holds none.

    Where $VAE_DATA_DIR is set, a data set of ours is looked for there, unless the run was given a folder that exists.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise VAEError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        refuse_aliases(path.read_text())
        config = renewed(OmegaConf.to_container(OmegaConf.load(path)))
        schedule = config.get("lr_schedule") or {}
        if schedule.get("_target_") == "torch.optim.lr_scheduler.CosineAnnealingLR":  # which earlier versions stored
            epochs = None if schedule["T_max"] == config["trainer"]["max_epochs"] else schedule["T_max"]
            config["lr_schedule"] = {"_target_": "vae.engine.lr_schedule.Cosine", "_partial_": True, "epochs": epochs}
        source = config.get("data", {}).get("source", {})
        if os.environ.get("VAE_DATA_DIR") and _is_ours(source) and "root" in source:
            named = any(override.lstrip("+").startswith("data.source.root=") for override in read_overrides(folder))
            if not (named and Path(source["root"]).expanduser().is_dir()):
                source["root"] = os.environ["VAE_DATA_DIR"]
        return OmegaConf.create(config)
    except Exception as error:
        raise VAEError(f"{path} is damaged and cannot be read ({type(error).__name__}).") from error


def read_overrides(folder: Path) -> list[str]:
    """What the command that trained a run had set; of a run of a sweep, what varies."""
    path = folder / "overrides.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else []


def resumed_config(folder: Path, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The config that a run was started with, the overrides of the resuming command on top; and the overrides that both
    commands named.

    Plain values are put into the stored config. A command that names a group, or adds to the config or takes from it, is
    composed anew together with what the run's own command named: inside a Hydra application or context only.
    Raises VAEError where that is not possible.
    """
    config = OmegaConf.merge(read_config(folder), {"progress_bar": True})
    known = settings(config).keys() | TRANSIENT
    parser = OverridesParser.create()
    stored, given = (
        {parsed.key_or_group: parsed for parsed in parser.parse_overrides(named)}
        for named in (read_overrides(folder), overrides)
    )
    if all(name in known and not override.is_delete() for name, override in given.items()):
        for name, override in given.items():
            OmegaConf.update(config, name, override.value())
    else:
        try:
            config = compose("train", [override.input_line for override in {**stored, **given}.values()])
        except HydraException as error:
            raise VAEError(
                f"What {folder} was trained with cannot be composed anew: {sentence(error, CONFIGS)} Give the same "
                "--config-dir again, or only plain values, which its config.yaml holds."
            ) from error
    return config, [o.input_line for name, o in {**stored, **given}.items() if name not in TRANSIENT]


def read_metrics(folder: Path) -> dict[str, float]:
    """What training wrote to metrics.json; empty if the run did not finish. Raises VAEError if it is damaged."""
    return read_json(folder / "metrics.json")


def read_status(folder: Path) -> dict[str, Any]:
    """What training wrote to status.json; empty if it did not begin. Raises VAEError if it is damaged."""
    return read_json(folder / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise VAEError(f"{path} is damaged: it is not JSON.") from error


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise VAEError(f"Another process is training the run in {folder}.") from error
    try:
        yield
    finally:
        lock.release()


#: What may change when a run goes on: it says how or where training is done, looked at and measured, not what is trained.
MEASURING = ("evaluation", "data.eval_batch_size")
TAKEN_OVER = (
    *MEASURING,
    *("threads", "compile", "logger", "sweep_metric", "sweep_direction", "data.num_workers"),
    *("trainer.accelerator", "trainer.devices", "trainer.log_every_n_steps", "trainer.profiler", "trainer.max_time"),
    *("trainer.strategy", "trainer.num_sanity_val_steps", "trainer.enable_model_summary", "trainer.detect_anomaly"),
    *("callbacks.interruptible", "callbacks.pictures", "callbacks.stopwatch"),
)
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")


class OtherTraining(VAEError):
    """A command that resumes a run asks for what would not be the same training gone on with."""


def differences(stored: dict[str, Any], settled: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of the run in which two configs differ, by dotted key. Absent is null, or the default of an option that a
    newer version added; where a data set of ours lies is no setting."""
    old, new = (settings(without_data_root(config)) for config in (stored, settled))
    keys = [key for key in {**old, **new} if key not in TRANSIENT and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys if not is_addition(key, old, new)}


def refuse_other_training(folder: Path, stored: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> bool:
    """Whether a run of the `stored` config, under settings that are `changed`, goes on for longer.

    Raises OtherTraining, naming the settings, where one of them changes what was trained already.
    """
    other = {key: values for key, values in changed.items() if not begins_with(key, TAKEN_OVER)}
    lengths = [[math.inf if end in (None, -1) else end for end in other.pop(key, (0, 0))] for key in LENGTHS]
    if any(new < old for old, new in lengths):
        other |= {key: changed[key] for key in LENGTHS if key in changed}
    planned, asked = other.get("lr_schedule.epochs", (None, None))
    if asked is not None and asked == (planned or stored["trainer"]["max_epochs"]):  # as null meant then
        del other["lr_schedule.epochs"]
    if other:
        told = [f"{key} is {old} there and {new} now" for key, (old, new) in other.items()]
        more = f", and {len(told) - 6} more differ" if len(told) > 6 else ""
        raise OtherTraining(
            f"{folder} holds a run of other settings: {', '.join(told[:6])}{more}. Nothing was changed. resume=true goes on "
            "with a run as it is or for longer; resume=restart deletes it and starts anew."
        )
    return any(new > old for old, new in lengths)


def begins_with(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of these names or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_ours(source: dict[str, Any]) -> bool:
    return str(source.get("_target_")).startswith("vae.data.")


def without_data_root(config: dict[str, Any]) -> dict[str, Any]:
    """`config` less the folder of a data set of ours: the images are the same wherever they lie."""
    data = config.get("data", {})
    source = data.get("source", {})
    if not _is_ours(source):
        return config
    return {**config, "data": {**data, "source": {key: value for key, value in source.items() if key != "root"}}}


def refuse_foreign_checkpoint(folder: Path) -> None:
    """Lightning starts from any hpc_ckpt_N.ckpt that lies where it runs under Slurm, of whatever run it is."""
    if found := sorted(folder.glob("hpc_ckpt_*.ckpt")):
        raise VAEError(
            f"{found[-1]} was left by Lightning when Slurm stopped a run; it is not known of which settings. Move it away: "
            "runs go on from checkpoints/last.ckpt only."
        )


def holds_training(folder: Path) -> bool:
    """Whether an earlier attempt at the run left something to lose."""
    return (folder / "metrics.json").is_file() or any((folder / "checkpoints").glob("*.ckpt"))


def discard(folder: Path) -> None:
    """Remove what an earlier attempt at the run wrote."""
    for old in ("metrics.json", "checkpoints", "pictures"):
        path = folder / old
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for pattern in ("events.out.tfevents.*", "hpc_ckpt_*.ckpt", "per_image-*.npz"):
        for path in folder.glob(pattern):
            path.unlink()


def images_digest(data: ImageDataModule) -> str:
    """What tells one set of images from another wherever it lies: the sizes of its splits, and the first images of each."""
    digest = hashlib.blake2b(digest_size=16)
    for split in data.splits_ready():
        x = split.gather(torch.arange(min(8, len(split))))[0].contiguous()
        digest.update(f"{len(split)} {tuple(x.shape)} {x.dtype} ".encode() + x.cpu().numpy().tobytes())
    return digest.hexdigest()


def facts(config: DictConfig, data: ImageDataModule, module: VAEModule, overrides: Sequence[str]) -> dict[str, Any]:
    """What later commands need to know of a run and would otherwise have to guess: facts.json.

    data: the name of the data set; image_shape: (C, H, W); num_classes: of the labels that the model is given, 0 for none;
    latent_shape: (c, h, w) of a latent that is a map, or (D,); latent_label: whether the label is a latent variable too;
    likelihood: its class; discrete: whether it is a mass, not a density (likelihoods of the two never compare); weights:
    what those that are tested and kept are; images: `images_digest`; set: the settings that the command line set; vae: the
    version.
    """
    ema = (config.get("callbacks") or {}).get("ema")
    source = str(config.data.source._target_ if "source" in config.data else config.data._target_)
    return {
        "data": source.rsplit(".", 1)[-1],
        "images": images_digest(data),
        "image_shape": list(data.image_shape),
        "num_classes": module.vae.num_classes,
        "latent_shape": list(module.vae.latent_shape),
        "latent_label": module.vae.latent_label,
        "likelihood": type(module.vae.likelihood).__name__,
        "discrete": module.vae.likelihood.discrete,
        "weights": f"an exponential moving average of decay {ema.decay}" if ema else "as trained",
        "set": [override.partition("=")[0].lstrip("+~") for override in overrides],
        "vae": vae.__version__,
    }


def environment() -> dict[str, Any]:
    """What a run was made with: versions, commit, device, command line."""
    import torchvision

    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
        commit = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "vae": vae.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch_lightning": pl.__version__,
        "hydra": hydra.__version__,
        "git_commit": commit,
        "device": device,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "command": command_line(),
        "date": now(),
    }


def usable_cores() -> int:
    """The cores that this process may use: of its affinity, of its control group's quota and of its Slurm task."""
    cores = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores.append(len(os.sched_getaffinity(0)))
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        cores.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no control groups, or no quota: "max"
        group = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        place = CGROUPS / group.removeprefix("0::").strip("/")
        for level in (place, *place.parents):
            if level.is_relative_to(CGROUPS) and (level / "cpu.max").is_file():
                quota, period = (level / "cpu.max").read_text().split()
                if quota != "max":
                    cores.append(math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):  # version 1
        quota, period = (int((CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:
            cores.append(math.ceil(quota / period))
    return max(1, min(cores))


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
