"""Rungs of a ladder are the best assignments of widths to units, for the bits that they take."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.ladders import Ladder
from cgmq_fx.unit_bits import UnitBits, counts_of, mean_bits


@st.composite
def error_tables(draw):
    """Errors of units at widths: mostly falling, not always, with ties and zeros."""
    widths = tuple(sorted(draw(st.sets(st.integers(0, 16), min_size=1, max_size=6))))
    units = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    errors = torch.rand(len(widths), units, generator=generator)
    errors = errors.sort(0, descending=True).values if draw(st.booleans()) else errors
    if draw(st.booleans()):
        errors = (errors * 4).round() / 4
    return errors, widths


@given(error_tables(), st.booleans(), st.booleans())
def test_every_rung_is_the_best_for_its_price(table, has_float, refines):
    errors, widths = table
    ladder = Ladder(errors, widths, errors.shape[1], has_float=has_float)
    if refines:
        ladder.refine(len(ladder.rungs) // 2)
    bits_by_width = torch.tensor(widths, dtype=torch.float64).unsqueeze(1)
    means = []
    for place, rung in enumerate(ladder.rungs):
        bits = ladder.bits(place)
        means.append(float(mean_bits(bits)))
        assert abs(means[-1] - rung.mean_bits) < 1e-9
        if bits == 32:
            assert has_float
            assert rung.error == 0
            continue
        every = bits.units if isinstance(bits, UnitBits) else bytes([bits] * errors.shape[1])
        index = torch.tensor([widths.index(width) for width in every])
        found = errors.double().gather(0, index.unsqueeze(0))[0]
        assert abs(float(found.mean()) - rung.error) < 1e-5
        if rung.price is not None:
            assert dict(counts_of(bits)) == dict(rung.counts)
            priced = errors.double() + rung.price * bits_by_width
            own = found + rung.price * bits_by_width[index, 0]
            assert bool((own <= priced.min(0).values + 1e-5).all())
    assert means == sorted(means)
    assert ladder.at_most(0) == 0
    assert ladder.at_most(32) == len(ladder.rungs) - 1
