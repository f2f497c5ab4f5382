"""The Latents tab of a run whose latent is a map, in a real browser: channels as grids, a place's slider by a click."""

from __future__ import annotations

import chromium
import numpy as np
import pytest
from chromium import TAB

pytestmark = chromium.MARKS


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    from conftest import composed

    from vae.engine.run import train

    folder = tmp_path_factory.mktemp("logdir")
    settings = [
        "trainer.max_epochs=1",
        "model.latent_dim=32",
        "evaluation.nll_samples=0",
        "data.limit=300",
        "threads=1",
    ]
    settings += ["network=autoencoder_kl", "network.block_out_channels=[8,8]", "callbacks=minimal"]
    train(composed(*settings), folder / "run", settings, progress_bar=False)
    page = chromium.Page(tmp_path_factory.mktemp("profile"))
    with chromium.tensorboard(folder, tmp_path_factory.mktemp("site")) as address:
        yield page.open_latents(address)
    page.close()


def levels(tab, channel):
    """The grey levels of a channel's map as it is drawn, (h, w)."""
    script = f"""(() => {{ const c = {TAB}.querySelector('.channel[data-channel="{channel}"] .now');
    return [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }})()"""
    width, *pixels = tab.run(script)
    return np.array(pixels).reshape(-1, width, 4)[..., 0]


def test_channels_are_grids_a_click_gives_a_place_its_slider_and_a_channel_moves_as_one(tab, tmp_path):
    shown = tab.run(f"[...{TAB}.querySelectorAll('.channel')].map((c) => +c.dataset.channel)")
    assert sorted(shown) == [0, 1]
    assert tab.run(f"{TAB}.querySelectorAll('.channel .carried').length") == 2  # the KL of each place
    assert (levels(tab, 1) == 128).all()  # z = 0
    assert tab.run(f"{TAB}.querySelectorAll('.latent').length") == 12
    assert "32 latents (2 × 4 × 4)" in tab.run(f"{TAB}.querySelector('.note').textContent")
    tab.run(
        f"""(() => {{ const c = {TAB}.querySelector('.channel[data-channel="1"] .now'), b = c.getBoundingClientRect();
        c.dispatchEvent(new MouseEvent('click', {{ clientX: b.left + 0.6 * b.width, clientY: b.top + 0.4 * b.height }}));
        const row = {TAB}.querySelector('.latent'), input = row.querySelector('input');
        input.value = 3; input.dispatchEvent(new Event('input')); }})()"""
    )
    assert tab.run(f"{TAB}.querySelector('.latent').dataset.latent") == str(16 + 4 + 2)
    assert tab.run(f"{TAB}.querySelector('.latent span').textContent") == "1:1,2"
    assert np.argwhere(levels(tab, 1) > 140).tolist() == [[1, 2]]
    before = tab.run(f"{TAB}.querySelector('.shown').src")
    tab.run(
        f"""(() => {{ const input = {TAB}.querySelector('.channel[data-channel="0"] input');
        input.value = -2; input.dispatchEvent(new Event('input')); }})()"""
    )
    assert (levels(tab, 0) < 120).all() and len(np.unique(levels(tab, 0))) == 1
    tab.until(f"{TAB}.querySelector('.shown').src !== {before!r}")
    tab.until("location.hash.includes('latents.z=')")
    assert tab.errors == []
    tab.screenshot(tmp_path / "tab.png")
