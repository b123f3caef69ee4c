"""A small model's size is not "0.00 M"."""

import pytest

from ted_scale.base.counts import millions


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0"),
        (4_832, "4,832"),
        (99_999, "99,999"),
        (100_000, "0.10 M"),
        (134_515_008, "134.52 M"),
        (8_030_261_248, "8,030.26 M"),
    ],
)
def test_a_count_shows_two_digits_at_least(count, said):
    assert millions(count) == said


def test_with_fewer_decimals_the_border_is_higher():
    assert [millions(count, 1) for count in (999_999, 1_000_000)] == ["999,999", "1.0 M"]
