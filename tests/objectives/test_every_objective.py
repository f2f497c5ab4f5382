"""What holds for each objective of conf/objective, whichever it is."""

from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.data.images import Batch
from vae.engine.build import build
from vae.engine.trainer import build_trainer
from vae.errors import VAEError
from vae.objectives.elbo import SinglePass
from vae.seeding import generator

pytestmark = pytest.mark.usefixtures("quick_classifier")
OBJECTIVES = sorted(path.stem for path in (Path(CONFIGS) / "objective").glob("*.yaml"))
NETWORKS = sorted(path.stem for path in (Path(CONFIGS) / "network").glob("*.yaml"))
#: prior and posterior families that go together
FAMILIES = ["prior=mixture", "prior=vampprior", "prior=realnvp", "posterior=planar", "posterior=iaf"]
FAMILIES += ["prior=two_layer posterior=two_layer"]

SMALL = {
    # a small gamma: its loss holds the guess of a discriminator that 200 steps of 1e-4 leave untrained
    "factor_vae": ["objective.hidden=[32,32]", "objective.gamma=1"],
    "iwae": ["objective.samples=5"],
    "dreg": ["objective.samples=5"],
    "ciwae": ["objective.samples=5"],
    "miwae": ["objective.groups=2", "objective.samples=3"],
    "piwae": ["objective.groups=2", "objective.samples=3"],
    "m2": ["+data.labeled=20", "objective.hidden=[16]"],
    "ada_gvae": [
        "data=sprites",
        "++data.source.size=16",
        "++data.source.subset={scale: 2, orientation: 4, x: 4, y: 4}",
    ],
}
#: families that an objective refuses
REFUSED = {
    "free_bits": FAMILIES,
    "tcvae": FAMILIES,
    "dip_vae_i": FAMILIES[3:],
    "dip_vae_ii": FAMILIES[3:],
    "ada_gvae": FAMILIES[3:],
    "cvae": ["prior=vampprior"],
    "m2": ["prior=vampprior"],
}


def built(tiny, name, *overrides):
    return build(tiny(f"objective={name}", *SMALL.get(name, []), *overrides))


def validation_loss(data, module):
    """The mean over the validation images, as the module logs it."""
    total, module = 0.0, module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            terms = module.objective(module.vae, data.prepare(batch, False), generator(batch.seed, "z"), 0)
            total += float(terms["loss"]) * len(batch.x)
    module.train()
    return total / len(data.splits.val)


def first_batch(data):
    return data.prepare(next(iter(data.train_dataloader())), training=True)


