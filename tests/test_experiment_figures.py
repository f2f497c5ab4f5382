"""What figures are drawn with: images as text come back, guides and labels are where they should be."""

from __future__ import annotations

import json

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vae.experiment_figures import MUTED, STYLE, bare, dots, guide, level, log_ticks, note, pack_images, unpack_images


def test_images_come_back_from_text_to_half_a_grey_level():
    images = np.linspace(0, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    back = unpack_images(json.loads(json.dumps(pack_images(images))))
    assert back.shape == images.shape
    assert np.abs(back - images).max() <= 0.5 / 255 + 1e-12


@pytest.fixture
def ax():
    with matplotlib.rc_context(STYLE):
        figure, ax = plt.subplots()
        yield ax
        plt.close(figure)


def test_guides_labels_and_dots_are_where_they_are_asked_for(ax):
    guide(ax, x=2.0, y=0.5, ls=":")
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines] == [
        ([2.0, 2.0], [0, 1]),
        ([0, 1], [0.5, 0.5]),
    ]
    assert {(line.get_color(), line.get_linestyle()) for line in ax.lines} == {(MUTED, ":")}
    note(ax, "here", (1.0, 2.0), (3, -7))
    level(ax, 0.5, "a level")
    here, there = ax.texts
    assert (here.xy, here.xyann, here.get_ha(), here.get_fontsize()) == ((1.0, 2.0), (3, -7), "center", 8)
    assert (there.xy, there.get_ha(), there.get_color()) == ((0.98, 0.5), "right", MUTED)
    dots(ax, 4, [1.0])
    assert len(ax.lines) == 2  # one seed is its own mean
    dots(ax, 4, [1.0, 3.0])
    assert ax.lines[2].get_xydata().tolist() == [[4, 1], [4, 3]]


def test_logarithmic_axes_have_the_ticks_that_were_chosen_and_images_none(ax):
    ax.set(xscale="log", xlim=(0.1, 30))
    log_ticks(ax, x=(0.1, 1, 20))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.1", "1", "20"]
    assert not len(ax.xaxis.get_minorticklocs())
    bare(ax)
    assert not any(spine.get_visible() for spine in ax.spines.values())
    assert ax.xaxis.get_tick_params()["length"] == 0
