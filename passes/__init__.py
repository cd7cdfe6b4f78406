"""Graph in, graph out: the passes that turn a float model into a quantized one."""

if __name__ != "cgmq_fx.passes":
    raise ImportError(f"import cgmq_fx.passes, not {__name__}")
