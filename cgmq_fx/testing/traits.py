"""The names of what generated models can have."""

from collections.abc import Mapping
from types import MappingProxyType

#: What a generated model can have, by name; strategies take these names.
TRAITS: Mapping[str, str] = MappingProxyType(
    {
        # Layers.
        "conv": "convolutions",
        "1d": "one spatial axis",
        "2d": "two spatial axes",
        "3d": "three spatial axes",
        "strided": "a convolution whose stride is not 1, maybe another one on each axis",
        "dilated": "a convolution whose dilation is not 1",
        "padding_mode": "a convolution that pads by reflection, replication or in a circle",
        "grouped": "a convolution with groups",
        "depthwise": "a convolution with one group for each input channel",
        "transposed": "a transposed convolution",
        "output_padding": "a transposed convolution with output_padding",
        "conv_bn": "a convolution, maybe transposed or grouped, and the batch norm of its output",
        "linear": "linear layers",
        "bilinear": "nn.Bilinear",
        "batch_norm": "batch norm, with unusual eps and momentum",
        "momentum_none": "batch norm whose running statistics are a cumulative average",
        "batch_statistics": "batch norm without running statistics",
        "no_affine": "a norm without weight and bias",
        "group_norm": "group norm",
        "layer_norm": "layer norm",
        "instance_norm": "instance norm",
        "dropout": "a dropout layer, maybe of whole channels, with unusual p",
        "functional_dropout": "F.dropout that follows self.training",
        "weight_norm": "a layer whose weight is parametrized by its norm and direction",
        "embedding": "an embedding of integers",
        "pooling": "a pooling layer or function",
        "activation": "an activation layer",
        # Structure.
        "residual": "a sum of a value and a function of it",
        "branching": "two branches of unequal depth, joined",
        "concat": "torch.cat",
        "gate": "a product of two branches",
        "chunk": "a split into chunks",
        "tied": "two layers with one weight",
        "reused": "a module called twice",
        "reused_shapes": "a module called twice, with different shapes",
        "dead_code": "a computation whose result nobody reads",
        "unused_parameter": "a parameter that nobody reads",
        "nested_module": "layers inside an nn.Sequential inside a module",
        # Calls.
        "functional": "layers called as functions, with parameters of the module",
        "function_call": "functions of torch without parameters",
        "method_call": "methods of tensors",
        "operator": "operators with constants, on both sides",
        "constants": "constants among positional and keyword arguments",
        "in_place": "in-place operations",
        "alias": "a tensor changed in place between two reads of a view of it",
        "buffer": "a buffer, read by the forward",
        "bare_parameter": "a parameter read by the forward",
        "shape_operation": "sizes used as numbers",
        "matmul": "products of two activations",
        "einsum": "torch.einsum",
        "reshape": "flatten, view, permute and their kin",
        # Attention and recurrence.
        "attention": "attention of any kind",
        "multihead_attention": "nn.MultiheadAttention",
        "scaled_attention": "F.scaled_dot_product_attention",
        "written_attention": "attention written as two products and a softmax",
        "transformer": "nn.TransformerEncoderLayer",
        "recurrent": "nn.LSTM or nn.GRU; only where asked for",
        # Inputs and outputs.
        "integer_input": "an input of integers",
        "two_inputs": "two positional inputs",
        "keyword_input": "an input given by keyword, with a default",
        "default_input": "an input with a default that is not given",
        "tuple_output": "a tuple of outputs",
        "dict_output": "a dict of outputs",
        "nested_output": "a list or dict in a dict or tuple of outputs",
        "namedtuple_output": "a named tuple of outputs",
        "dataclass_output": "a dataclass of outputs",
    }
)

#: Traits that occur only where they are asked for.
OPT_IN = frozenset({"recurrent"})
