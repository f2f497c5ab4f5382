"""Every option of every config group: a value that makes no sense is one sentence at the start, never a traceback."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.engine.build import build, build_data
from vae.engine.trainer import build_trainer
from vae.engine.typed import check_types, fits, in_words
from vae.errors import VAEError, choose, whole

pytestmark = pytest.mark.usefixtures("quick_classifier")
#: Values that few options take: each either works or is refused in a sentence.
ODD = (-1, 0, 2.5, math.nan, "text", [1, "a"], None)
SPATIAL = ["network=autoencoder_kl", "network.block_out_channels=[4,4]", "network.norm_num_groups=2"]
SPATIAL += ["model.latent_dim=32"]
#: What a run needs to be tried in an instant, and the data sets that are on no machine.
WITH = {
    "cvae": [],
    "m2": ["data.labeled=20"],
    "ada_gvae": ["data=sprites", "++data.source.size=16"],
    "equivariance": SPATIAL,
    "spectrum": SPATIAL,
    "two_layer": ["posterior=two_layer", "prior=two_layer"],
    "burgess": ["data=sprites"],
}
SPRITES = "++data.source.subset={scale: 2, orientation: 3, x: 3, y: 3}"
GROUPS = ("network", "likelihood", "prior", "posterior", "objective", "objective/schedule", "regularizer", "optimizer")
GROUPS += ("lr_schedule",)


def options_of(path: Path) -> list[str]:
    node = yaml.safe_load(path.read_text()) or {}
    return [key for key in node if key not in ("_target_", "_partial_", "defaults")]


CASES = [
    (group, path.stem, option)
    for group in GROUPS
    for path in sorted((Path(CONFIGS) / group).glob("*.yaml"))
    for option in options_of(path)
]
#: Each option of an objective, once, is tried every day.
EVERYDAY = {(group, option): name for group, name, option in reversed(CASES) if group in ("objective", "prior")}
CASES = [
    pytest.param(g, name, option, marks=() if EVERYDAY.get((g, option)) == name else pytest.mark.slow)
    for g, name, option in CASES
]


def tried(config, folder=None) -> str | None:
    """Why a run cannot begin, or None if it can; without a folder, why its model cannot be built."""
    try:
        build(config)
        if folder is not None:
            build_trainer(config, folder)
    except VAEError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("group", "name", "option"), CASES, ids=lambda value: value)
def test_an_odd_value_works_or_is_refused_in_one_sentence(tiny, monkeypatch, group, name, option):
    more = WITH.get(name, [])
    more = [*more, SPRITES] if any("sprites" in override for override in more) else more
    config = tiny(f"{group}={name}", *(o for o in more if not o.startswith(f"{group}=")), "logger=none")
    key = f"{group.replace('/', '.')}.{option}"
    data = build_data(config)
    monkeypatch.setattr("vae.engine.build.build_data", lambda config: data)
    refused = []
    for value in ODD:
        odd = config.copy()
        OmegaConf.update(odd, key, value, force_add=True)
        if (why := tried(odd)) is not None:
            assert why.endswith(".") and "\n" not in why and "Traceback" not in why, (value, why)
            assert key in why or group not in ("objective", "regularizer") or "activation 'text'" in why, (value, why)
            refused.append(value)
    kind = yaml.safe_load((Path(CONFIGS) / group / f"{name}.yaml").read_text()).get("_target_", "vae.")
    assert refused or kind.startswith("torch."), f"{key} takes anything at all"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.latent_dim", [0, -1, 2.5, "text", None, 10**9]),
        ("trainer.max_epochs", [1.5, "text", -2]),
        ("trainer.max_steps", [1.5, "text", -2]),
        ("trainer.log_every_n_steps", [0, -1, 2.5, "text"]),
        ("trainer.check_val_every_n_epoch", [0, -1, 2.5, "text"]),
        ("trainer.gradient_clip_val", [-1, "text", math.nan]),
        ("trainer.precision", ["64-true", "bf16-true", "16-true", "text"]),
        ("trainer.accelerator", ["text", 3]),
        ("callbacks.pictures.every_n_epochs", [0, -1, 2.5, "text", None]),
        ("callbacks.pictures.points", [0, -1, 2.5, "text", None]),
        ("callbacks.interruptible.every_n_steps", [0, -1, 2.5, "text"]),
        ("callbacks.interruptible.every_n_seconds", [-1, "text", True]),
        ("callbacks.ema.decay", [-1, 1, "text", None, True]),
        ("callbacks.gradients.skip_above", [0, -1, "text", True]),
        ("evaluation.nll_samples", [-5, 2.5, "text", 10**9]),
        ("data.batch_size", [0, -1, 64.5, "text", None]),
        ("data.eval_batch_size", [0, -1, 64.5, "text", None]),
        ("data.limit", [0, -1, 64.5, "text"]),
        ("data.binarize", ["text", 1]),
        ("seed", [-1, 2.5, "text", None]),
        ("compile", ["text", 3]),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_name_it_is_typed_with(tiny, tmp_path, key, values):
    config = tiny("callbacks=[ema,gradients]", "logger=none")
    assert tried(config, tmp_path) is None
    for value in values:
        odd = config.copy()
        OmegaConf.update(odd, key, value, force_add=True)
        why = tried(odd, tmp_path)
        assert why is not None and key in why and why.endswith("."), (value, why)


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tiny, tmp_path):
    for override in ("network.hidden=[1000000000]", "model.latent_dim=1000000000"):
        assert "must be" in tried(tiny(override), tmp_path) or "at most" in tried(tiny(override), tmp_path)
    assert "100,000" in tried(tiny("prior=vampprior", "prior.pseudo_inputs=1000000000"), tmp_path)


def test_the_two_checks_name_the_setting_and_what_it_takes():
    assert choose("a.b", "x", ("x", None)) == "x" and choose("a.b", None, ("x", None)) is None
    with pytest.raises(VAEError, match=r"^a\.b=true is unknown: choose one of 1, 2\.$"):
        choose("a.b", True, (1, 2))
    assert whole("n", 3) == 3 and whole("n", None, optional=True) is None
    for wrong, shown in ((True, "true"), (0, 0), (3.0, 3.0), ("3", 3), (None, "null")):
        with pytest.raises(VAEError, match=rf"^n={shown} must be a whole number of at least 1\.$"):
            whole("n", wrong)
    with pytest.raises(VAEError, match=r"^n=7 must be a whole number from 0 to 5, or null\.$"):
        whole("n", 7, least=0, most=5, optional=True)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lr=-1", "optimizer.lr=-1 cannot be used: Invalid learning rate: -1."),
        ("optimizer.lr=nan", "optimizer.lr=nan cannot be used: Invalid learning rate: nan."),
        ("optimizer.betas=[2,3]", r"optimizer.betas=[2, 3] cannot be used: Invalid beta parameter at index 0: 2."),
        ("+optimizer.rate=1", "optimizer.rate=1 cannot be used: "),
    ],
)
def test_an_option_that_torch_refuses_is_named_alone_and_as_it_is_typed(tiny, override, sentence):
    why = tried(tiny(override))
    assert why.startswith(sentence) and "\n" not in why


def test_options_that_torch_refuses_together_are_all_named(tiny):
    why = tried(tiny("optimizer.lr=-1", "optimizer.eps=-1"))
    assert why.startswith("optimizer.lr=-1, ") and " optimizer.eps=-1," in why


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "words"),
    [
        (int, [0, -3], [True, 2.0, "2", None], "a whole number"),
        (float, [0.5, 2], [True, math.nan, math.inf, -math.inf, "0.5", None], "a finite number"),
        (bool, [True], [0, "true", None], "true or false"),
        (str, ["text"], [1, True, None], "a word"),
        (int | None, [3, None], [False, 0.5], "a whole number or null"),
        (list[float], [[], [1, 0.5]], [1, [math.nan], ["a"], None], "a list, each a finite number"),
        (torch.nn.Module, ["anything"], [], "Module"),
    ],
)
def test_a_value_fits_what_a_constructor_declares_or_is_told_so_in_words(hint, right, wrong, words):
    assert all(fits(value, hint) for value in right) and not any(fits(value, hint) for value in wrong)
    assert in_words(hint) == words


def test_an_option_of_another_type_is_named_with_what_it_takes():
    check_types({"_target_": "vae.likelihoods.Gaussian", "sigma": 2}, "likelihood")
    for value, shown in ((math.nan, "nan"), ("much", "much"), (None, "null")):
        with pytest.raises(VAEError, match=rf"^likelihood\.sigma={shown} must be a finite number\.$"):
            check_types({"_target_": "vae.likelihoods.Gaussian", "sigma": value}, "likelihood")
    check_types({"_target_": "torch.optim.Adam", "lr": math.nan}, "optimizer")  # whose own checks are its own
