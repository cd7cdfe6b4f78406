"""A tiny BERT with random weights, trained to a budget by Hugging Face's Trainer.

It learns whether a sequence has more tokens of one half of the vocabulary; nothing is downloaded.
pip install 'cgmq-fx[transformers]'; python examples/transformers_majority.py --budget 3%
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import cgmq_fx
from torchvision_shim import torchvision  # transformers imports it where it is installed

assert torchvision
import transformers  # noqa: E402

from cgmq_fx.integrations.transformers import QuantizationCallback  # noqa: E402

VOCABULARY, LENGTH = 32, 9


class Majority(Dataset):
    """Sequences of tokens, and whether most of them are of the upper half."""

    def __init__(self, number: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCABULARY, (number, LENGTH), generator=generator)
        self.labels = ((self.tokens >= VOCABULARY // 2).sum(1) > LENGTH // 2).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def network() -> Any:
    """Return a BERT of one layer."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross entropy."""
    return F.cross_entropy(outputs.logits, labels)


def trainer_of(prepared: Any, folder: str, steps: int, callback: Any) -> Any:
    """Return a trainer that saves now and then."""
    settings = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-3,
        label_names=["labels"], save_steps=max(1, steps // 2), logging_steps=50, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(
        prepared,
        settings,
        train_dataset=Majority(2048, 1),
        compute_loss_func=loss,
        callbacks=[callback],
    )


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print the report and return the accuracy of the lowered module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="3%")
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    test = Majority(512, 2)
    example = {"input_ids": test.tokens[:2]}
    prepared = cgmq_fx.prepare(network(), chosen.budget, example_inputs=example)
    quantization = QuantizationCallback(log_bit_widths=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(prepared, folder, chosen.steps, quantization).train()
    fixed = quantization.fixed
    print(cgmq_fx.report(fixed))
    logits = fixed(input_ids=test.tokens).logits
    accuracy = float((logits.argmax(1) == test.labels).float().mean())
    print(f"accuracy on {len(test)} other sequences: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
