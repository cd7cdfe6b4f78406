"""The shape of a recurrent layer: its options, its weights in torch's order, its products."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

State = tuple[Tensor, ...]
"""``(hidden,)``, of an LSTM ``(hidden, cell)``."""


class Product(NamedTuple):
    """One matrix product of a recurrent layer or cell.

    Attributes:
        name: such as ``input_l0``, ``hidden_l1_reverse`` or ``projection_l0``.
        weight: place of its weight among the weights.
        operand: name of the tensor inside that it reads, and of its quantizer; None: the input.
    """

    name: str
    weight: int
    operand: str | None


CELL_PRODUCTS = (Product("input", 0, None), Product("hidden", 1, "hidden"))


class Weights(NamedTuple):
    """What one layer reads in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None


def weights_of(own: Sequence[Tensor], projection: Tensor | None = None) -> Weights:
    """Return two weights and, where there are any, two biases under their names."""
    biases = (own[2], own[3]) if own[2:] else (None, None)
    return Weights(own[0], own[1], biases[0], biases[1], projection)


@dataclass(frozen=True)
class Recurrence:
    """The options of a recurrent layer, as in `nn.RNNBase`; `mode` is one of its modes.

    `projects`: the hidden states are projections, as with a ``proj_size``.
    """

    mode: str
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    projects: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of each direction's weights end with."""
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def products(self) -> tuple[Product, ...]:
        """The products, in the order in which they are computed."""
        return tuple(
            product
            for layer in range(self.num_layers)
            for direction, suffix in enumerate(self.suffixes)
            for product in self._products(layer, direction, f"l{layer}{suffix}")
        )

    def _products(self, layer: int, direction: int, ending: str) -> Iterable[Product]:
        first = self._first_weight(layer, direction)
        yield Product(f"input_{ending}", first, f"input_l{layer}" if layer else None)
        yield Product(f"hidden_{ending}", first + 1, f"hidden_{ending}")
        if self.projects:
            last = first + self._weights_per_direction - 1
            yield Product(f"projection_{ending}", last, f"projection_{ending}")

    @property
    def _weights_per_direction(self) -> int:
        return 2 + 2 * self.bias + self.projects

    def _first_weight(self, layer: int, direction: int) -> int:
        return (layer * len(self.suffixes) + direction) * self._weights_per_direction

    def weights_in(self, weights: Sequence[Tensor], layer: int, direction: int) -> Weights:
        """Return the weights of one layer in one direction, out of all."""
        first = self._first_weight(layer, direction)
        own = weights[first : first + self._weights_per_direction]
        projection = own[-1] if self.projects else None
        return weights_of(own[:-1] if self.projects else own, projection)

    def first_state(self, data: Tensor, batch: int, weights: Sequence[Tensor]) -> State:
        """Return zeros: the state before the first step where none is given."""
        rows = self.num_layers * len(self.suffixes)
        own = self.weights_in(weights, 0, 0)
        last = own.hidden if own.projection is None else own.projection
        widths = (own.hidden.shape[1], last.shape[1])
        count = 2 if self.mode == "LSTM" else 1
        return tuple(data.new_zeros((rows, batch, width)) for width in widths[:count])
