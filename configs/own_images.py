"""RA-CM3 in miniature on your own images: tokenizer, retriever, memory, neighbors, decoder.

    rag-mm train --config=configs/own_images.py --config.world.documents=FOLDER --workdir=runs/mine

FOLDER has images and captions.jsonl, or is anything else that `rag-mm memory build --documents` reads.

    preset  cost on two cores                        what to expect
    small   as the quickstart's `quick`, by dataset  no figures are claimed; a few thousand images whose
                                                     captions name what they show are the least to learn from
    tiny    a few minutes                            runs every stage, learns nothing

A tenth of the documents is held out: never trained on, but in the memory after training. What is measured
is reconstruction (`psnr`), the retriever's recall on held-out documents, and the decoder's loss on held-out
documents with and without retrieval (`log.jsonl`). The scorer, and with it `generation`, `evaluation` and
`report`, needs the exact facts of emoji scenes.
"""

from rag_mm.configs import quickstart

PRESETS = ("small", "tiny")
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "decoder")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    config = quickstart.get_config({"small": "quick", "tiny": "tiny"}[preset])
    decoder = config["decoder"]
    return dict(
        stages=STAGES,
        seed=0,
        world=dict(documents=""),
        # Captions are longer and more varied than the quickstart's.
        tokenizer=config["tokenizer"]
        | dict(text=dict(vocab_size=4096 if preset == "small" else 512)),
        retriever=config["retriever"]
        | dict(
            model=config["retriever"].get("model", {}) | dict(max_text_len=40),
            splits=("common",),
            captions_per_image=1,
        ),
        memory=config.get("memory", {}),
        # The bound on similarity only keeps copies out: in a small retriever's space the right documents are
        # nearer than the 0.9 of RA-CM3.
        neighbors=config["neighbors"]
        | dict(captions_per_image=2, max_similarity=0.98, min_same_class=0.0),
        decoder=decoder
        | dict(
            sequences=decoder["sequences"]
            | dict(
                captions_per_image=2, max_text_len=40, mean_doc_text_len=24, full_caption_prob=1.0
            )
        ),
    )
