"""RA-CM3 in miniature on pictures of your own: tokenizer, retriever, memory, neighbors, decoder.

    rag-mm train --config=configs/own_pictures.py --config.world.documents=pictures --workdir=runs/mine

`pictures` is a folder with captions.jsonl, or whatever else `rag-mm memory build --documents` reads. `small`
is the quickstart's models at the quickstart's 32 pixels; no figure of it has been measured, since nobody's
pictures ship with rag_mm. A few thousand pictures with captions that name what they show are the least from
which anything of use is learned. `tiny` shows that every stage runs, and nothing more.

A tenth of the documents is held out: never trained on, but in the memory when training is over. The scorer,
and with it `generation`, `evaluation` and `report`, needs the exact facts of emoji scenes, which your
pictures do not come with; what is measured is reconstruction (`psnr`), the retriever's recall on held-out
documents, and the decoder's loss on held-out documents with and without what they retrieve (`log.jsonl`).
"""

from rag_mm.configs import quickstart

PRESETS = ("small", "tiny")
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "decoder")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    config = quickstart.get_config({"small": "quick", "tiny": "tiny"}[preset])
    return dict(
        stages=STAGES,
        seed=0,
        world=dict(documents="", image_size=32, held_out_share=0.1),
        # Captions are longer and more varied than the quickstart's.
        tokenizer=config["tokenizer"] | dict(text_size=4096 if preset == "small" else 512),
        retriever=config["retriever"]
        | dict(splits=("common",), captions_per_image=1, max_text_len=40),
        memory=config["memory"],
        # Without classes there is nothing to calibrate on. The bound only keeps copies out: in a small
        # retriever's space the right documents are nearer than the papers' 0.9.
        neighbors=config["neighbors"]
        | dict(captions_per_image=2, max_similarity=0.98, min_same_class=0.0),
        decoder=config["decoder"]
        | dict(captions_per_image=2, max_text_len=40, mean_doc_text_len=24, full_caption_prob=1.0),
    )
