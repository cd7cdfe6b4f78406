from fractions import Fraction

import pytest

from cgmq_fx.errors import UsageError
from cgmq_fx.units import (
    convert,
    exact,
    format_amount,
    format_number,
    is_number,
    parse_amount,
    parse_number,
    parse_unit,
)


@pytest.mark.parametrize(
    ("text", "base", "dimension"),
    [
        ("12 MBOP", Fraction(12_000_000), "BOP"),
        ("12MBOPs", Fraction(12_000_000), "BOP"),
        ("3 MAC", Fraction(3), "MAC"),
        ("64 KiB", Fraction(65536), "byte"),
        ("64 kB", Fraction(64000), "byte"),
        ("7 bit", Fraction(7, 8), "byte"),
        ("1 Mibit", Fraction(1024 * 1024, 8), "byte"),
        ("8 bytes", Fraction(8), "byte"),
        ("3 ms", Fraction(3, 1000), "s"),
        ("20 uJ", Fraction(20, 10**6), "J"),
        ("20 \N{MICRO SIGN}J", Fraction(20, 10**6), "J"),
        ("0.1 pJ", Fraction(1, 10**13), "J"),
        ("1.5e6 cycle", Fraction(1_500_000), "cycle"),
        ("1_000 cycles", Fraction(1000), "cycle"),
    ],
)
def test_parse_amount_is_exact(text, base, dimension):
    number, unit = parse_amount(text)
    assert number * unit.scale == base
    assert unit.dimension == dimension


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 parsec", "unknown unit 'parsec'"),
        ("5 mbop", "unknown unit 'mbop' .did you mean 'MBOP'"),
        ("5 KB", "unknown unit 'KB' .did you mean 'kB' or 'KiB'"),
        ("5", "'5' has no unit"),
        ("ms", "'ms' is not an amount"),
        ("1e999 B", "beyond 1e60"),
        ("5 Js", "unknown unit 'Js'"),
    ],
)
def test_parse_amount_refuses(text, message):
    with pytest.raises(UsageError, match=message):
        parse_amount(text)


def test_parse_unit_names_known_units():
    with pytest.raises(UsageError, match="units: BOP, kBOP"):
        parse_unit("?")


def test_convert():
    assert convert(Fraction(3), "ms", "us") == 3000
    assert convert(Fraction(1), "KiB", "bit") == 8192
    with pytest.raises(UsageError, match="'ms' measures time, 'uJ' measures energy"):
        convert(Fraction(3), "ms", "uJ")


def test_exact_reads_floats_as_written():
    assert exact(0.1) == Fraction(1, 10)
    assert exact(Fraction(1, 3)) == Fraction(1, 3)
    assert exact(-0.0) == 0
    for bad in (float("nan"), float("inf"), 1e300, 10**400):
        with pytest.raises(UsageError):
            exact(bad)


def test_numbers():
    assert is_number(" 1.5e6 ")
    assert not is_number("1.5 e6")
    assert parse_number("1_5") == 15
    with pytest.raises(UsageError, match="'1,5' is not a decimal number"):
        parse_number("1,5")


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (2_184_000, "BOP", "2.184 MBOP"),
        (65536, "byte", "64 KiB"),
        (8192, "bit", "1 KiB"),
        (1000, "byte", "1,000 byte"),
        (0, "byte", "0 byte"),
        (Fraction(3, 1000), "s", "3 ms"),
        (0, "s", "0 s"),
        (Fraction(1, 10**18), "J", "0.001 fJ"),
        (Fraction(1, 8), "cycle", "0.125 cycle"),
        (20, "uJ", "20 uJ"),
    ],
)
def test_format_amount(amount, unit, text):
    assert format_amount(Fraction(amount), unit) == text


def test_format_number():
    assert format_number(Fraction(1, 3)) == "0.3333"
    assert format_number(Fraction(-1234567)) == "-1,234,567"
    assert format_number(Fraction(10**20)) == "1.000e+20"
    assert format_number(Fraction(1, 10**9)) == "1e-09"
