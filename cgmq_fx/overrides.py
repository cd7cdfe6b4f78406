"""What a caller says of some quantizers alone, and how several such sayings become one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from cgmq_fx.errors import UsageError
from cgmq_fx.gates import is_width
from cgmq_fx.quantizer_spec import Role
from cgmq_fx.unit_bits import Granularity


@dataclass(frozen=True)
class Override:
    """How the quantizers that a selector names differ from the others.

    Args:
        bit_width: the fixed bit-width, 1 to 16; 0 prunes the tensor, 32 leaves it float.
        widths: the bit-widths to choose from, exactly these: 32 only where it is listed.
        per_channel: a range for each output channel, or one for the whole tensor; concerns weights
            alone.
        affine: True: the grid may have a zero_point that is not 0. False: it has zero_point 0,
            symmetric, and unsigned where the tensor cannot be negative. None: symmetric for
            weights, unsigned for what cannot be negative, affine for the rest.
        role: concerns only weights, only activations or only inputs of the model.
        granularity: what has a bit-width of its own, as in `cgmq_fx.prepare`; concerns weights
            alone.

    Raises:
        UsageError: fields out of these bounds, all named at once.
    """

    bit_width: int | None = None
    widths: Sequence[int] | None = None
    per_channel: bool | None = None
    affine: bool | None = None
    role: Role | None = None
    granularity: Granularity | None = None

    def __post_init__(self) -> None:
        faults = [*self._width_faults(), *self._option_faults()]
        if faults:
            raise UsageError("Override: " + "; ".join(faults))
        if self.widths is not None:
            object.__setattr__(self, "widths", tuple(sorted(set(self.widths))))

    def _width_faults(self) -> list[str]:
        faults = []
        if self.bit_width is not None and not _is_sound(self.bit_width):
            faults.append(f"bit_width={self.bit_width!r} must be a width from 0 to 16, or 32")
        if self.widths is not None:
            faults += self._widths_faults(self.widths)
        if self.bit_width is not None and self.widths is not None:
            faults.append(
                f"bit_width={self.bit_width!r} fixes what widths={self.widths!r} leaves to choose; "
                f"give one of them"
            )
        return faults

    def _widths_faults(self, widths: object) -> list[str]:
        if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
            return [f"widths={widths!r} must be bit-widths, at least one, such as (4, 8)"]
        wrong = [width for width in widths if not _is_sound(width)]
        return [f"widths={widths!r} has {wrong}, use 0 to 16, or 32"] if wrong else []

    def _option_faults(self) -> list[str]:
        faults = [
            f"{name}={value!r} must be True or False"
            for name, value in (("per_channel", self.per_channel), ("affine", self.affine))
            if value is not None and not isinstance(value, bool)
        ]
        if self.role is not None and self.role not in get_args(Role):
            options = ", ".join(map(repr, get_args(Role)))
            faults.append(f"role={self.role!r} is unknown, use one of {options}")
        if self.granularity is not None and self.granularity not in get_args(Granularity):
            options = ", ".join(map(repr, get_args(Granularity)))
            faults.append(f"granularity={self.granularity!r} is unknown, use one of {options}")
        faults += [
            f"{name}={getattr(self, name)!r} concerns weights, and role={self.role!r} leaves them "
            f"out; remove one of them"
            for name in ("per_channel", "granularity")
            if self.role in ("activation", "input") and getattr(self, name) is not None
        ]
        if all(getattr(self, key) is None for key in _SAYING):
            faults.append(f"it says nothing; give one of {', '.join(_SAYING)}")
        return faults

    def __str__(self) -> str:
        said = [f"{key}={value!r}" for key in KEYS if (value := getattr(self, key)) is not None]
        return ", ".join(said)


#: Keys that a mapping in place of an `Override` may have.
KEYS = tuple(field.name for field in fields(Override))
_SAYING = tuple(key for key in KEYS if key != "role")


def _is_sound(width: object) -> bool:
    return isinstance(width, int) and not isinstance(width, bool) and is_width(width)


@dataclass(frozen=True)
class Chosen:
    """An override that a selector brought to an operand.

    Attributes:
        by: what messages call the selector.
        is_exact: whether the selector is a name, which wins over globs, types and predicates.
        override: what it says.
    """

    by: str
    is_exact: bool
    override: Override


def merged(chosen: Iterable[Chosen]) -> tuple[Chosen | None, list[str]]:
    """Return what several overrides of one quantizer say together, and where they disagree.

    Of overrides that disagree those by an exact name win over the others; overrides that say
    different things add up.
    """
    distinct = list(dict.fromkeys(chosen))
    said: dict[str, Any] = {}
    sources: dict[str, bool] = {}
    faults: list[str] = []
    for keys in (("bit_width", "widths"), ("per_channel",), ("affine",), ("granularity",)):
        speaking = [item for item in distinct if _said(item, keys)]
        exact = [item for item in speaking if item.is_exact]
        winning = exact or speaking
        values = {_said(item, keys): item for item in winning}
        if len(values) > 1:
            listed = " and ".join(f"{item.by} says {_text(item, keys)}" for item in values.values())
            faults.append(listed)
        for item in winning[:1]:
            said |= {key: getattr(item.override, key) for key in keys}
            sources |= {item.by: item.is_exact}
    if faults or not said:
        return None, faults
    return Chosen(" and ".join(sources), all(sources.values()), Override(**said)), []


def _said(item: Chosen, keys: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    pairs = ((key, getattr(item.override, key)) for key in keys)
    return tuple((key, value) for key, value in pairs if value is not None)


def _text(item: Chosen, keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in _said(item, keys))


def read_override(given: object) -> Override:
    """Return an `Override` from one, or from a mapping with the same keys.

    Raises:
        UsageError: keys are unknown, or values out of bounds.
    """
    if isinstance(given, Override):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{given!r} is of type {type(given).__name__}; give an Override or a mapping with some "
            f"of the keys {', '.join(KEYS)}"
        )
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise UsageError(f"unknown keys {unknown}; the keys are {', '.join(KEYS)}")
    return Override(**given)
