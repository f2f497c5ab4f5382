"""Encoders and decoders: their sizes as published, what they are linear in, what every output depends on."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae.errors import VAEError
from vae.likelihoods import Bernoulli, DiscretizedLogisticMixture, Gaussian
from vae.networks import burgess, conv, linear, mlp, resnet
from vae.networks.base import dense_layers

SHAPES = [(1, 8, 8), (1, 28, 28), (1, 28, 20), (3, 32, 32), (2, 13, 9), (1, 64, 64)]
# every builder at every image size that it claims
PAIRS = [(builder, shape) for builder in (mlp, linear, conv, resnet) for shape in SHAPES]
PAIRS += [(burgess, (1, 64, 64)), (burgess, (3, 64, 64)), (conv, (3, 218, 178))]


def named(pairs):
    return [f"{builder.__name__}-{'x'.join(map(str, shape))}" for builder, shape in pairs]


def build(builder, *args, **options):
    """The pair, from weights drawn with a fixed seed that leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return builder(*args, **options)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("builder, shape", PAIRS, ids=named(PAIRS))
def test_every_pixel_is_seen_and_every_output_depends_on_z_and_its_own_bias(builder, shape):
    encoder, decoder = build(builder, shape, 3, 2)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    posterior = encoder(x)
    assert posterior.shape == (1, 6)
    (seen,) = torch.autograd.grad((posterior * noise(6)).sum(), x)
    assert (seen != 0).float().mean() > 0.98  # a relu may be shut; a pixel that no kernel reaches would be a whole row

    assert seen.abs().sum((0, 1, 2)).min() > 0 and seen.abs().sum((0, 1, 3)).min() > 0
    z = 3 * noise(2, 3)
    params = decoder(z)
    assert params.shape == (2, 2, *shape)
    assert ((params[0] - params[1]) != 0).float().mean() > 0.98
    bias = noise(2, *shape, seed=1)
    decoder.set_output_bias(bias)
    torch.testing.assert_close(decoder(z), params + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("builder, shape", PAIRS, ids=named(PAIRS))
def test_an_image_is_encoded_and_decoded_the_same_alone_in_a_batch_and_in_training(builder, shape):
    encoder, decoder = build(builder, shape, 3, 1)
    x, z = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)), noise(3, 3)
    for module, batch in ((encoder, x), (decoder, z)):
        together, alone = module.train()(batch), module.eval()(batch[1:2])
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("builder", [mlp, linear, conv, resnet, burgess])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), DiscretizedLogisticMixture(2)])
def test_a_decoder_of_zero_weights_predicts_the_mean_image_given_as_bias(builder, likelihood):
    shape = (3, 64, 64) if builder is burgess else (3, 12, 9)
    _, decoder = build(builder, shape, 4, likelihood.params_per_pixel)
    mean = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.005
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    decoder.set_output_bias(likelihood.bias_for_mean(mean))
    predicted = likelihood.mean(decoder(noise(2, 4)))
    torch.testing.assert_close(predicted, mean.expand(2, *shape), rtol=0, atol=1e-5)


def test_mlp_has_the_hand_counted_parameters():
    encoder, decoder = mlp((1, 28, 28), 20, 1)  # 784-400-20
    assert parameters(encoder) == 784 * 400 + 400 + 400 * 40 + 40
    assert parameters(decoder) == 20 * 400 + 400 + 400 * 784 + 784
    encoder, decoder = mlp((1, 28, 28), 50, 1, hidden=(200, 200), activation="tanh")  # Burda et al. 2016, one layer
    assert parameters(encoder) == 784 * 200 + 200 + 200 * 200 + 200 + 200 * 100 + 100
    assert parameters(decoder) == 50 * 200 + 200 + 200 * 200 + 200 + 200 * 784 + 784
    _, decoder = mlp((1, 28, 28), 40, 1, hidden=(300, 300), activation="gated")  # Tomczak & Welling 2018
    assert parameters(decoder) == 2 * (40 * 300 + 300 + 300 * 300 + 300) + 300 * 784 + 784
    options = {"hidden": (1200, 1200), "decoder_hidden": (1200, 1200, 1200), "decoder_activation": "tanh"}
    encoder, decoder = mlp((1, 64, 64), 10, 1, **options)  # Higgins et al. 2017
    assert parameters(encoder) == 4096 * 1200 + 1200 + 1200 * 1200 + 1200 + 1200 * 20 + 20
    assert parameters(decoder) == 10 * 1200 + 1200 + 2 * (1200 * 1200 + 1200) + 1200 * 4096 + 4096
    assert sum(isinstance(m, nn.Tanh) for m in decoder.modules()) == 3 and not any(
        isinstance(m, nn.Tanh) for m in encoder.modules()
    )


