"""The test scenes on which ways of decoding are compared, and what scores their images."""

import dataclasses

import numpy as np

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.decode import guidance, tasks
from rag_mm.eval import over_reliance, scene_accuracy
from rag_mm.stages.cm3leon.decoding_settings import DecodingSetting, DecodingStageConfig, settings
from rag_mm.stages.ra_cm3 import generate_samples, train_decoder
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    find_neighbors,
    frozen,
    train_retriever,
    train_tokenizer,
    world_config,
)
from rag_mm.worlds.emoji import emoji_scenes, scene_facts

SPLIT = "held_out"


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingScenes:
    """Q test scenes of held-out classes, with the models that draw and score them.

    Attributes:
        generator: the decoder.
        image_tokenizer: its image tokenizer.
        encoder: the retriever.
        facts: facts of the scenes.
        levels: their levels.
        images: uint8 [Q, H, W, 3].
        captions: full captions.
        texts: their token ids.
        docs: the documents that the captions retrieve, best last.
        facts_of_docs: facts of these documents.
        queries: the retriever's embeddings of the captions, float32 [Q, D].
    """

    generator: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    facts: list[emoji_scenes.Facts]
    levels: list[emoji_scenes.Level]
    images: np.ndarray
    captions: list[str]
    texts: list[token_documents.Ids]
    docs: list[tasks.Docs]
    facts_of_docs: list[list[emoji_scenes.Facts]]
    queries: np.ndarray

    def draw(
        self, setting: DecodingSetting, seeds: np.ndarray, batch_size: int | None = None
    ) -> tasks.SampledCodes:
        """The images of the first scenes with a setting, one for each of the seeds uint32 [B]."""
        return tasks.generate_codes(
            self.generator,
            self.texts[: len(seeds)],
            self.docs[: len(seeds)],
            seeds,
            setting.sampling,
            batch_size,
            steering=setting.steering,
            decoding=setting.decoding,
        )

    def score(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """What images of codes int32 [Q, N] show, one value per scene.

        Returns:
            `entity`, `place`, `color` and `joint`, whether the scorer finds them right, 0 or 1; `similarity`,
            the retriever's cosine to the caption; `copied_place`, `copied_color` and `copied_whole`
            (`eval.over_reliance`), if there are documents.
        """
        images = self.image_tokenizer.decode(codes)
        read = scene_facts.read(images, self.levels)
        outcomes = scene_accuracy.outcomes(read, self.facts, self.levels[0])
        values = {name: right.astype(np.float64) for name, right in outcomes.items()}
        similarity = (self.encoder.encode_image(images) * self.queries).sum(axis=1)
        values["similarity"] = similarity.astype(np.float64)
        if not any(self.docs):
            return values
        return values | over_reliance.per_document(self._copied(read, codes))

    def num_copyable(self) -> dict[str, int]:
        """The number of scenes whose documents all differ from the caption, by what may be copied."""
        blank = np.full((len(self.facts), self.generator.num_codes()), -1)
        copied = self._copied(self.facts, blank)
        return {name: int(each.is_eligible.sum()) for name, each in copied.items()}

    def _copied(
        self, read: list[emoji_scenes.Facts], codes: np.ndarray
    ) -> dict[str, over_reliance.Copied]:
        return over_reliance.measure(
            read,
            self.facts,
            self.facts_of_docs,
            self.levels[0],
            codes,
            [[doc.codes for doc in docs] for docs in self.docs],
        )


def open_scenes(config: DecodingStageConfig, run: run_folder.Run) -> DecodingScenes:
    """Loads the models and test scenes of a run.

    Raises:
        UserError: a stage is missing, unfinished or edited, the decoder reads fewer documents than
            `num_docs`, or it never saw a null prompt of the config.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, "decoder", image_tokenizer)
    if config.num_docs > generator.layout.max_docs:
        raise UserError(
            f"decoding.num_docs is {config.num_docs}, but the decoder reads at most "
            f"{generator.layout.max_docs} documents."
        )
    if config.shows_unseen_nulls:
        generator = dataclasses.replace(generator, null_prompts=frozenset(guidance.NULLS))
    for setting in settings(config):
        if setting.steering is not None:
            streams = setting.steering.streams
            read = [guidance.null_read(stream, config.num_docs > 0) for stream in streams]
            guidance.check_shown(read, generator.null_prompts)
    corpus = coded_corpus.Corpus(generator.layout, image_tokenizer)
    memory = corpus.memory(build_memory.open_memory(run))
    encoder = train_retriever.load_encoder(run.workdir)
    source = config.world.scenes("test", *find_neighbors.TEST_SPLITS[SPLIT])
    arrays = generate_samples.load_neighbors(run, SPLIT, config.num_scenes)
    tested = [int(row) for row in arrays["rows"]]
    hits = arrays["text"][:, : config.num_docs]
    rows = [[int(row) for row in each[::-1] if row >= 0] for each in hits]
    memory_facts = find_neighbors.memory_facts(config.world)
    captions = [source.full_caption(row) for row in tested]
    no_image = np.zeros(generator.layout.num_codes, np.int32)
    return DecodingScenes(
        generator,
        image_tokenizer,
        encoder,
        facts=[source.facts(row) for row in tested],
        levels=[source.levels[row] for row in tested],
        images=world_config.images(source, arrays["rows"]),
        captions=captions,
        texts=[corpus.example(caption, no_image).text for caption in captions],
        docs=[coded_corpus.pick(memory, each) for each in hits],
        facts_of_docs=[[memory_facts[row] for row in each] for each in rows],
        queries=encoder.encode_text(captions),
    )
