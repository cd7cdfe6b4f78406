"""Arguments that several commands take."""

import argparse

MODEL_HELP = (
    "module:callable, which returns an nn.Module, or module:attribute, which is one; it is "
    "imported, so give only code that you trust"
)


def add_input_shapes(command: argparse.ArgumentParser) -> None:
    """Add ``--input-shape``: pairs of dtype and shape, in ``shapes``."""
    command.add_argument(
        "--input-shape",
        required=True,
        action="append",
        type=shape,
        dest="shapes",
        metavar="SHAPE",
        help="shape of an input, with the batch first, such as 1,3,32,32 or, for indices, "
        "int64:1,16; once for each input",
    )


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the sizes in a text such as ``1,3,32,32`` or ``int64:1,16``."""
    kind, _, sizes = text.rpartition(":")
    parts = [part.strip() for part in sizes.split(",")]
    if kind not in ("", "float32", "int64") or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,32,32 or int64:1,16")
    return kind or "float32", tuple(int(part) for part in parts)


def width(text: str) -> int:
    """Return the bit-width in a text."""
    if not (text.isascii() and text.isdecimal()) or int(text) not in (*range(2, 17), 32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a bit-width from 0 to 16, or 32")
    return int(text)