def test_burgess_networks_have_the_published_parameters_and_a_bias_a_pixel():
    # disentanglement_lib's conv_encoder and deconv_decoder on dSprites have 309204 and 381313 parameters
    encoder, decoder = burgess((1, 64, 64), 10, 1, variant="dlib")
    assert parameters(encoder) == 309_204
    assert parameters(decoder) == 381_313 - 1 + 64 * 64
    # four convolutions of 32 4x4 kernels, two dense layers of 256
    encoder, decoder = burgess((1, 64, 64), 10, 1)
    convolutions = 32 * 16 + 32 + 3 * (32 * 32 * 16 + 32)
    assert parameters(encoder) == convolutions + (512 * 256 + 256) + (256 * 256 + 256) + (256 * 20 + 20)
    dense = (10 * 256 + 256) + (256 * 256 + 256) + (256 * 512 + 512)
    assert parameters(decoder) == dense + 3 * (32 * 32 * 16 + 32) + 32 * 16 + 64 * 64


def test_conv_on_mnist_has_the_layers_that_it_documents():
    encoder, decoder = conv((1, 28, 28), 10, 1)
    convolutions = (16 * 32 + 32) + (32 * 64 * 16 + 64)
    assert parameters(encoder) == convolutions + (64 * 49 * 256 + 256) + (256 * 20 + 20)
    dense = (10 * 256 + 256) + (256 * 64 * 49 + 64 * 49)
    assert parameters(decoder) == dense + (64 * 32 * 16 + 32) + 32 * 16 + 784


@pytest.mark.parametrize(
    "pair", [linear((2, 4, 5), 3, 2), mlp((2, 4, 5), 3, 2, hidden=())], ids=["linear", "mlp-without-hidden"]
)
def test_linear_networks_are_affine(pair):
    for module, inputs in zip(pair, (noise(3, 2, 4, 5), noise(3, 3)), strict=True):
        a, b, c = module(inputs)
        combined = module((0.3 * inputs[0] + 0.9 * inputs[1] - 0.2 * inputs[2])[None])[0]
        torch.testing.assert_close(combined, 0.3 * a + 0.9 * b - 0.2 * c, rtol=1e-4, atol=1e-5)


def test_posterior_variance_of_the_linear_vae_is_one_trained_vector_for_all_images():
    encoder, decoder = linear((1, 28, 28), 10, 1)
    with torch.no_grad():
        encoder.head.log_var.copy_(torch.arange(10.0))
    posterior = encoder(noise(4, 1, 28, 28))
    assert torch.equal(posterior[:, 10:], torch.arange(10.0).expand(4, 10))
    assert parameters(encoder) == 784 * 10 + 10 + 10 and parameters(decoder) == 10 * 784 + 784
    posterior[:, 10:].sum().backward()
    assert torch.equal(encoder.head.log_var.grad, torch.full((10,), 4.0))


def test_gated_layer_is_a_linear_map_times_a_sigmoid_gate():
    layers = dense_layers((5, 4), "gated")
    h = noise(3, 5)
    value, gate = layers[0].weight.chunk(2)
    value_bias, gate_bias = layers[0].bias.chunk(2)
    expected = (h @ value.T + value_bias) * torch.sigmoid(h @ gate.T + gate_bias)
    torch.testing.assert_close(nn.Sequential(*layers)(h), expected)


