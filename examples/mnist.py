"""LeNet-5 on MNIST under a hard budget: mnist_plain.py with prepare, attach and lower added.

python examples/mnist.py --data-root data --budget 0.6%
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import cgmq_fx
from torchvision_shim import torchvision


class LeNet5(nn.Module):
    """32C5-MP2-64C5-MP2-FC512-FC10, 4,267,008 MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 64, 5)
        self.fc1 = nn.Linear(1024, 512)
        self.fc2 = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, ``(samples, 10)``, for images ``(samples, 1, 28, 28)``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


def load(root: str, *, train: bool, batch_size: int) -> DataLoader:
    """Return a loader of normalised images and labels."""
    data = torchvision.datasets.MNIST(root, train=train, download=True)
    images = (data.data[:, None].float() / 255 - 0.1307) / 0.3081
    samples = TensorDataset(images, data.targets)
    order = RandomSampler(samples) if train else range(len(samples))
    return DataLoader(
        samples, sampler=BatchSampler(order, batch_size, drop_last=train), batch_size=None
    )


def train_epoch(
    model: nn.Module, loader: DataLoader, optimizer: Adam, scheduler: OneCycleLR
) -> float:
    """Train for one pass over the loader and return the mean loss."""
    model.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Return the share of images that the model classifies right, in percent."""
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return 100 * right / len(loader.dataset)


def main() -> None:
    """Train, and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--guided-epochs", type=int, default=15)
    parser.add_argument("--budget", default="0.6%")
    parser.add_argument("--learn-input-bits", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    train_loader = load(arguments.data_root, train=True, batch_size=128)
    test_loader = load(arguments.data_root, train=False, batch_size=1000)

    model = LeNet5()
    optimizer = Adam(model.parameters())
    scheduler = OneCycleLR(optimizer, 2e-3, arguments.epochs * len(train_loader))
    for epoch in range(arguments.epochs):
        loss = train_epoch(model, train_loader, optimizer, scheduler)
        print(f"float epoch {epoch + 1}: loss {loss:.4f}", flush=True)
    print(f"float: test accuracy {accuracy(model, test_loader):.2f} %")

    options = {"learn_input_bits": arguments.learn_input_bits, "widths": arguments.widths}
    prepared = cgmq_fx.prepare(model, arguments.budget, **options)
    optimizer = Adam(prepared.parameters())
    steps = arguments.guided_epochs * len(train_loader)
    scheduler = OneCycleLR(optimizer, 2e-3, steps)
    cgmq_fx.attach(prepared, optimizer, total_steps=steps)
    for epoch in range(arguments.guided_epochs):
        loss = train_epoch(prepared, train_loader, optimizer, scheduler)
        print(f"guided epoch {epoch + 1}: loss {loss:.4f}", flush=True)
    fixed = cgmq_fx.lower(prepared)
    print(cgmq_fx.report(fixed))
    print(f"fixed: test accuracy {accuracy(fixed, test_loader):.2f} %")


if __name__ == "__main__":
    main()
