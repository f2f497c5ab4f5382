"""`hydra/launcher=packed`: the jobs of a sweep that differ in numbers only, as one program. Imports no torch at its top."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra_plugins.hydra_joblib_launcher import joblib_launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from vae.cli import TRANSIENT, sentences
from vae.engine.launcher import Launcher
from vae.engine.turns import require_greenlet
from vae.errors import VAEError, whole

#: What `hydra/launcher=packed` stands for. most: runs as one program at most, fewer where the memory holds fewer; n_jobs: of
#: joblib, which takes convolutions and large networks on a CPU, as many as there are cores with -1.
PLACE = f"{joblib_launcher.__name__}.PackedLauncher"
OPTIONS = {"_target_": PLACE, "most": 64, "n_jobs": -1}
ConfigStore.instance().store(group="hydra/launcher", name="packed", node=OPTIONS, provider="vae")

#: Of a model that gains more on a CPU than a sixth of its steps: runs of 784-400-20 (652,000) were 1.3 times as fast, of
#: 784-800-20 (1,310,000) 1.16 times. A second core gives joblib more.
MOST_WEIGHTS = 800_000

#: Groups of settings whose numbers runs of one pack may differ in; `vae.engine.structure.signature` looks closer.
NUMBERS = ("objective", "regularizer", "optimizer", "lr_schedule")


class Packed(Launcher):
    """Trains what can be as one program, convolutions and large networks on a CPU by joblib, and all else one after another.

    most: runs as one program at most; the other options are joblib's.
    """

    def __init__(self, most: int = 64, **joblib: Any) -> None:
        super().__init__(**joblib)
        self.most = most

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from vae.engine.build import SHARED

        with sentences():
            whole("hydra.launcher.most", self.most)
            require_greenlet()
        setup_globals()
        self._configure_log()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = dict(enumerate(job_overrides, initial_job_idx))
        log = logging.getLogger(__name__)
        log.info(f"Launching {len(jobs)} jobs")
        for number, overrides in jobs.items():
            log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
        configs = {number: self._config(number, overrides) for number, overrides in jobs.items()}
        groups = collections.defaultdict[tuple[str, str], list[int]](list)
        for number, config in configs.items():
            groups[kind(config), str(OmegaConf.select(config, "model.latent_dim"))].append(number)

        done: dict[int, JobReturn] = {}
        shared = SHARED.set({})
        try:
            why = {group[0]: self._why_slow(configs[group[0]]) for group in groups.values()}
            beside = [n for group in groups.values() if why[group[0]] for n in group]
            for reason in sorted({reason for reason in why.values() if reason}):
                count = sum(len(group) for group in groups.values() if why[group[0]] == reason)
                log.warning(
                    f"Not packed: {count} runs have {reason}, which gain little or nothing from it on a CPU: joblib runs "
                    "them side by side."
                )
            packs = collections.defaultdict[str, list[int]](list)
            for (alike, _), group in sorted(groups.items(), key=lambda entry: (len(entry[0][1]), entry[0])):
                packs[alike] += [] if why[group[0]] else group
            for group in packs.values():
                for numbers in (group[first : first + self.most] for first in range(0, len(group), self.most)):
                    done |= self._pack(numbers, configs)
        finally:
            SHARED.reset(shared)
        for numbers in stretches(beside):
            done |= dict(zip(numbers, super().launch([jobs[n] for n in numbers], numbers[0]), strict=True))
        return [done[number] for number in jobs]

    def _config(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _configure_log(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

    def _pack(self, numbers: Sequence[int], configs: dict[int, DictConfig]) -> dict[int, JobReturn]:
        from vae.engine.packing import Pack

        varying = [override_names(configs[number], self.config) for number in numbers]
        jobs = [functools.partial(self._job, configs[number]) for number in numbers]
        try:
            return dict(zip(numbers, Pack(varying).run(jobs, swap), strict=True))
        finally:
            self._configure_log()

    def _job(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _why_slow(self, config: DictConfig) -> str:
        """What runs of this kind have that makes them no faster together, on a CPU; or nothing."""
        import torch

        from vae.engine.build import build

        on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        if config.trainer.accelerator != "cpu" and on_gpu:
            return ""
        try:
            _, module = build(config, start=False)
        except VAEError:  # each run will say so by itself
            return ""
        if any(isinstance(part, torch.nn.modules.conv._ConvNd) for part in module.modules()):
            return "convolutions"
        weights = sum(p.numel() for p in module.vae.parameters())
        return f"more than {MOST_WEIGHTS:,} weights" if weights > MOST_WEIGHTS else ""


def kind(config: DictConfig) -> str:
    """The settings that runs of one pack must have in common. Their latents may differ in size (`vae.engine.padding`)."""
    from vae.engine.folder import settings

    names = [str(key) for key in config if key not in ("hydra", "seed", *TRANSIENT)]
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=False)
    kept = {
        key: value
        for key, value in settings(plain).items()
        if key != "model.latent_dim"
        and not (key.partition(".")[0] in NUMBERS and (value is None or isinstance(value, int | float)))
    }
    return repr(sorted(kept.items(), key=lambda entry: entry[0]))


def override_names(config: DictConfig, sweep: DictConfig) -> str:
    """A job as it is spoken of: by what varies."""
    constant = sweep.hydra.job.config.override_dirname.exclude_keys
    task = [o for o in config.hydra.overrides.task if o.partition("=")[0] not in constant]
    return ",".join(task) or str(config.hydra.job.num)


def swap(around: Any) -> Any:
    """Hydra's config and the log's handlers, of which a process has one: those that are there, in exchange for others."""
    log = logging.getLogger()
    there = HydraConfig.instance().cfg, log.handlers[:], log.level
    if around is not None:
        HydraConfig.instance().cfg, log.handlers[:], log.level = around
    return there


def stretches(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Whole numbers in order -> the stretches of them without a gap."""
    for _, part in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        yield [number for _, number in part]


def use() -> None:
    """Let `hydra/launcher=packed` mean this one: Hydra takes launchers from packages named hydra_plugins only."""
    joblib_launcher.PackedLauncher = Packed
    Plugins.instance().class_name_to_class[PLACE] = Packed
