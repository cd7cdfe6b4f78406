"""Functions that a traced graph calls to keep what tracing assumed true."""

from torch import nn
from torch.fx.node import has_side_effect

from cgmq_fx.errors import UnsupportedModelError


@has_side_effect
def check_same(value: object, traced: object, where: str) -> None:
    """Refuse inputs for which the model would take another path than the traced one.

    Raises:
        UnsupportedModelError: `value` differs from what it was while tracing.
    """
    if value != traced:
        raise UnsupportedModelError(
            f"{where}: the model took the path for {traced!r} when it was traced, and now has "
            f"{value!r}; call prepare again with example_inputs of this shape"
        )


class TrainingMode(nn.Module):
    """A node's answer to ``self.training``: follows `train()` and `eval()` of the whole graph."""

    def forward(self) -> bool:
        """Return the current mode."""
        return self.training


def select_mode(training: bool, in_training: object, in_evaluation: object) -> object:
    """Return the value that belongs to the current mode."""
    return in_training if training else in_evaluation
