"""The Latents tab in a real browser, in a real TensorBoard, on a finished sweep: what is seen is what the run says."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import chromium
import numpy as np
import pytest
from chromium import TAB
from PIL import Image

import vae

pytestmark = chromium.MARKS


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two finished runs on the digits, and one on wide, coloured, labelled images of one's own with 512 latents."""
    from conftest import composed

    from vae.engine.run import train

    folder = tmp_path_factory.mktemp("sweep")
    for beta in (1, 4):
        settings = [
            "trainer.max_epochs=10",
            "model.latent_dim=10",
            "evaluation.nll_samples=0",
            f"objective.beta={beta}",
        ]
        settings += ["callbacks=minimal", "threads=1", "network.hidden=[128]"]
        train(composed(*settings), folder / f"objective.beta={beta}", settings, progress_bar=False)
    noise = np.random.default_rng(0)
    y = np.arange(100) % 3
    levels = noise.integers(0, 64, (100, 4, 6, 3)).repeat(4, 1).repeat(4, 2) + 90 * y[:, None, None, None]
    np.savez(folder / "own.npz", x=levels.astype(np.uint8), y=y)
    settings = ["data=arrays", f"data.source.path={folder / 'own.npz'}", "objective=cvae", "model.latent_dim=512"]
    settings += [
        "trainer.max_epochs=15",
        "optimizer.lr=0.01",
        "network.hidden=[64]",
        "data.batch_size=20",
        "callbacks=minimal",
        "threads=1",
    ]
    train(composed(*settings, "evaluation.nll_samples=0"), folder / "wide", settings, progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def tensorboard(sweep, tmp_path_factory):
    with chromium.tensorboard(sweep, tmp_path_factory.mktemp("site")) as address:
        yield address


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = chromium.Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def tab(page, tensorboard):
    """The tab, its first run open."""
    return page.open_latents(tensorboard)


def box(page, selector):
    """Where an element of the first run is on the page: (left, top, width, height)."""
    return page.run(
        f"(() => {{ const d = {TAB}, node = d.querySelector('.panel {selector}'); node.scrollIntoView({{block: 'nearest'}}); "
        "const e = node.getBoundingClientRect(), f = d.defaultView.frameElement.getBoundingClientRect(); "
        "return [e.left + f.left, e.top + f.top, e.width, e.height]; })()"
    )


def press(page, selector):
    left, top, width, height = box(page, selector)
    page.drag((left + width / 2, top + height / 2))


def address(page, key):
    return page.run(f"decodeURIComponent((location.hash.match(/p\\.latents\\.{key}=([^&]*)/) || [])[1] || '')")


def z_of(page, key="z"):
    z = np.zeros(10)
    for pair in filter(None, address(page, key).split(",")):
        z[int(pair.split(":")[0])] = float(pair.split(":")[1])
    return z


def seen(page, selector=".shown"):
    url = page.run(f"{TAB}.querySelector('{selector}').src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))[..., 0].astype(int)


def decoded(sweep, z, beta=1):
    return (vae.load(sweep / f"objective.beta={beta}").decode(z[None])[0, 0] * 255).round().int().numpy()


def moves(page, act, key="z"):
    before = address(page, key)
    act()
    page.until(
        f"!location.hash.includes(encodeURIComponent({before!r} || 'nothing')) && location.hash.includes('latents.{key}=')"
    )
    return z_of(page, key)


def test_a_slider_moves_its_latent_and_the_image_follows(tab, sweep):
    assert np.array_equal(seen(tab), decoded(sweep, np.zeros(10)))
    rows = tab.run(f"[...{TAB}.querySelectorAll('.latent')].map((row) => +row.dataset.latent)")
    left, top, width, height = box(tab, ".latent input")
    z = moves(tab, lambda: tab.drag((left + 0.9 * width, top + height / 2)))
    assert z[rows[0]] > 1.5 and np.count_nonzero(z) == 1
    assert abs(seen(tab) - decoded(sweep, z)).max() <= 1  # the address has three digits
    press(tab, "button.reset")
    tab.until("!location.hash.includes('latents.z=')")
    assert np.array_equal(seen(tab), decoded(sweep, np.zeros(10)))


def test_a_click_on_the_map_takes_the_sliders_there_and_a_drag_walks(tab, sweep):
    left, top, *_ = box(tab, "canvas")
    z = moves(tab, lambda: tab.drag((left + 3, top + 3)))  # a corner, where no image lies
    assert abs(seen(tab) - decoded(sweep, z)).max() <= 1
    assert np.count_nonzero(z) > 2  # of the principal components
    tab.drag((left + 60, top + 60), (left + 200, top + 200), (left + 300, top + 300))
    tab.until(f"{TAB}.querySelectorAll('.strip img').length === 9")
    for x, y in ((x, y) for x in range(120, 260, 6) for y in range(120, 260, 6)):
        tab.hover(left + x, top + y)
        if not tab.run(f"{TAB}.querySelector('.tip').hidden"):
            break
    assert tab.run(
        f"{TAB}.querySelector('.tip canvas') !== null && /label \\d/.test({TAB}.querySelector('.tip').textContent)"
    )


def test_an_uploaded_png_is_encoded_and_walked_to(tab, sweep, tmp_path):
    run = vae.load(sweep / "objective.beta=1")
    levels = (run.sample(1, seed=5)[0, 0] * 255).round().byte().numpy()
    Image.fromarray(levels).save(tmp_path / "digit.png")
    press(tab, ".slot")
    z = moves(tab, lambda: tab.upload(f"{TAB}.querySelector('.upload')", tmp_path / "digit.png"))
    mean, log_var = run.encode(levels)
    assert np.allclose(z, mean[0], atol=6e-4)
    rate = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum()
    tab.until(f"{TAB}.querySelector('.measures') !== null")
    assert f"rate {float(rate):.2f}" in tab.run(f"{TAB}.querySelector('.measures').textContent")
    assert tab.run(f"{TAB}.querySelectorAll('.neighbours canvas').length") == 8
    tab.run(f"{TAB}.querySelectorAll('.slot')[1].click()")
    tab.until(f"{TAB}.querySelectorAll('.walked img').length === 11")
    assert np.array_equal(seen(tab, ".walked img:last-child"), decoded(sweep, mean[0].numpy()))
    if folder := os.environ.get("VAE_SCREENSHOTS"):
        tab.screenshot(Path(folder) / "latents.png")


def test_an_image_that_is_none_is_a_sentence_and_the_tab_goes_on(tab, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no")
    tab.upload(f"{TAB}.querySelector('.upload')", tmp_path / "no.png")
    tab.until(f"{TAB}.querySelector('.panel .error').textContent.includes('no image that can be read')")
    moves(tab, lambda: press(tab, "button.draw"))
    assert tab.run(f"{TAB}.querySelector('.panel .error').textContent") == ""


def test_the_address_brings_back_both_runs_and_their_latents(tab, sweep, tensorboard):
    tab.run(f"{TAB}.querySelector('.compare').click()")
    tab.until(f"{TAB}.querySelectorAll('.shown').length === 2 && location.hash.includes('run2')")
    shared = "#latents&p.latents.run=objective.beta%3D4&p.latents.z=3%3A1.5%2C7%3A-2"
    shared += "&p.latents.run2=objective.beta%3D1&p.latents.z2=0%3A1"
    tab.open(tensorboard + shared)
    tab.until(f"[...({TAB}?.querySelectorAll('.shown') ?? [])].filter((image) => image.src).length === 2")
    z = np.zeros(10)
    z[[3, 7]] = 1.5, -2
    assert np.array_equal(seen(tab), decoded(sweep, z, beta=4))
    assert address(tab, "run2") == "objective.beta=1" and z_of(tab, "z2")[0] == 1
    if folder := os.environ.get("VAE_SCREENSHOTS"):
        tab.screenshot(Path(folder) / "both.png")


def coloured(page):
    url = page.run(f"{TAB}.querySelector('.shown').src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def test_a_model_of_wide_coloured_images_with_512_latents_and_labels_is_turned_by_hand(
    tab, sweep, tensorboard, tmp_path
):
    def expected(z, y):
        return (vae.load(sweep / "wide").decode(z[None], y)[0] * 255).round().int().movedim(0, -1).numpy()

    tab.open(f"{tensorboard}#latents&p.latents.run=wide")
    tab.until(
        f"{TAB}?.querySelector('.panel .shown')?.src?.length > 30 && {TAB}.querySelectorAll('.legend span').length"
    )
    z = np.zeros(512, np.float32)
    assert "3 × 16 × 24 images, 512 latents" in tab.run(f"{TAB}.querySelector('.note').textContent")
    assert "10 test images" in tab.run(f"{TAB}.querySelector('.note').textContent")
    assert tab.run(f"{TAB}.querySelectorAll('.latent').length") == 512
    left, top, width, height = box(tab, ".shown")
    assert abs(width / height - 24 / 16) < 0.02
    assert abs(coloured(tab) - expected(z, 0)).max() <= 1
    tab.run(f"(() => {{ const e = {TAB}.querySelector('select.label'); e.value = 2; e.onchange(); }})()")
    tab.until("location.hash.includes('latents.y=2')")
    assert abs(coloured(tab) - expected(z, 2)).max() <= 1
    assert (expected(z, 2) - expected(z, 0)).mean() > 2  # the third class is the brightest
    last = tab.run(f"+[...{TAB}.querySelectorAll('.latent')].at(-1).dataset.latent")
    left, top, width, height = box(tab, f'.latent[data-latent="{last}"] input')
    tab.drag((left + 0.8 * width, top + height / 2))
    tab.until(f"location.hash.includes('latents.z={last}%3A')")
    z[last] = float(address(tab, "z").split(":")[1])
    assert abs(coloured(tab) - expected(z, 2)).max() <= 1
    levels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "photograph.jpg")
    tab.upload(f"{TAB}.querySelector('.upload')", tmp_path / "photograph.jpg")
    tab.until(f"{TAB}.querySelectorAll('.neighbours canvas').length === 8")
    if folder := os.environ.get("VAE_SCREENSHOTS"):
        tab.screenshot(Path(folder) / "wide.png")


def test_what_is_shown_is_saved_as_png_npz_and_gif(tab, sweep, tmp_path):
    z = moves(tab, lambda: press(tab, "button.draw"))
    folders = [tmp_path / name for name in ("png", "npz", "gif")]
    for folder in folders:
        folder.mkdir()
    with Image.open(tab.download(folders[0], lambda: press(tab, "button.png"))) as image:
        assert np.array_equal(np.asarray(image)[..., 0].astype(int), seen(tab))
    held = np.load(tab.download(folders[1], lambda: press(tab, "button.npz")))
    assert np.allclose(held["z"], z, atol=6e-4) and held["y"] == -1
    run = vae.load(sweep / "objective.beta=1")
    assert np.allclose(held["images"], run.decode(held["z"]), atol=1e-6)
    press(tab, ".slot")
    moves(tab, lambda: press(tab, "button.draw"))
    tab.run(f"{TAB}.querySelectorAll('.slot')[1].click()")
    tab.until(f"{TAB}.querySelectorAll('.walked img').length === 11")
    with Image.open(tab.download(folders[2], lambda: press(tab, "button.gif"))) as film:
        assert film.n_frames == 20  # there and back, without stopping at the ends


def test_the_other_tabs_are_there_and_the_page_had_no_error(tab):
    listed = tab.run("fetch('data/plugins_listing').then((answer) => answer.json())")
    assert listed["latents"]["enabled"] and listed["timeseries"]["enabled"] and listed["scalars"]["enabled"]
    ours = [error for error in tab.errors if "latents" in error and "400" not in error]
    assert not ours
