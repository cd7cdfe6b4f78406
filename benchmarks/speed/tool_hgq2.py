"""HGQ2 on Keras's torch backend: learned bit-widths of weights and activations, cost in the loss.

Its layers are Keras's, so that the networks are written again, with the same layers, channels last.

Environment: ``pip install torch==2.13.0 keras==3.15.1 HGQ2==0.2.0``.
"""

import os
from collections.abc import Mapping
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch.nn.functional as F
from hgq.config import LayerConfigScope, QuantizerConfigScope
from hgq.layers import QAdd, QConv2D, QDense
from networks import NUM_CLASSES, Workload
from torch import Tensor
from training import Step, optimizer_of

PACKAGES = ("HGQ2", "keras")


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step, with its cost as a part of the loss as its own training loop has it."""
    name = type(workload.model()).__name__
    if name not in _NETWORKS:
        raise NotImplementedError(f"{name} is not written for Keras here; {sorted(_NETWORKS)} are")
    with QuantizerConfigScope(place="all"), LayerConfigScope(enable_ebops=True, beta0=1e-8):
        model = _NETWORKS[name]((*workload.image[1:], workload.image[0]))
    last = images.permute(0, 2, 3, 1).contiguous()
    model(last)
    optimizer = optimizer_of(model)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(last, training=True), labels) + sum(model.losses)
        loss.backward()
        optimizer.step()

    return {"learned w and a": step}


def _lenet5(sample: tuple[int, ...]) -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Input(sample),
            QConv2D(20, 5, activation="relu"),
            keras.layers.MaxPooling2D(2),
            QConv2D(50, 5, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            QDense(500, activation="relu"),
            QDense(NUM_CLASSES),
        ]
    )


def _resnet20(sample: tuple[int, ...]) -> keras.Model:
    image = keras.layers.Input(sample)
    x = keras.layers.ReLU()(_norm(QConv2D(16, 3, padding="same", use_bias=False)(image)))
    inputs = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for place in range(3):
            x = _block(x, inputs, outputs, 2 if stage and not place else 1)
            inputs = outputs
    return keras.Model(image, QDense(NUM_CLASSES)(keras.layers.GlobalAveragePooling2D()(x)))


def _block(x: Any, inputs: int, outputs: int, stride: int) -> Any:
    y = QConv2D(outputs, 3, strides=stride, padding="same", use_bias=False)(x)
    y = keras.layers.ReLU()(_norm(y))
    y = _norm(QConv2D(outputs, 3, padding="same", use_bias=False)(y))
    if stride != 1 or inputs != outputs:
        x = _norm(QConv2D(outputs, 1, strides=stride, use_bias=False)(x))
    return keras.layers.ReLU()(QAdd()([y, x]))


def _norm(x: Any) -> Any:
    return keras.layers.BatchNormalization()(x)


_NETWORKS = {"LeNet5": _lenet5, "ResNet": _resnet20}
