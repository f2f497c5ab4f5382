"""LPIPS and Inception's features, on made-up weights in the format of the published ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from weights import publish

from vae.engine.build import build
from vae.errors import VAEError
from vae.evaluation import reconstruction
from vae.evaluation.lpips import INCEPTION, LPIPS, NETWORKS, Inception, comparison
from vae.evaluation.measures import MEASURES, check_options
from vae.evaluation.samples import frechet_distance
from vae.evaluation.work import Work

SPRITES = ["data=sprites", "++data.source.size=32", "++data.source.subset={scale: 2, orientation: 3, x: 3, y: 3}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish(publish(tmp_path_factory.mktemp("weights") / "published"), "vgg", seed=1)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def made(folder, network, shape):
    metric = LPIPS(shape, str(folder), network)
    metric.start()
    return metric


def by_hand(folder, network, a, b):
    """Zhang et al. 2018, equation 1: sum_l 1/(H W) sum_hw |w_l * (y_hw - y0_hw)|^2, w here being the weight of the square."""
    published = NETWORKS[network]
    backbone, linear = (torch.load(folder / file, weights_only=True) for file in (published.backbone, published.linear))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    alex = network == "alex"
    blocks = [[0], [3], [6], [8], [10]] if alex else [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    pads, strides = {0: 2, 3: 2}, {0: 4}
    found, (h, g) = 0.0, ((2 * x.expand(-1, 3, -1, -1) - 1 - shift) / scale for x in (a, b))
    for block, numbers in enumerate(blocks):
        if block in ((1, 2) if alex else (1, 2, 3, 4)):
            h, g = (F.max_pool2d(x, 3 if alex else 2, 2) for x in (h, g))
        for n in numbers:
            w, bias = backbone[f"features.{n}.weight"], backbone[f"features.{n}.bias"]
            options = {"padding": pads.get(n, 1), "stride": strides.get(n, 1)} if alex else {"padding": 1}
            h, g = (F.conv2d(x, w, bias, **options).clamp(min=0) for x in (h, g))
        y, y0 = (x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for x in (h, g))
        found = found + (linear[f"lin{block}.model.1.weight"] * (y - y0) ** 2).sum(1).mean((1, 2))
    return found


@pytest.mark.parametrize(("network", "shape"), [("alex", (3, 40, 33)), ("alex", (1, 31, 31)), ("vgg", (1, 28, 28))])
def test_lpips_is_the_formula_of_the_paper_and_0_of_equal_images(folder, network, shape):
    metric, a, b = made(folder, network, shape), images(3, *shape), images(3, *shape, seed=1)
    torch.testing.assert_close(metric(a, b), by_hand(folder, network, a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric(a, b), metric(b, a))
    assert metric(a, a).tolist() == [0, 0, 0] and metric(a, b).min() > 0.01
    assert metric(a[:1], b[:1]).item() == pytest.approx(metric(a, b)[0].item(), rel=1e-5)


@pytest.mark.slow
def test_with_the_published_linear_weights_lpips_is_the_peers(tmp_path):
    peers = pytest.importorskip("torchmetrics.functional.image.lpips")
    folder = publish(tmp_path / "weights")
    backbone, linear = (folder / file for file in NETWORKS["alex"][:2])
    shutil.copy(Path(peers.__file__).parent / "lpips_models" / linear.name, linear)
    peer, weights = peers._LPIPS(pretrained=True, net="alex", pnet_rand=True), torch.load(backbone, weights_only=True)
    peer.net.load_state_dict({name: weights[f"features.{name.split('.', 1)[1]}"] for name in peer.net.state_dict()})
    a, b = images(2, 3, 40, 40), images(2, 3, 40, 40, seed=1)
    theirs = peer(a, b, normalize=True).flatten()
    torch.testing.assert_close(made(folder, "alex", (3, 40, 40))(a, b), theirs, rtol=1e-4, atol=1e-6)


def test_a_gradient_is_finite_where_no_unit_answers(folder):
    metric = made(folder, "alex", (3, 32, 32))
    metric.network[0].bias.fill_(-100)  # all activations of the first block are 0
    x = images(1, 3, 32, 32).requires_grad_()
    metric(x, images(1, 3, 32, 32, seed=1)).sum().backward()
    assert x.grad.isfinite().all()


def test_a_file_that_is_missing_damaged_or_of_another_network_is_named(tmp_path):
    folder = publish(tmp_path / "weights")
    backbone, linear = (folder / name for name in NETWORKS["alex"][:2])
    with pytest.raises(
        VAEError, match=r"has none of the files .* alexnet-owt-7be5be79\.pth with alex\.pth, vgg16-397923"
    ):
        comparison(tmp_path, (3, 32, 32), "reconstruction.weights")
    with pytest.raises(VAEError, match=r"these have 2 channels\.$"):
        LPIPS((2, 32, 32), str(folder))
    torch.save(torch.load(linear, weights_only=True), backbone)
    with pytest.raises(VAEError, match=r"alexnet-owt-7be5be79\.pth or alex\.pth beside it is not of the network"):
        made(folder, "alex", (3, 32, 32))
    linear.write_bytes(b"nothing")
    publish(tmp_path / "other", seed=2)
    backbone.write_bytes((tmp_path / "other" / backbone.name).read_bytes())
    with pytest.raises(VAEError, match=r"alex\.pth is damaged"):
        made(folder, "alex", (3, 32, 32))
    linear.unlink()
    with pytest.raises(VAEError, match=r"no alex\.pth in .*: set reconstruction\.weights to the folder that has it"):
        comparison(folder, (3, 32, 32), "reconstruction.weights")


def test_the_measure_has_lpips_of_the_reconstructions_and_says_what_is_too_small(tiny, folder, monkeypatch, caplog):
    monkeypatch.setattr(reconstruction, "has_labels", lambda data: False)
    data, module = build(tiny(*SPRITES))
    work = Work("reconstruction")
    found = MEASURES["reconstruction"](module.vae, data, "test", work, images=8, weights=str(folder))
    x = data.examples("test", 8).x
    with torch.no_grad():
        fake = module.vae.reconstruct(x).clamp(0, 1)
    for network in ("alex", "vgg"):
        expected = by_hand(folder, network, x, fake).mean().item()
        assert found[f"lpips_{network}"] == pytest.approx(expected, rel=1e-4)
    compare = comparison(folder, (1, 20, 20), "reconstruction.weights")
    assert set(compare(images(4, 1, 20, 20), images(4, 1, 20, 20), torch.device("cpu"))) == {"lpips_vgg"}
    assert "lpips_alex is left out: LPIPS of alex needs images of at least 31x31 pixels, not 20x20." in caplog.text
    check_options("reconstruction", {"weights": None, "images": 8})
    with pytest.raises(VAEError, match=r"reconstruction\.weights=3 must be the name of a folder, or null"):
        check_options("reconstruction", {"weights": 3})


@pytest.mark.slow
def test_the_inception_distance_of_equal_images_is_0_and_its_features_are_torchvisions(tmp_path):
    from torchvision.models import inception_v3
    from torchvision.transforms.functional import InterpolationMode, resize

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    torch.save(network.state_dict(), tmp_path / INCEPTION)
    x, other = images(4, 1, 20, 24), images(4, 1, 20, 24, seed=1)
    compare = comparison(tmp_path, (1, 20, 24), "reconstruction.weights")
    cpu = torch.device("cpu")
    assert compare(x, x, cpu)["rfid_inception_n4"] == pytest.approx(0, abs=1e-6)
    network.fc = torch.nn.Identity()
    features = []
    with torch.no_grad():
        for batch in (x, other):
            rgb = resize(batch.repeat(1, 3, 1, 1), [299, 299], InterpolationMode.BILINEAR, antialias=True)
            features.append(network(rgb * 2 - 1))
        torch.testing.assert_close(Inception(tmp_path, "key")(x), features[0], rtol=1e-4, atol=1e-5)
    found = compare(x, other, cpu)
    assert set(found) == {"rfid_inception_n4"} and features[0].shape == (4, 2048)
    assert found["rfid_inception_n4"] == pytest.approx(frechet_distance(*features), rel=1e-3, abs=1e-6)
    torch.save({}, tmp_path / INCEPTION)
    with pytest.raises(VAEError, match="is not of torchvision's inception_v3"):
        comparison(tmp_path, (1, 20, 24), "reconstruction.weights")
