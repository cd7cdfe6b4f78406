"""The integer types of ONNX that carry codes, and which of them carries codes of a width."""

from dataclasses import dataclass

from cgmq_fx.packing import code_range


@dataclass(frozen=True)
class Carrier:
    """An integer type of ONNX.

    Attributes:
        name: as ``onnx.TensorProto`` has it.
        bits: of one element, in the file.
        signed: whether it holds negative numbers.
    """

    name: str
    bits: int
    signed: bool

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest number that it holds."""
        return code_range(self.bits, signed=self.signed)


CARRIERS = tuple(
    Carrier(f"{'' if signed else 'U'}INT{bits}", bits, signed)
    for bits in (4, 8, 16)
    for signed in (True, False)
)
BY_NAME = {carrier.name: carrier for carrier in CARRIERS}
#: Narrowest type of an activation: runtimes have kernels for 8 bits, none for fewer.
ACTIVATION_BITS = 8


#: What codes are raised by where a type without signs carries signed ones of up to 8 bits.
RAISED = 128


def carrier_of(bits: int, *, signed: bool, least: int = 4) -> Carrier:
    """Return the narrowest type of at least `least` bits that holds codes of `bits` bits."""
    return next(
        item for item in CARRIERS if item.signed == signed and item.bits >= max(bits, least)
    )
