"""The quickstart's tokenizer and retriever, 240 steps each, and the stages between that and a decoder."""

from rag_mm.configs import quickstart

PRESETS = ("all", "tokenizer")
TRAINED = ("tokenizer", "retriever")


def get_config(preset: str) -> dict:
    config = quickstart.get_config("tiny")
    loop = dict(num_steps=240, log_every=10, checkpoint_every=20, guard=None)
    shrunk = {name: config[name] | dict(loop=loop) for name in TRAINED}
    shrunk["tokenizer"]["num_eval"] = 16
    stages = (*TRAINED, "memory", "neighbors") if preset == "all" else ("tokenizer",)
    return config | shrunk | dict(stages=stages)
