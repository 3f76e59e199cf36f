"""Peak memory of this process, against allocations of known size."""

from __future__ import annotations

import pytest
import torch

from observe_r1.peak_memory import PeakMemory

MIB = 2**20
TOLERANCE = 8 * MIB  # what Python and the allocator take beside a tensor

pytestmark = pytest.mark.skipif(not PeakMemory.is_measured("cpu"), reason="this machine does not tell the peak")


def test_an_allocation_shows_although_it_is_gone_at_the_end() -> None:
    with PeakMemory() as memory:
        torch.ones(128 * MIB, dtype=torch.uint8)
    assert memory.peak - memory.before == pytest.approx(128 * MIB, abs=TOLERANCE)
    assert 0 < memory.before < memory.peak < memory.available


def test_what_was_there_before_counts_and_is_no_growth() -> None:
    kept = torch.ones(128 * MIB, dtype=torch.uint8)
    with PeakMemory() as memory:
        kept.add_(1)
    assert memory.before > 128 * MIB
    assert memory.peak - memory.before < TOLERANCE


def test_each_use_begins_anew() -> None:
    growth = []
    for size in (256, 64, 128):
        with PeakMemory() as memory:
            torch.ones(size * MIB, dtype=torch.uint8)
        growth.append(memory.peak - memory.before)
    assert growth == [pytest.approx(size * MIB, abs=TOLERANCE) for size in (256, 64, 128)]


def test_a_use_inside_another_measures_its_own_part() -> None:
    """And takes from the outer one what came before it: there is one mark of the highest level, and it is set back."""
    with PeakMemory() as outer:
        torch.ones(256 * MIB, dtype=torch.uint8)
        with PeakMemory() as inner:
            torch.ones(64 * MIB, dtype=torch.uint8)
    assert inner.peak - inner.before == pytest.approx(64 * MIB, abs=TOLERANCE)
    assert outer.peak == pytest.approx(inner.peak, abs=TOLERANCE)


def test_an_error_inside_is_passed_on_and_the_peak_is_kept() -> None:
    def fail() -> None:
        torch.ones(64 * MIB, dtype=torch.uint8)
        raise KeyError

    memory = PeakMemory()
    with pytest.raises(KeyError), memory:
        fail()
    assert memory.peak - memory.before == pytest.approx(64 * MIB, abs=TOLERANCE)