def test_initialisations_have_the_scale_that_their_papers_give():
    def weights(init):
        encoder, decoder = build(mlp, (1, 28, 28), 50, 1, hidden=(200,), init=init)
        return encoder.head[0], decoder.body[-1]

    for layer, fans in zip(weights("glorot_uniform"), (784 + 200, 200 + 784), strict=True):
        bound = math.sqrt(6 / fans)
        assert 0.999 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    for layer, fan_in in zip(weights("he_normal"), (784, 200), strict=True):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.01)
    assert weights("normal")[0].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert weights("glorot_uniform")[0].bias.abs().max() == 0 == weights("he_normal")[0].bias.abs().max()
    bound = 1 / math.sqrt(784)
    assert 0.999 * bound < weights("torch")[0].weight.abs().max() <= bound


@pytest.mark.parametrize("builder", [mlp, linear, conv, resnet, burgess])
def test_labels_reach_both_networks_as_one_hot_or_probabilities(builder):
    shape = (1, 64, 64) if builder is burgess else (1, 10, 9)
    encoder, decoder = build(builder, shape, 3, 1, num_classes=4)
    x, z = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)), noise(4, 3)
    y = torch.tensor([0, 3, 1, 3])
    for module, inputs in ((encoder, x), (decoder, z)):
        torch.testing.assert_close(module(inputs, y), module(inputs, F.one_hot(y, 4).float()))
        same = inputs[:1].expand_as(inputs)
        output = module(same, y)
        torch.testing.assert_close(output[1], output[3], rtol=1e-4, atol=1e-5)
        assert (output[0] - output[1]).abs().max() > 1e-3 < (output[1] - output[2]).abs().max()
    # M2's inference weighs the classes: a linear network at a probability is the average of those at the classes
    if builder is linear:
        half = torch.tensor([[0.5, 0.5, 0, 0]])
        average = (decoder(z[:1], torch.tensor([0])) + decoder(z[:1], torch.tensor([1]))) / 2
        torch.testing.assert_close(decoder(z[:1], half), average)


def test_what_makes_no_sense_is_refused_in_a_sentence():
    plain, conditional = mlp((1, 8, 8), 2, 1)[0], mlp((1, 8, 8), 2, 1, num_classes=3)[0]
    x = torch.zeros(2, 1, 8, 8)
    for refused in (
        lambda: mlp((1, 28, 28), 0, 1),
        lambda: linear((1, 28, 28), -1, 1),
        lambda: mlp((28, 28), 2, 1),
        lambda: mlp((1, 28, 28), 2, 0),
        lambda: mlp((1, 28, 28), 2, 1, hidden=(100, 0)),
        lambda: mlp((1, 28, 28), 2, 1, activation="swoosh"),
        lambda: mlp((1, 28, 28), 2, 1, hidden=(), activation="swoosh"),
        lambda: mlp((1, 28, 28), 2, 1, init="zeros"),
        lambda: mlp((1, 28, 28), 2, 1, num_classes=-1),
        lambda: burgess((1, 28, 28), 2, 1),
        lambda: burgess((1, 64, 64), 2, 1, variant="kim"),
        lambda: conv((1, 7, 28), 2, 1),
        lambda: conv((1, 28, 28), 2, 1, channels=0),
        lambda: conv((1, 28, 28), 2, 1, activation="gated"),
        lambda: resnet((1, 28, 28), 2, 1, channels=12),
        lambda: resnet((1, 28, 28), 2, 1, blocks=0),
        lambda: mlp((1, 8, 8), 2, 2)[1].set_output_bias(torch.zeros(1, 1, 8, 8)),
        lambda: plain(x, torch.zeros(2, dtype=torch.int64)),
        lambda: conditional(x),
        lambda: conditional(x, torch.zeros(2, 4)),
        lambda: conditional(x, torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(VAEError, match=r"\.$"):
            refused()
