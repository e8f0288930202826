"""The quickstart's training stages, four steps each, in batches that split over eight devices."""

from rag_mm.configs import quickstart

PRESETS = ("all", "tokenizer", "long")
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "decoder", "control")


def get_config(preset: str) -> dict:
    config = quickstart.get_config("tiny")
    loop = dict(num_steps=4, log_every=2, checkpoint_every=2, guard=None)
    shrunk = {
        name: config[name] | dict(loop=loop) for name in ("tokenizer", "retriever", "decoder")
    }
    shrunk["tokenizer"]["num_eval"] = 16
    # One kind of batch, because each is a program to compile.
    shrunk["decoder"]["sequences"] = config["decoder"]["sequences"] | dict(
        num_docs_weights=(0.0, 0.0, 1.0)
    )
    if preset == "all":
        return config | shrunk | dict(stages=STAGES)
    if preset == "long":  # Enough steps to be ended in the middle of them.
        shrunk["tokenizer"]["loop"] = loop | dict(num_steps=60)
    return config | shrunk | dict(stages=("tokenizer",))
