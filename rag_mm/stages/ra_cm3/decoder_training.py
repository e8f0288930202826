"""What the stages that train a decoder share: settings of model and loss, training itself, and its result."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, configuration, manifest_values
from rag_mm.core.errors import UserError
from rag_mm.data.sequences import Layout
from rag_mm.decode.tasks import Generator
from rag_mm.models import cm3, ra_cm3
from rag_mm.nn import lora, param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.ra_cm3.drawn_sequences import MaskingConfig
from rag_mm.stages.shared import coded_corpus, frozen, starting_point
from rag_mm.train import checkpoint, loop, optimizer

VOCAB_MULTIPLE = 128
# (step, the decoder as it is) -> metrics.
WatchGenerator = Callable[[int, Generator], dict[str, float]]


class Fitted(NamedTuple):
    """A trained decoder.

    Attributes:
        generator: the decoder, on the devices on which it was trained.
        train: the last logged metrics.
    """

    generator: Generator
    train: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTrainingConfig(starting_point.StartConfig):
    """Model, loss and training of a decoder.

    Attributes:
        seed: seed of the initial weights, the order of sequences and the random choices in each.
        model: a `DecoderConfig` without vocabulary size and length, which follow from the data.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        masking: which spans are moved to the end of a sequence.
        alpha: loss weight of the targets in retrieved documents (docs/papers/ra_cm3.md#loss); 1 in CM3Leon.
        sentinel_weight: loss weight of the targets that are sentinels; 0 as in CM3, 1 in CM3Leon.
        normalize_by: what the weighted sum of losses is divided by: main, the number of targets in main
            documents; or weights, the sum of all weights (CM3Leon).
        look_back: for each head or group of heads, the places that its keys are mixed from, as (rows up,
            codes to the left) in the image's grid, the finest of a pyramid: `model.smear_lags` for any grid.
            (0, 1) is also a text's previous token. Images of further sizes are looked at with the same lags.
        batch_size: rows of sequences per step.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    model: Mapping[str, Any] = dataclasses.field(
        metadata=configuration.part_of(
            DecoderConfig, ("vocab_size", "max_seq_len", "dtype", "remat", "context_dim")
        )
    )
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    alpha: float = 0.1
    sentinel_weight: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)
    normalize_by: str = dataclasses.field(default="main", metadata=manifest_values.ADDED_LATER)
    look_back: tuple[tuple[tuple[int, int], ...], ...] = dataclasses.field(
        default=(), metadata=manifest_values.ADDED_LATER
    )
    batch_size: int = 32
    scale: scaling.DecoderScaleConfig = dataclasses.field(
        default_factory=scaling.DecoderScaleConfig
    )

    def __post_init__(self):
        super().__post_init__()
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 0, "alpha", "sentinel_weight")
        checks.one_of(self, "normalize_by", cm3.NORMALIZE_BY)
        sizes = dict(vocab_size=VOCAB_MULTIPLE, max_seq_len=1)
        shape = configuration.make(DecoderConfig, {**sizes, **self.model}, "model")
        if self.look_back and shape.smear_lags:
            raise ValueError("look_back and model.smear_lags say the same; give one of them")
        if shape.head_dim is None and shape.embed_dim % shape.num_heads:
            raise ValueError(
                f"model.num_heads is {shape.num_heads}, which does not divide embed_dim={shape.embed_dim}"
            )
        # As many entries as heads or groups of heads; in a grid wide enough for any place.
        _ = dataclasses.replace(shape, smear_lags=self.smear_lags(64)).block

    def smear_lags(self, columns: int) -> tuple[tuple[int, ...], ...]:
        """`look_back` as lags in tokens, for a grid of `columns` columns.

        Raises:
            UserError: a place is not before the token.
        """
        lags = tuple(
            tuple(rows * columns + left for rows, left in places) for places in self.look_back
        )
        if min((lag for places in lags for lag in places), default=1) < 1:
            raise UserError(
                f"look_back is {self.look_back}; give places before the token in a grid of {columns} columns."
            )
        return lags


def make_mesh(config: DecoderTrainingConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def fit(
    config: DecoderTrainingConfig,
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    layout: Layout,
    batches: grain.DatasetIterator[dict[str, np.ndarray]],
    watch: WatchGenerator,
    shown: Iterable[str],
) -> Fitted:
    """Trains a decoder and writes it to `stage_dir`.

    Args:
        config: model, loss and training.
        stage_dir: receives checkpoints and logs, then params and decoder.json.
        image_tokenizer: of the codes, with its vocabulary.
        layout: of the sequences.
        batches: rows of sequences; of several processes, each makes its own.
        watch: metrics at every checkpoint.
        shown: null prompts (`decode.guidance`) that training shows.

    Raises:
        UserError: `watch` ends the training.
        FloatingPointError: the loss is not finite.
    """
    model_config = make_model_config(config, image_tokenizer, layout)
    make_model = partial(decoder_record.make_model, model_config, config.seed)
    make_trained = config.extend(make_model, config.seed)
    graphdef, abstract = param_trees.describe(make_trained, None)
    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make_trained,
        lora.with_dropout(partial(ra_cm3.loss_fn, config=model_config)),
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=make_mesh(config),
        num_parts=config.scale.num_parts,
        start=config.start(stage_dir.parent),
        what=config.what_trains(abstract),
        watch=lambda step, params: watch(
            step, make_generator(frozen.LoadedModel(graphdef, params), image_tokenizer, layout)
        ),
    )
    params = config.merge(params)
    checkpoint.save_params(stage_dir / "params", params)
    if multiprocess.is_leader():
        decoder_record.write(stage_dir, image_tokenizer, layout, model_config, shown)
    merged = frozen.LoadedModel(param_trees.describe(make_model, None)[0], params)
    generator = make_generator(merged, image_tokenizer, layout, shown)
    return Fitted(generator, {k: v for k, v in log[-1].items() if k != "step"})


def make_generator(
    loaded: frozen.LoadedModel,
    image_tokenizer: frozen.FrozenTokenizer,
    layout: Layout,
    shown: Iterable[str] = (),
) -> Generator:
    """A decoder with the vocabulary and layout of its sequences, and the null prompts that it knows."""
    vocabulary = image_tokenizer.vocabulary
    num_codes_at = {
        size: coded_corpus.num_codes_at(image_tokenizer, size) for size in vocabulary.image_sizes
    }
    return Generator(
        loaded.graphdef, loaded.params, vocabulary, layout, num_codes_at, frozenset(shown)
    )


def make_model_config(
    config: DecoderTrainingConfig, image_tokenizer: frozen.FrozenTokenizer, layout: Layout
) -> ra_cm3.RACM3Config:
    """The model's config: the vocabulary size is rounded up, and all positions of the layout are covered."""
    vocabulary = image_tokenizer.vocabulary
    vocab_size = -(-vocabulary.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    lags = config.smear_lags(image_tokenizer.grids[-1][1])
    model = dict(config.model) | ({"smear_lags": lags} if lags else {})
    model |= {"dtype": config.scale.dtype, "remat": config.scale.remat}
    shape = DecoderConfig(vocab_size=vocab_size, max_seq_len=layout.num_positions, **model)
    return ra_cm3.RACM3Config(
        shape,
        vocabulary.code_offset,
        config.alpha,
        config.scale.loss_chunks,
        sentinel_weight=config.sentinel_weight,
        normalize_by=config.normalize_by,
    )
