"""The autoencoder of latent diffusion: equal to diffusers' at the same weights, its weights read and written, its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.kl import gaussian_kl_to_standard_normal
from vae.networks import autoencoder_kl
from vae.networks.diffusers_format import WEIGHTS, architecture, load_weights, state_dict

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4}
KINDS = {
    "all parts": SMALL,
    "three widths, of which two are alike": {"block_out_channels": (8, 16, 16), "norm_num_groups": 8},
    "no attention, no convolutions around z": {**SMALL, "mid_block_add_attention": False, "use_quant_conv": False},
    "one width": {"block_out_channels": (8,), "norm_num_groups": 2},
}


def pair(image_shape=(3, 8, 12), channels=2, params_per_pixel=1, **options):
    """Encoder and decoder with so many channels of the latent."""
    factor = 2 ** (len(options.get("block_out_channels", (32, 64, 64))) - 1)
    latent_dim = channels * (image_shape[1] // factor) * (image_shape[2] // factor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return autoencoder_kl(image_shape, latent_dim, params_per_pixel, **options)


def fill(tensors):
    """Weights that anyone can make again, large enough that every part matters."""
    with torch.no_grad():
        for k, (_, value) in enumerate(sorted(tensors.items())):
            value.copy_(0.3 * torch.sin(torch.arange(value.numel()) * (0.7 + 0.01 * k) + k).reshape(value.shape))


def inputs(*shape):
    return (0.5 + 0.5 * torch.sin(torch.arange(torch.Size(shape).numel()) * 0.37)).reshape(shape)


# What diffusers 0.42.1 computes of `inputs` with the weights of `fill`: every 17th of the encoder's outputs and every 31st of
# the decoder's, before it is taken to [0, 1].
OF_DIFFUSERS = {
    "encoded": [
        -0.128267,
        -0.083933,
        -0.157348,
        0.090599,
        0.290122,
        -0.110499,
        0.032669,
        -0.152283,
        -0.218066,
        0.122354,
        0.175703,
        -0.279263,
    ],
    "decoded": [
        -0.326253,
        -0.245764,
        -0.437152,
        -0.369024,
        -0.340117,
        -0.285951,
        -0.337029,
        -0.173458,
        -0.298056,
        -0.004911,
        -0.173522,
        -0.174806,
        -0.25983,
        -0.281794,
        -0.300601,
        -0.29314,
        -0.299893,
        -0.278589,
        -0.328236,
    ],
}


def filled():
    encoder, decoder = pair(**SMALL)
    fill(state_dict(encoder, decoder))
    return encoder, decoder


def test_outputs_are_those_that_diffusers_computes_with_these_weights():
    encoder, decoder = filled()
    with torch.no_grad():
        encoded = encoder(inputs(2, 3, 8, 12))
        decoded = decoder(4 * inputs(2, 48) - 2)
    expected = [torch.tensor(OF_DIFFUSERS[name]) for name in ("encoded", "decoded")]
    torch.testing.assert_close(encoded.flatten()[::17], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((2 * decoded - 1).flatten()[::31], expected[1], rtol=1e-5, atol=1e-5)
    assert expected[0].std() > 0.1 and expected[1].std() > 0.03


def diffusers_twin(options, channels=2, in_channels=3):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    given = {**{"layers_per_block": 1}, **options}
    given["use_post_quant_conv"] = given.get("use_quant_conv", True)
    blocks = len(options["block_out_channels"])
    return diffusers.AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **given,
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_autoencoder_at_the_same_weights(kind, tmp_path):
    twin = diffusers_twin(KINDS[kind])
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.3)
    twin.save_pretrained(tmp_path)
    encoder, decoder = pair(weights=str(tmp_path), **KINDS[kind])
    x, noise = inputs(2, 3, 8, 12), torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs = twin.encode(2 * x - 1).latent_dist
        ours = DiagonalGaussian.from_parameters(encoder(x))
        torch.testing.assert_close(ours.mean, theirs.mean.flatten(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.log_var, theirs.logvar.flatten(1), rtol=1e-5, atol=1e-5)
        kl = gaussian_kl_to_standard_normal(*ours).sum(-1)
        torch.testing.assert_close(kl, theirs.kl(), rtol=1e-5, atol=1e-5)
        z = torch.randn(theirs.mean.shape, generator=noise)
        decoded = twin.decode(z).sample
        torch.testing.assert_close(2 * decoder(z.flatten(1))[:, 0] - 1, decoded, rtol=1e-5, atol=1e-5)
    count = sum(p.numel() for module in (encoder, decoder) for p in module.parameters())
    assert count == sum(p.numel() for p in twin.parameters())
    assert {k: v.shape for k, v in state_dict(encoder, decoder).items()} == {
        k: v.shape for k, v in twin.state_dict().items()
    }
    said = json.loads((tmp_path / "config.json").read_text())
    assert {k: said[k] for k in architecture(encoder, decoder) if k != "sample_size"} == {
        k: v for k, v in architecture(encoder, decoder).items() if k != "sample_size"
    }


@pytest.mark.slow
def test_the_numbers_kept_here_are_diffusers_own():
    twin = diffusers_twin(SMALL)
    fill(twin.state_dict())
    with torch.no_grad():
        encoded = twin.encode(2 * inputs(2, 3, 8, 12) - 1).latent_dist.parameters
        decoded = twin.decode((4 * inputs(2, 48) - 2).reshape(2, 2, 4, 6)).sample
    torch.testing.assert_close(encoded.flatten()[::17].tolist(), OF_DIFFUSERS["encoded"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decoded.flatten()[::31].tolist(), OF_DIFFUSERS["decoded"], rtol=1e-5, atol=1e-6)


# --- weights ----------------------------------------------------------------------------------------------------------


def written(folder, encoder, decoder, **changes):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({name: value.clone() for name, value in state_dict(encoder, decoder).items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({**architecture(encoder, decoder), **changes}))
    return folder


def equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_written_are_read_from_the_folder_or_the_file(kind, tmp_path):
    pytest.importorskip("safetensors")
    ours = pair(**KINDS[kind])
    fill(state_dict(*ours))
    folder = written(tmp_path / "a", *ours)
    for path in (folder, folder / WEIGHTS):
        read = pair(weights=str(path), **KINDS[kind])
        assert equal(state_dict(*ours), state_dict(*read))
        read[1].set_output_bias(torch.ones(1, 3, 8, 12))  # trained: it stays
        assert equal(state_dict(*ours), state_dict(*read))


def test_attention_under_its_older_names_and_as_convolutions_is_read(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    ours = filled()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in state_dict(*ours).items():
        for new, old in older.items():
            if f".{new}." in name:
                name, value = name.replace(new, old), value[:, :, None, None] if value.ndim == 2 else value
        tensors[name] = value.clone().contiguous()
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    read = pair(weights=str(tmp_path), **SMALL)
    assert equal(state_dict(*ours), state_dict(*read))


def test_weights_of_another_architecture_are_refused_by_the_keys_that_differ_and_the_settings_that_fit(tmp_path):
    pytest.importorskip("safetensors")
    folder = written(tmp_path / "a", *filled())
    with pytest.raises(VAEError) as told:
        pair(weights=str(folder), **{**SMALL, "layers_per_block": 1})
    assert "holds weights of another architecture" in str(told.value)
    assert "decoder.up_blocks.0.resnets.2.conv1.bias has no place here" in str(told.value)
    assert str(told.value).endswith("and 28 more keys differ. Its config.json asks for network.layers_per_block=2.")
    with pytest.raises(VAEError, match=r"encoder.conv_out.weight is \(4, 16, 3, 3\) there and \(6, 16, 3, 3\) here"):
        pair(weights=str(folder), channels=3, **SMALL)
    with pytest.raises(VAEError, match=r"asks for model.latent_dim=48\.$"):
        pair(weights=str(folder), channels=3, **SMALL)
    with pytest.raises(VAEError, match=r"encoder.conv_in.weight is .*asks for images of 3 channels, not 1\.$"):
        pair((1, 8, 12), weights=str(folder), **SMALL)
    wider = {**SMALL, "block_out_channels": (8, 16, 16)}
    with pytest.raises(
        VAEError, match=r"is not there, .*asks for network.block_out_channels=\[8,16\] model.latent_dim=48"
    ):
        pair(weights=str(folder), channels=1, **wider)
    with pytest.raises(
        VAEError, match=r"config.json describes another architecture: give network.norm_num_groups=4\.$"
    ):
        pair(weights=str(folder), **{**SMALL, "norm_num_groups": 8})  # the same keys, other numbers
    written(folder, *filled(), _class_name="VQModel")
    with pytest.raises(VAEError, match="weights of an AutoencoderKL, not of a VQModel"):
        pair(weights=str(folder), **SMALL)
    (folder / "config.json").unlink()
    assert equal(state_dict(*filled()), state_dict(*pair(weights=str(folder), **SMALL)))


def test_weights_that_are_not_there_or_damaged_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(VAEError, match=r"network.weights=.*: there is no diffusion_pytorch_model.safetensors\.$"):
        load_weights(*pair(**SMALL), tmp_path)
    with pytest.raises(VAEError, match=r"There is no file .*nowhere\.$"):
        load_weights(*pair(**SMALL), tmp_path / "nowhere")
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(VAEError, match=r"is damaged or no safetensors file\.$"):
        load_weights(*pair(**SMALL), tmp_path)


# --- sizes, labels, bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 20), (3, 16, 4), (2, 12, 8)])
def test_any_image_that_can_be_halved_has_a_map_of_latents_and_all_of_it_is_seen(shape):
    encoder, decoder = pair(shape, 3, params_per_pixel=2, block_out_channels=(8, 8, 8), norm_num_groups=4)
    assert decoder.latent_shape == (3, shape[1] // 4, shape[2] // 4) and decoder.image_shape == shape
    x = inputs(1, *shape).requires_grad_()
    parameters = encoder(x)
    latents = 3 * (shape[1] // 4) * (shape[2] // 4)
    assert parameters.shape == (1, 2 * latents)
    (seen,) = torch.autograd.grad((parameters * inputs(1, 2 * latents)).sum(), x)
    assert (seen != 0).all()
    z = inputs(2, latents).requires_grad_()
    params = decoder(z)
    assert params.shape == (2, 2, *shape)
    (used,) = torch.autograd.grad((params * inputs(*params.shape)).sum(), z)
    assert (used != 0).all()


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        (
            (1, 30, 28),
            {},
            "halves an image 2 times, and 30x28 cannot be: .*multiples of 4, such as 32x28, or fewer widths",
        ),
        ((1, 28, 28), {"latent_dim": 50}, "model.latent_dim=50 cannot be shared by 7x7 places: .*of 49 .* 196 for 4"),
        ((1, 28, 28), {"norm_num_groups": 5}, "network.norm_num_groups=5 must divide every width, and not 8"),
        ((1, 28, 28), {"norm_num_groups": 0}, "network.norm_num_groups=0 must be a whole number of at least 1"),
        ((1, 28, 28), {"layers_per_block": 0}, "network.layers_per_block=0 must be a whole number"),
        ((1, 28, 28), {"block_out_channels": ()}, "network.block_out_channels needs at least one width"),
        ((1, 28, 28), {"encoder_outputs": 500}, "a mean and a log-variance per latent: use posterior=diagonal"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(shape, options, sentence):
    given = {"latent_dim": 98, "block_out_channels": (8, 8, 16), "norm_num_groups": 8, **options}
    with pytest.raises(VAEError, match=sentence):
        autoencoder_kl(shape, params_per_pixel=1, **given)


def test_labels_are_channels_alike_at_all_places_of_both_networks():
    encoder, decoder = pair(num_classes=3, **SMALL)
    x, z, y = inputs(3, 3, 8, 12), inputs(3, 48), torch.tensor([0, 2, 0])
    for module, given in ((encoder, x), (decoder, z)):
        same = given[:1].expand_as(given)
        output = module(same, y)
        torch.testing.assert_close(output[0], output[2])
        assert (output[0] - output[1]).abs().max() > 1e-3
        one_hot = torch.nn.functional.one_hot(y, 3).float()
        torch.testing.assert_close(module(given, one_hot), module(given, y))
        with pytest.raises(VAEError, match="needs labels"):
            module(given)
    with pytest.raises(VAEError, match="takes no labels"):
        pair(**SMALL)[0](x, y)


def test_the_output_bias_starts_each_channel_at_the_mean_of_its_pixels():
    _, decoder = pair(params_per_pixel=2, **SMALL)
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    bias = inputs(2, 3, 8, 12)
    decoder.set_output_bias(bias)
    expected = bias.mean((-2, -1), keepdim=True).expand_as(bias)
    torch.testing.assert_close(decoder(inputs(1, 48))[0], expected, rtol=1e-5, atol=1e-6)


def test_a_config_that_leaves_out_settings_means_those_of_the_format(tmp_path):
    pytest.importorskip("safetensors")
    folder = written(tmp_path / "a", *pair(**SMALL))
    said = json.loads((folder / "config.json").read_text())
    del said["norm_num_groups"]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(VAEError, match=r"give network.norm_num_groups=32\.$"):
        pair(weights=str(folder), **SMALL)