def assert_terms(terms):
    assert {"loss", "elbo", "distortion", "rate"} <= set(terms)
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values()), terms
    assert not any(value.requires_grad for name, value in terms.items() if name != "loss")
    torch.testing.assert_close(terms["elbo"], -(terms["distortion"] + terms["rate"]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_are_finite_down_to_a_batch_of_one_and_follow_from_the_generator_alone(tiny, name):
    data, module = built(tiny, name)
    whole = first_batch(data)
    one = Batch(*(part if part is None or isinstance(part, int) else part[:1] for part in whole))
    state = torch.random.get_rng_state()
    for batch in (whole, one):
        terms, same, other = (module.objective(module.vae, batch, generator("noise", seed), 3) for seed in (0, 0, 1))
        assert_terms(terms)
        assert terms["loss"] == same["loss"] != other["loss"]
        terms["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    module.eval()
    with torch.no_grad():
        assert_terms(module.objective(module.vae, one, generator("noise"), 3))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_under_autocast_the_networks_alone_are_narrow(tiny, name):
    data, module = built(tiny, name)
    networks = [module.vae.encoder, module.vae.decoder]
    networks += [own for own in (getattr(module.objective, n, None) for n in ("classifier", "discriminator")) if own]
    batch = first_batch(data)
    plain = module.objective(module.vae, batch, generator("noise"), 3)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module.objective(module.vae, batch, generator("noise"), 3)
    for network in networks:
        network.forward = torch.autocast("cpu", enabled=False)(network.forward)
    with torch.autocast("cpu", torch.bfloat16):
        same = module.objective(module.vae, batch, generator("noise"), 3)
    assert {term: value.item() for term, value in same.items()} == {term: value.item() for term, value in plain.items()}
    assert all(value.dtype == torch.float32 for value in narrow.values())
    assert narrow["loss"] != plain["loss"]


#: whose terms would have another mean in a smaller batch
OF_WHOLE_BATCHES = ["capacity", "dip_vae_i", "dip_vae_ii", "factor_vae", "free_bits", "info_vae", "mmd_vae", "tcvae"]
OF_WHOLE_BATCHES += ["wae_mmd"]


def test_objectives_with_estimates_from_a_whole_batch_are_known():
    targets = {
        name: OmegaConf.load(Path(CONFIGS) / "objective" / f"{name}.yaml").get("_target_") for name in OBJECTIVES
    }
    targets["mmd_vae"], targets["dreg"] = targets["info_vae"], targets["iwae"]
    whole = [name for name, target in targets.items() if target and get_class(target).of_whole_batches]
    assert whole == OF_WHOLE_BATCHES


@pytest.mark.parametrize("name", ["tcvae", "info_vae", "dip_vae_ii", "capacity"])
def test_a_smaller_last_batch_is_trained_on_and_left_out_of_what_is_reported(tiny, tmp_path, name):
    config = tiny(f"objective={name}", "data.limit=33", "data.batch_size=32", "data.eval_batch_size=32")
    config.trainer.log_every_n_steps = 1
    data, module = build(config)
    seen, objective = [], module.objective
    objective.register_forward_hook(lambda _, inputs, terms: seen.append((len(inputs[1].x), terms)))
    if isinstance(objective, SinglePass):
        of_pass = objective.of_pass
        objective.of_pass = lambda out, step: seen.append((len(out.rate), of_pass(out, step))) or seen[-1][1]
    trainer = build_trainer(config, tmp_path)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    validation = trainer.callback_metrics
    sizes = [size for size, _ in seen]
    assert {32, 1} == set(sizes)
    of_training = next(terms for size, terms in seen if size == 32 and terms["loss"].requires_grad)
    of_validation = [terms for size, terms in seen if size == 32][-1]
    assert any(size == 1 and terms["loss"].requires_grad for size, terms in seen)
    for term in set(of_training) - {"bits_per_dim"}:
        assert module.epoch_terms()[f"train/{term}"] == pytest.approx(of_training[term].item(), rel=1e-6)
    assert validation["val/loss"] == pytest.approx(of_validation["loss"].item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_hundred_steps_lower_its_own_loss(tiny, name):
    data, module = built(tiny, name, "data.limit=512", "optimizer.lr=0.003")
    before, step, optimizer = validation_loss(data, module), 0, module.configure_optimizers()
    loader = data.train_dataloader()
    while step < 200:
        loader.sampler.set_epoch(step)
        for batch in loader:
            loss = module.objective(module.vae, data.prepare(batch, True), generator(batch.seed, "z"), step)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    after = validation_loss(data, module)
    assert after < before - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_every_network(tiny, name, network):
    if network == "burgess":
        if name in ("cvae", "m2", "feature"):
            pytest.skip("sprites, the only 64 x 64 images at hand, have no class labels")
        overrides = [
            "data=sprites",
            "++data.source.size=64",
            "++data.source.subset={scale: 2, orientation: 4, x: 3, y: 3}",
        ]
    else:
        overrides = ["model.latent_dim=16", "network.block_out_channels=[8,8,8]"] if network == "autoencoder_kl" else []
    data, module = built(tiny, name, f"network={network}", *overrides)
    terms = module.objective(module.vae, first_batch(data), generator("noise"), 3)
    assert_terms(terms)
    terms["loss"].backward()
    assert all(p.grad is not None for p in module.vae.decoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_every_prior_and_posterior_or_refuses_it_in_one_sentence(tiny, name, family):
    overrides = [*family.split(), "model.latent_dim=4"]
    if family == "prior=vampprior":
        overrides.append("prior.pseudo_inputs=8")
    if family in REFUSED.get(name, []):
        with pytest.raises(VAEError) as told:
            built(tiny, name, *overrides)
        assert str(told.value).endswith(".")
        return
    data, module = built(tiny, name, *overrides)
    terms = module.objective(module.vae, first_batch(data), generator("noise"), 3)
    assert_terms(terms)
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(("schedule", "target"), [("geco", 25.0), ("control", 0.01)])
def test_feedback_schedules_compose_and_move_the_weight(tiny, schedule, target):
    config = tiny(f"objective/schedule={schedule}", f"objective.schedule.target={target}")
    objective = instantiate(config.objective)
    data, module = build(config)
    batch, weights = first_batch(data), []
    for _ in range(3):
        terms = module.objective(module.vae, batch, generator("noise"), 0)
        module.objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        weights.append(terms["beta"].item())
    assert weights[0] != weights[2]
    assert objective.weight(0).item() == weights[0]


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [(["objective=mmd_vae"], "objective.alpha=1"), (["objective=beta_vae", "objective.beta=0"], "objective.beta=0")],
)
@pytest.mark.parametrize("schedule", ["geco", "control"])
def test_a_controller_that_would_steer_nothing_is_refused(tiny, schedule, overrides, setting):
    with pytest.raises(VAEError, match=f"steers the weight on the KL, which {setting} holds at 0"):
        build(tiny(*overrides, f"objective/schedule={schedule}", "objective.schedule.target=25"))


def test_data_with_factors_but_no_classes_refuses_a_label_conditional_model(tiny):
    with pytest.raises(VAEError, match="class labels"):
        build(tiny("objective=cvae", *SMALL["ada_gvae"]))
