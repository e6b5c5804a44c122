"""A short soak (`benchmarks/soak.py`): each site serves clients of all kinds, is killed or reloaded, and serves on."""

from __future__ import annotations

import pytest

from benchmarks import soak


@pytest.mark.timeout(120)
@pytest.mark.parametrize("site", sorted(soak.SITES))
def test_every_answer_is_right_and_nothing_grows(site: str) -> None:
    """[W15][W16][A9][A10][S2] Whatever the clients do, and whoever is killed."""
    report = soak.run(site, seconds=2.5, count=400, clients=4)
    assert report.faults == []
    assert report.right > 20
    assert {*report.disturbed} == {*soak.SITES[site].disturbances}


def test_memory_is_flat_in_both_directions() -> None:
    """[W7][A13] The few requests of a test only show that the way to count a million works."""
    for line in soak.run_in_process(200):
        assert "200 requests" in line
