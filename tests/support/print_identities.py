"""Prints the identity of every model of the zoo, prepared: run in processes to be compared."""

import hashlib
import json
import sys
import warnings

import graph_zoo
from cgmq_fx.identity import identity
from cgmq_fx.prepare import prepare


def main() -> None:
    """Print a JSON object with a hash of each part of each identity."""
    warnings.simplefilter("ignore")
    found = {}
    for case in graph_zoo.ZOO:
        model, inputs = case.build()
        prepared = prepare(model, "100%", example_inputs=inputs, batch_axis=case.batch_axis)
        parts = identity(prepared)
        found[case.id] = {name: hashlib.sha256(x.encode()).hexdigest() for name, x in parts.items()}
        found[case.id]["addresses"] = " 0x" in "".join(parts.values())
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
