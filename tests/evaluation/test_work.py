import pytest

from vae.errors import VAEError
from vae.evaluation import work
from vae.evaluation.work import Work


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets, in place of those that pass."""
    now = [100.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    return now


def test_what_would_take_longer_than_a_week_is_refused_with_the_days_at_the_pace_so_far(clock):
    counted = Work("ais")
    counted.expect(10**9)
    clock[0] += 1.0
    counted()  # too soon to tell
    clock[0] += 2.0
    with pytest.raises(VAEError, match="ais would take about 17,361 days here"):  # 3 s for 2 of 10^9 steps
        counted()


def test_what_ends_within_a_week_goes_on(clock):
    with Work("ais") as counted:
        counted.expect(1000)
        for _ in range(1000):
            clock[0] += 600.0
            counted()
        assert counted.done == 1000
    free = Work("ais", longest=float("inf"))
    free.expect(10**12)
    clock[0] += 600.0
    free()


def test_a_bar_with_the_time_left_is_drawn_only_where_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(work, "SOON", 0.0)
    for show in (False, True):
        with Work("gaps", show) as counted:
            counted.expect(2)
            counted()
        assert ("gaps" in capsys.readouterr().err) is show
