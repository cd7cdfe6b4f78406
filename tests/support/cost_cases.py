"""Operations and networks that the tests of cost tables price."""

from cgmq_fx.cost.operation import BitSource, BoundOperation, Operation

WIDTHS = (2, 4, 8, 16, 32)
_CONV = {
    "in_channels": 8,
    "out_channels": 16,
    "groups": 1,
    "kernel_size": 9,
    "kernel_0": 3,
    "kernel_1": 3,
    "stride_0": 1,
    "stride_1": 1,
    "dilation_0": 1,
    "dilation_1": 1,
    "spatial_dims": 2,
    "bias": True,
}
#: MACs of LeNet-5, 32C5-MP2-64C5-MP2-FC512-FC10 without padding on 28 x 28:
#: 24*24*32*25, 8*8*64*25*32, 1024*512, 512*10.
LENET_MACS = (460_800, 3_276_800, 524_288, 5_120)
#: Elements of its weights.
LENET_NUMELS = (32 * 25, 64 * 32 * 25, 1024 * 512, 512 * 10)


def conv(name: str = "conv", macs: int = 1000, **attributes: int | bool | str) -> Operation:
    """Return a 2-D convolution."""
    return Operation(
        name,
        "conv2d",
        "torch.nn.functional.conv2d",
        "weight",
        macs,
        output_elements=100,
        input_elements=200,
        weights=50,
        attributes={**_CONV, **attributes},
    )


def linear(name: str = "fc", macs: int = 1000) -> Operation:
    """Return a linear layer."""
    attributes = {"in_features": 10, "out_features": 100, "bias": False}
    return Operation(
        name, "linear", "torch.nn.functional.linear", "weight", macs, 100, 10, 1000, attributes
    )


def matmul(name: str = "matmul", macs: int = 1000) -> Operation:
    """Return a product of two activations."""
    attributes = {"batch": 1, "m": 10, "n": 10, "k": 10}
    return Operation(name, "matmul", "torch.matmul", "pair", macs, 100, 200, 0, attributes)


def plain(name: str, op: str, macs: int = 0) -> Operation:
    """Return an operation without quantizable operands."""
    return Operation(name, op, f"torch.{op}", "none", macs, 10, 10)


def bind(operation: Operation, *sources: str) -> BoundOperation:
    """Return `operation` with sources such as "s3" (site 3) or "8" (eight bits)."""
    return BoundOperation(
        operation,
        tuple(
            BitSource(site=int(source[1:])) if source[0] == "s" else BitSource(bits=int(source))
            for source in sources
        ),
    )


def lenet() -> list[BoundOperation]:
    """Return LeNet-5: weights are sites 0 to 3, activations 4 to 6, the image has 8 bits."""
    kinds = (conv, conv, linear, linear)
    return [
        bind(kind(f"layer{i}", macs), f"s{i}", "8" if i == 0 else f"s{3 + i}")
        for i, (kind, macs) in enumerate(zip(kinds, LENET_MACS, strict=True))
    ]
