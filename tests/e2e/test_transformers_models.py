"""Two architectures of Hugging Face's transformers with random weights, from keyword inputs."""

import pytest
import torch

from cgmq_fx.prepare import prepare
from torchvision_shim import torchvision  # transformers imports it where it is installed

assert torchvision
pytestmark = pytest.mark.slow

TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def bert(transformers):
    config = transformers.BertConfig(**TINY)
    return transformers.BertForSequenceClassification(config)


def llama(transformers):
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def batch(size):
    mask = torch.ones(size, 8, dtype=torch.int64)
    mask[:, -2:] = 0
    return {"input_ids": torch.arange(8 * size).reshape(size, 8), "attention_mask": mask}


@pytest.mark.parametrize("build", [bert, llama])
def test_it_computes_what_the_model_does_and_has_its_products_priced(transformers, build):
    torch.manual_seed(0)
    model = build(transformers)
    prepared = prepare(model, "20%", example_inputs=batch(1))
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    for training in (False, True):
        outputs = []
        for module in (model, prepared):
            torch.manual_seed(0)
            outputs.append(module.train(training)(**batch(3)))
        assert type(outputs[0]) is type(outputs[1])
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert prepared.state_dict().keys() >= model.state_dict().keys()
    ledger = prepared.plan.accounting.ledger
    # Four projections of the attention and at least two of the feed-forward part.
    assert sum(entry.op == "linear" and entry.status == "quantized" for entry in ledger) >= 6
    assert all(entry.status == "quantized" for entry in ledger if entry.macs)
