"""Hugging Face transformers architectures for the sweep, from tiny configurations.

    pip install 'transformers==5.23.0'

Nothing is downloaded: a configuration is written out here, and weights are random numbers. The list
was fixed before any of its models was prepared: 30 architectures by how much they are used and how
much they differ, over text, vision and audio, as encoders, decoders and both, each with the head
that people train. A miss stays in the list.

Two settings are not the defaults, because they are decided per step by Python's or numpy's random
numbers or are for generation alone: layer drop and SpecAugment are off, and no key-value cache is
returned (``use_cache=False``, as a training loop has it).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sweep_models import fill
from sweep_runner import Subject
from torch import Tensor, nn

from torchvision_shim import torchvision  # transformers imports it where it is installed

assert torchvision
import transformers  # noqa: E402

GROUP = "transformers"
RULES = (
    "Thirty architectures from tiny configurations (two layers, 32 channels, 99 tokens), a list "
    "fixed before any of them was prepared. Layer drop, SpecAugment and the key-value cache are "
    "off; every attention mask has padding. 'family' says what a model reads and which halves it "
    "has."
)
VOCABULARY = 99
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
_DECODER = _TEXT | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "use_cache": False,
}  # fmt: skip
_GROUPED = _DECODER | {"num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ = _TEXT | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": 40, "use_cache": False, "decoder_start_token_id": 2,
}  # fmt: skip
_VISION = {
    "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_WAVE = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One model of the sweep.

    Attributes:
        name: of the row.
        model_class: its class in `transformers`; its configuration is the class's own.
        config: keyword arguments of the configuration.
        kind: text, vision or audio; encoder, decoder or both.
        inputs: the keyword inputs, each with the shape of one sample.
    """

    name: str
    model_class: str
    kind: str
    inputs: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]


_IDS = {"input_ids": (12,), "attention_mask": (12,)}
_BOTH = _IDS | {"decoder_input_ids": (7,)}
_PIXELS = {"pixel_values": (3, 32, 32)}
_SOUND = {"input_values": (400,)}
_ENCODER, _CAUSAL, _FULL = "text, encoder", "text, decoder", "text, encoder and decoder"
_IMAGE, _AUDIO = "vision, encoder", "audio, encoder"

ARCHITECTURES = (
    Architecture(
        "bert", "BertForSequenceClassification", _ENCODER, _IDS | {"token_type_ids": (12,)}, _BERT
    ),
    Architecture("roberta", "RobertaForMaskedLM", _ENCODER, _IDS, _BERT | {"pad_token_id": 0}),
    Architecture(
        "distilbert",
        "DistilBertForTokenClassification",
        _ENCODER,
        _IDS,
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    Architecture(
        "albert",
        "AlbertForSequenceClassification",
        _ENCODER,
        _IDS,
        _BERT | {"embedding_size": 16},
    ),
    Architecture("electra", "ElectraForQuestionAnswering", _ENCODER, _IDS, _BERT),
    Architecture(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        _ENCODER,
        _IDS,
        _BERT
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    Architecture("mpnet", "MPNetForSequenceClassification", _ENCODER, _IDS, _BERT),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        _CAUSAL,
        _IDS,
        _TEXT | {"n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", _CAUSAL, _IDS, _DECODER),
    Architecture(
        "opt",
        "OPTForCausalLM",
        _CAUSAL,
        _IDS,
        _DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    Architecture("llama", "LlamaForCausalLM", _CAUSAL, _IDS, _GROUPED),
    Architecture("qwen3", "Qwen3ForCausalLM", _CAUSAL, _IDS, _GROUPED),
    Architecture("gemma", "GemmaForCausalLM", _CAUSAL, _IDS, _GROUPED),
    Architecture("phi", "PhiForCausalLM", _CAUSAL, _IDS, _DECODER),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        _CAUSAL,
        _IDS,
        _TEXT | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    Architecture(
        "mamba",
        "MambaForCausalLM",
        _CAUSAL,
        {"input_ids": (12,)},
        _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        _FULL,
        _BOTH,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
    ),
    Architecture("bart", "BartForConditionalGeneration", _FULL, _BOTH, _SEQ2SEQ),
    Architecture("pegasus", "PegasusForConditionalGeneration", _FULL, _BOTH, _SEQ2SEQ),
    Architecture("vit", "ViTForImageClassification", _IMAGE, _PIXELS, _VISION),
    Architecture(
        "swin",
        "SwinForImageClassification",
        _IMAGE,
        _PIXELS,
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    Architecture(
        "convnext",
        "ConvNextForImageClassification",
        _IMAGE,
        _PIXELS,
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.5},
    ),
    Architecture(
        "segformer",
        "SegformerForSemanticSegmentation",
        _IMAGE,
        _PIXELS,
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 16, 32, 32],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 32,
        },
    ),
    Architecture(
        "beit",
        "BeitForImageClassification",
        _IMAGE,
        _PIXELS,
        _VISION | {"use_relative_position_bias": True},
    ),
    Architecture("dinov2", "Dinov2ForImageClassification", _IMAGE, _PIXELS, _VISION),
    Architecture(
        "clip",
        "CLIPModel",
        "text and vision, encoders",
        _IDS | _PIXELS,
        {
            "text_config": _BERT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            "vision_config": _VISION,
            "projection_dim": 24,
        },
    ),
    Architecture("wav2vec2", "Wav2Vec2ForCTC", _AUDIO, _SOUND, _WAVE),
    Architecture("hubert", "HubertForCTC", _AUDIO, _SOUND, _WAVE),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "audio, encoder and decoder",
        {"input_features": (16, 40), "decoder_input_ids": (7,)},
        _SEQ2SEQ
        | {
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 40,
            "apply_spec_augment": False,
        },
    ),
    Architecture(
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        _AUDIO,
        {"input_values": (48, 16)},
        _VISION | {"max_length": 48, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
)


def subjects() -> list[Subject]:
    """Return the list as the sweep takes it."""
    return [
        Subject(
            found.name, GROUP, found.kind, partial(build, found.name), partial(_pair, found.name)
        )
        for found in ARCHITECTURES
    ]


def _pair(name: str, _: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return example_inputs(name, 1), example_inputs(name, 2)


def architecture(name: str) -> Architecture:
    """Return the architecture of that name."""
    return next(found for found in ARCHITECTURES if found.name == name)


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model with random weights."""
    wanted = architecture(name)
    model_class = getattr(transformers, wanted.model_class)
    config = model_class.config_class(**wanted.config)
    torch.manual_seed(seed)
    model: nn.Module = model_class(config)
    fill(model, torch.Generator().manual_seed(seed))
    return model


def example_inputs(name: str, batch: int, seed: int = 1) -> dict[str, Tensor]:
    """Return keyword inputs: token ids, a mask with padding, normalised pixels, sound."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: _input(key, (batch, *shape), generator)
        for key, shape in architecture(name).inputs.items()
    }


def _input(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if key == "attention_mask":
        # Without padding, transformers takes another attention kernel, by looking at the data.
        return (torch.arange(shape[1]) < shape[1] - 2).long().expand(shape).clone()
    if key == "token_type_ids":
        return torch.randint(0, 2, shape, generator=generator)
    if key.endswith("_ids"):
        return torch.randint(3, VOCABULARY, shape, generator=generator)
    return torch.randn(shape, generator=generator)
