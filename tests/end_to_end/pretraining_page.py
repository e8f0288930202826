"""The tiny quickstart's models, with a decoder pretrained on a corpus in place of its own."""

from rag_mm.configs import quickstart

PRESETS = ("tiny",)


def get_config(preset: str) -> dict:
    """A few steps on rows of 512 tokens."""
    config = quickstart.get_config("tiny")
    decoder = config["decoder"]
    kept = ("seed", "world", "tokenizer", "retriever", "memory")
    return {name: config[name] for name in kept} | dict(
        stages=("tokenizer", "retriever", "memory", "pretraining"),
        pretraining=dict(
            corpora=(dict(path="corpus"),),
            model=decoder["model"],
            look_back=decoder["look_back"],
            optimizer=decoder["optimizer"],
            loop=dict(num_steps=20, log_every=10, checkpoint_every=10),
            sequences=dict(max_seq_len=512, max_text_len=24),
            masking=decoder["masking"],
            batch_size=2,
            num_held_out=16,
            num_watched=4,
        ),
    )
