"""What an explanation says, as frozen values: every edge, and every quantizer."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["operation", "parameter", "input"]


@dataclass(frozen=True)
class Edge:
    """One tensor that one operation reads.

    Attributes:
        producer: where the tensor comes from: an operation, an input, or a parameter by its name in
            the state dict.
        source: what the producer is.
        consumer: the operation that reads it, as reports name it; ``output`` for the model's.
        operand: what it is to the consumer: the name of a parameter of the function, such as
            ``weight``, with its place where that is a list, such as ``tensors[1]``.
        op: operation class of the consumer; empty for the model's output.
        shape: shape of the tensor for one sample; None where no shapes are known yet.
        site: the quantizer that it is read through; None where it is read in float.
        bits: bit-width at which it is read; 32 is floating point.
        why: why this quantizer stands here, or why none does.
        shares: the other places that read the same quantizer, each ``consumer.operand``.
    """

    producer: str
    source: Source
    consumer: str
    operand: str
    op: str
    shape: tuple[int, ...] | None
    site: str | None
    bits: int
    why: str
    shares: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Consumer and operand in one name."""
        return f"{self.consumer}.{self.operand}"


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer.

    Attributes:
        site: its place in ``prepared.quantizers``.
        role: ``weight``, ``activation`` or ``input``.
        scheme: ``symmetric``, ``unsigned`` or ``affine``.
        ranges: how many ranges it has: 1 for the tensor, or one for each channel.
        bits: its present bit-width.
        allowed: the bit-widths that it may take, rising.
        learned: False where the bit-width is fixed.
        readers: the places that read it, each ``consumer.operand``.
    """

    site: str
    role: str
    scheme: str
    ranges: int
    bits: int
    allowed: tuple[int, ...]
    learned: bool
    readers: tuple[str, ...]


@dataclass(frozen=True)
class ExplanationContents:
    """Edges and quantizers of one prepared model.

    Attributes:
        model: class of the model.
        edges: every tensor that an operation reads, in the order of the graph.
        quantizers: every quantizer, in the order of ``prepared.quantizers``.
    """

    model: str
    edges: tuple[Edge, ...]
    quantizers: tuple[QuantizerRow, ...]
