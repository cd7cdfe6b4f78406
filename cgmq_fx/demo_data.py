"""The demo's data: handwritten digits of 8 x 8 pixels that scikit-learn ships."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cgmq_fx.errors import UsageError

#: Parts of the data set for validation and for the test; the rest trains.
VALIDATION_SHARE, TEST_SHARE = 0.2, 0.2
_LARGEST_PIXEL = 16
_BATCH = 64
_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Digits:
    """Loaders of the three parts; images are ``(batch, 1, 8, 8)`` in [0, 1].

    Attributes:
        train: shuffled anew in every epoch.
        validation: for the choice of the best epoch.
        test: for the accuracies that are reported.
        num_test: how many images the test has.
    """

    train: DataLoader[tuple[Tensor, ...]]
    validation: DataLoader[tuple[Tensor, ...]]
    test: DataLoader[tuple[Tensor, ...]]
    num_test: int


def load_digits(seed: int) -> Digits:
    """Return the data set, split and shuffled by `seed`.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UsageError(
            f"the demo's data set comes with scikit-learn, which cannot be imported ({error}); "
            "install it: pip install 'cgmq_fx[demo]'"
        ) from error
    raw = datasets.load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / _LARGEST_PIXEL
    labels = torch.tensor(raw.target, dtype=torch.int64)
    count = len(labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    test, validation = round(count * TEST_SHARE), round(count * VALIDATION_SHARE)
    parts = torch.split(order, [test, validation, count - test - validation])
    fixed = [TensorDataset(images[part], labels[part]) for part in parts]
    shuffle = torch.Generator().manual_seed(seed)
    return Digits(
        train=DataLoader(fixed[2], _BATCH, shuffle=True, generator=shuffle),
        validation=DataLoader(fixed[1], _EVALUATION_BATCH),
        test=DataLoader(fixed[0], _EVALUATION_BATCH),
        num_test=test,
    )
