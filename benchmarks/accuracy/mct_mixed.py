"""Mixed bit-widths by the model-compression-toolkit's post-training quantization, for comparison.

Runs in an environment of its own, where cgmq_fx need not be:

    pip install torch==2.13.0 torchvision==0.28.0 model-compression-toolkit==2.6.1
    python benchmarks/accuracy/mct_mixed.py --data-root data

Its target has weights of 2, 4 and 8 bits; activations have 8. The budget is half the bit operations
at 8 bits. The last line is a JSON object: test accuracy by task, without those
that it failed on, which are named on stderr.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent)]

# torchvision has to be there before the toolkit imports it.
from tasks import TASKS, accuracy, calibration, float_model  # noqa: E402, I001

import model_compression_toolkit as mct  # noqa: E402

HALF = 0.5
#: Parts of what the toolkit counts at 8 bits.
PARTS = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35)


def mixed(model: nn.Module, loader: list[Tensor]) -> nn.Module:
    """Return the network at half the bit operations of 8 bits.

    The toolkit counts the inputs of layers behind a pooling as 32 bits. So it is given one budget
    after the other, and the first network is taken that has half of them with inputs of 8 bits.
    """

    def batches() -> Iterator[list[Tensor]]:
        for x in loader:
            yield [x]

    target = mct.get_target_platform_capabilities(tpc_version="1.0", device_type="imx500")
    at_8_bits = mct.core.pytorch_resource_utilization_data(
        model, batches, target_platform_capabilities=target
    ).bops
    for part in PARTS:
        made, _ = mct.ptq.pytorch_post_training_quantization(
            model,
            batches,
            target_resource_utilization=mct.core.ResourceUtilization(bops=at_8_bits * part),
            core_config=mct.core.CoreConfig(
                mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig()
            ),
            target_platform_capabilities=target,
        )
        share = share_of_8_bits(made, loader[0][:1])
        print(f"{part} of its count: {share:.4f} of the bit operations at 8 bits", file=sys.stderr)
        if share <= HALF:
            return made
    raise ValueError("none has half the bit operations")


@torch.no_grad()
def share_of_8_bits(made: nn.Module, x: Tensor) -> float:
    """Return the mean bit-width of weights over 8, each counted as often as it is multiplied."""
    counted: list[tuple[int, int]] = []

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        bits = layer.weights_quantizers["weight"].num_bits
        counted.append((output.numel() * layer.get_quantized_weights()["weight"][0].numel(), bits))

    layers = [layer for layer in made.modules() if getattr(layer, "weights_quantizers", None)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    made(x)
    for hook in hooks:
        hook.remove()
    return sum(macs * bits for macs, bits in counted) / sum(8 * macs for macs, _ in counted)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default="", help="names to run, with commas; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for task in TASKS:
        if arguments.tasks and task.name not in arguments.tasks.split(","):
            continue
        train, test = task.data(arguments.data_root)
        try:
            made = mixed(float_model(task, train, arguments.seed), calibration(train))
            found[task.name] = accuracy(made.eval(), test)
        except Exception as error:  # a comparison goes on without what the other tool cannot do
            print(f"{task.name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
