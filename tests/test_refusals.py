"""What is refused before anything is trained: said in one sentence, and leaving nothing behind."""

from __future__ import annotations

import sys

import pytest
from commands import run
from hydra import compose, initialize_config_dir

from vae.cli import CONFIGS
from vae.refusals import closest, sentence


def said(*words: str, name: str = "train", configs: str = CONFIGS) -> str | None:
    """What is said of a config that cannot be composed with these overrides."""
    with initialize_config_dir(configs, version_base="1.3"), pytest.raises(Exception) as refused:
        compose(name, list(words))
    return sentence(refused.value, configs)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimiser.lr=1", "optimizer.lr"),
        ("objective.bta=4", "objective.beta"),
        ("optimzer=sgd", "optimizer"),
        ("beta=4", "objective.beta"),
        ("epochs=3", "trainer.max_epochs"),
        ("data.binarise=dynamic", "data.binarize"),
        ("objective/schedle=linear", "objective/schedule"),
        ("hydra.sweeper.param=3", "hydra.sweeper.params"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(word, meant):
    assert said(word) == f"{word.partition('=')[0]} is unknown: did you mean {meant}? (+{word} adds a new key.)"


def test_a_key_of_another_command_is_told_by_the_keys_of_that_command():
    assert (said("nll_sample=5", name="evaluate") or "").startswith("nll_sample is unknown: did you mean nll_samples?")
    assert (said("evaluation.nll_samples=5", name="evaluate") or "").startswith(
        "evaluation.nll_samples is unknown: did you mean nll_samples?"
    )
    assert (
        said("posterior.foo=1") == "posterior.foo is unknown: --help lists all keys. (+posterior.foo=1 adds a new key.)"
    )
    assert said("zzz=1") == "zzz is unknown: --help lists all keys. (+zzz=1 adds a new key.)"


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("posterior.levels=[8]", "posterior=fsq"),
        ("data.source.path=here", "data=arrays or folder or webdataset"),
        ("objective/features=lpips", "objective=feature"),
        ("hydra.sweeper.n_trials=3", "hydra/sweeper=optuna"),
    ],
)
def test_a_setting_of_an_option_that_is_not_chosen_is_told_with_the_option(word, options):
    assert said(word) == f"{word.partition('=')[0]} is a setting of {options}, which is not what is chosen."


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data=mnits", "data=mnits is unknown: did you mean mnist?"),
        ("callbacks=[emma]", "callbacks=emma is unknown: did you mean ema?"),
        ("regularizer=x", "regularizer=x is unknown: choose one of equivariance, none, spectrum."),
        ("+optimizer.lr=1", "optimizer.lr is there already: leave the + out to change it."),
        ("~foo", "Could not delete from config. 'foo' does not exist."),
        ("hydra.job.chdir=foo", "hydra.job.chdir=foo: Value 'foo' is not a valid bool (type str)."),
        ("seed=1,2", "seed=1,2 is more than one value: add -m to sweep over them, or write 'seed=[1,2]' for a list."),
        ("seed=choice(1,2)", "seed=choice(1,2) is more than one value: add -m to sweep over them."),
        ("objective.beta=[1", "objective.beta=[1 cannot be read: write KEY=VALUE, "),
    ],
)
def test_other_mistakes_are_told_with_what_to_type(word, sentence):
    assert (said(word) or "").startswith(sentence)


@pytest.mark.parametrize("word", ["prior=null", "prior=maf,null", "prior=3"])
def test_a_group_of_null_or_a_number_is_told_with_the_options_of_the_command(word, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vae.fit_prior", "run=x", word])
    value = word.rpartition(",")[2].removeprefix("prior=")
    assert said(f"prior={value}", name="fit_prior", configs=f"{CONFIGS}/fit_prior") == (
        f"prior={value} is unknown: choose one of flow_matching, gaussian, maf, mixture, realnvp, vampprior."
    )


def test_what_is_not_hydras_word_on_the_command_line_is_not_put_into_words():
    from hydra.errors import InstantiationException

    assert sentence(ValueError("math domain error"), CONFIGS) is None
    assert sentence(InstantiationException("Error in call to target 'mine'"), CONFIGS) is None


def test_the_closest_key_is_nearly_the_same_or_its_last_part_is_or_it_is_about_the_same():
    known = ["trainer.max_epochs", "model.latent_dim", "objective.beta", "objective", "data"]
    asked = ["trainer.max_epoch", "model.beta", "trainer.epoch", "latent", "dat", "xyz"]
    assert [closest(key, known) for key in asked] == [
        "trainer.max_epochs", "objective.beta", "trainer.max_epochs", "model.latent_dim", "data", None,
    ]  # fmt: skip


# ---- as commands ----


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("train", ["optimiser.lr=1"], "optimiser.lr is unknown: did you mean optimizer.lr?"),
        ("train", ["data=digits", "-m", "optimiser.lr=1,2"], "optimiser.lr is unknown: did you mean optimizer.lr?"),
        (
            "train",
            ["-m", "objective.beta=interval(0,1)"],
            "An interval has no end of values to sweep over: add hydra/sw",
        ),
        ("train", ["objective.beta=${foo}"], "Interpolation key 'foo' not found."),
        ("evaluate", ["run=x", "ais.image=3"], "ais.image is unknown: did you mean ais.images?"),
        ("fit_prior", ["run=x", "prior=null"], "prior=null is unknown: choose one of flow_matching, gaussian, "),
        ("fit_prior", ["folder", "prior=maf"], "folder cannot be read: write run=folder."),
    ],
)
def test_a_command_that_cannot_be_composed_is_one_sentence_and_leaves_no_folder(module, words, said, tmp_path):
    (tmp_path / "folder").mkdir()
    done = run(f"vae.{module}", *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"Error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/*")) and not list((tmp_path / "folder").iterdir())


SMALL = [
    "data.limit=64",
    "data.batch_size=32",
    "trainer.max_epochs=1",
    "evaluation.nll_samples=0",
    "network.hidden=[4]",
]
SMALL += ["callbacks=minimal", "logger=none", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("refused", ["+trainer.foo=1", "trainer.max_epochs=0"])
def test_a_run_that_is_refused_leaves_no_folder_but_one_that_was_there(refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for chosen in ([], ["run=new/er"], ["run=there"], ["run=full", "resume=true"]):
        done = run("vae.train", *SMALL, refused, *chosen, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("runs/digits/*")) and not (tmp_path / "new" / "er").exists()
    assert (tmp_path / "there").is_dir() and (tmp_path / "full" / "mine").read_text() == "kept"


def test_a_refused_job_of_a_sweep_stays_a_failed_run_of_its_report(tmp_path):
    done = run("vae.train", "-m", *SMALL, "run=sweep", "objective.beta=-1,-2", cwd=tmp_path)
    assert done.returncode == 1 and "2 runs: 2 failed" in done.stdout
    assert (tmp_path / "sweep" / "objective.beta=-1" / "status.json").is_file()
    assert (tmp_path / "sweep" / "report" / "index.html").is_file()


def test_a_run_that_fails_once_it_trains_keeps_its_folder(tmp_path):
    (tmp_path / "failing.py").write_text(
        "import pytorch_lightning as pl\nfrom vae.errors import VAEError\n\n\nclass Fails(pl.Callback):\n"
        "    def on_train_start(self, trainer, module):\n        raise VAEError('No more.')\n"
    )
    done = run("vae.train", *SMALL, "run=new", "+callbacks.mine._target_=failing.Fails", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("Error: No more.\n")
    assert (tmp_path / "new" / "status.json").is_file() and (tmp_path / "new" / "facts.json").is_file()
