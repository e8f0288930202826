"""Stage `sft`: tunes a trained decoder on instructions about scenes (CM3Leon, section 4).

It starts from the run's `decoder` with the same loss and layout, and trains on a mixture of tasks with a
decaying rate, the whole decoder or updates of low rank. Then every task is measured on test classes, before
and after.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, manifest_values, run_folder, sharding
from rag_mm.data import instruction_items, instruction_mixing, instruction_templates
from rag_mm.decode import guidance
from rag_mm.decode.sampler import Sampling
from rag_mm.models import ra_cm3
from rag_mm.nn import param_trees
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.cm3leon import measure_tasks, scene_examples, scene_instructions
from rag_mm.stages.cm3leon.instruction_sequences import InstructionSource
from rag_mm.stages.cm3leon.scene_instructions import TEXT_TO_IMAGE
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.shared import (
    coded_corpus,
    frozen,
    starting_point,
    train_tokenizer,
    world_config,
)
from rag_mm.train import checkpoint, loop, optimizer

INPUTS = ("tokenizer", "memory", "neighbors")


@dataclasses.dataclass(frozen=True)
class TuningStageConfig(starting_point.StartConfig):
    """The mixture of tasks, and how a decoder is tuned on it.

    Attributes:
        start_from: the stage of the run whose decoder is tuned.
        seed: seed of the examples, their order and the random choices in each.
        world: world of the scenes.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        tasks: number of examples of each task, by its name (docs/papers/cm3leon.md); scenes are asked about
            again where there are fewer of them.
        mixing: capped, all tasks as often, but none repeated more than `max_repeats` times or cut below
            `min_repeats`; or proportional to the numbers of examples.
        max_repeats: upper threshold of capped mixing.
        min_repeats: lower threshold of capped mixing.
        text_to_image_share: least share of plain text to image, the task `text_to_image`; without it that is
            lost.
        num_docs_weights: relative frequencies of text to image with 0, 1, .. retrieved documents.
        text_mask_prob: probability of masking the whole main text where a picture is asked for.
        code_noise: probability of replacing an input code of a picture that is asked for.
        mean_doc_text_len: tokens reserved per text of a retrieved document, in slots.
        batch_size: sequences, or packed rows, per step.
        num_test: test scenes of held-out classes on which each task is measured; 0 measures none.
        also_measured: tasks that are measured beside those that are trained, as where text to image is left
            out.
        temperature: sampling temperature of image codes in the measurement; answers are the likeliest ones.
        scale: devices, precision, and what is computed in parts.
    """

    start_from: str | None = dataclasses.field(
        default="decoder", kw_only=True, metadata=manifest_values.ADDED_LATER
    )
    seed: int
    world: world_config.EmojiWorld
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    tasks: Mapping[str, int]
    mixing: str = instruction_mixing.CAPPED
    max_repeats: float = instruction_mixing.MOST
    min_repeats: float = instruction_mixing.LEAST
    text_to_image_share: float = 0.2
    num_docs_weights: tuple[float, ...] = (0.2, 0.4, 0.4)
    text_mask_prob: float = 0.15
    code_noise: float = 0.1
    mean_doc_text_len: int = 8
    batch_size: int = 16
    num_test: int = 128
    also_measured: tuple[str, ...] = ()
    temperature: float = 0.4
    scale: scaling.DecoderScaleConfig = dataclasses.field(
        default_factory=scaling.DecoderScaleConfig
    )

    def __post_init__(self):
        super().__post_init__()
        training.check_config(self.optimizer, self.loop, self.batch_size)
        if self.start_stage is None:
            raise ValueError(
                f"start_from is {self.start_from!r}; name a stage of the run that trains a decoder"
            )
        for name in (*self.tasks, *self.also_measured):
            scene_instructions.find(name)
        checks.between(self, 0, 1, "text_mask_prob", "code_noise")
        checks.below_one(self, "text_to_image_share")
        checks.at_least(self, 0, "mean_doc_text_len", "num_test")
        if self.num_test == 1:
            raise ValueError("num_test is 1; a confidence interval needs 2, and 0 measures nothing")
        if min(self.num_docs_weights, default=0) < 0 or not sum(self.num_docs_weights):
            raise ValueError(
                f"num_docs_weights are {self.num_docs_weights}; give at least 0, not all 0"
            )
        if self.text_to_image_share and TEXT_TO_IMAGE not in self.tasks:
            raise ValueError(
                f"text_to_image_share is {self.text_to_image_share}, but {TEXT_TO_IMAGE} is no task; "
                "add it, or set the share to 0"
            )
        Sampling(self.temperature)
        _ = self.shares

    @property
    def shares(self) -> dict[str, float]:
        """The share of each task among the sequences, in sum 1."""
        given = instruction_mixing.shares(
            self.tasks, self.mixing, self.max_repeats, self.min_repeats
        )
        if not self.text_to_image_share:
            return given
        return instruction_mixing.with_at_least(given, TEXT_TO_IMAGE, self.text_to_image_share)

    @property
    def null_prompts(self) -> list[str]:
        """The null prompts (`decode.guidance`) that occur among the sequences."""
        lacks_docs = TEXT_TO_IMAGE in self.tasks and self.num_docs_weights[0] > 0
        occurs = {
            guidance.DOCUMENTS: self.text_mask_prob > 0,
            guidance.BARE: self.text_mask_prob > 0 and lacks_docs,
            guidance.CAPTION: lacks_docs,
        }
        return [null for null in guidance.NULLS if occurs[null]]


def make_mesh(config: TuningStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: TuningStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Tunes the decoder and measures the tasks.

    Returns:
        `train`, the last logged metrics; `shares` of the tasks; `tokens`, the number trained on, within a
        batch; and those of `measure_tasks.measure`. {} in followers.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    start = run.finished_stage(config.start_stage or "")
    record = decoder_record.read(start, image_tokenizer)
    corpus = coded_corpus.Corpus(record.layout, image_tokenizer)
    source = make_source(config, run, corpus)
    train = _fit(config, stage_dir, image_tokenizer, record.model, source)
    if not multiprocess.is_leader():
        return {}
    tokens = round(config.loop.num_steps * config.batch_size * source.mean_length)
    result = {"train": train, "shares": config.shares, "tokens": tokens}
    if not config.num_test:
        return result
    measured = (*config.tasks, *config.also_measured)
    return result | measure_tasks.measure(
        measure_tasks.AskedScenes(run, config.world, image_tokenizer, config.num_test),
        {"untuned": start, "tuned": stage_dir},
        [scene_instructions.find(name) for name in dict.fromkeys(measured)],
        stage_dir,
        Sampling(config.temperature),
        config.seed,
    )


def make_source(
    config: TuningStageConfig, run: run_folder.Run, corpus: coded_corpus.Corpus
) -> InstructionSource:
    """The training sequences of all tasks; raises as `scene_examples.make_examples` does."""
    layout, vocabulary = corpus.layout, corpus.image_tokenizer.vocabulary
    scenes = scene_examples.open_scenes(run, config.world, corpus, config.seed)
    tasks = scene_examples.make_examples(
        scenes, config.tasks, config.shares, config.num_docs_weights
    )
    # In slots the texts of given pictures have to fit where those of documents do.
    given = [
        instruction_items.word(vocabulary, text, data.items[0].fields, layout.max_text_len).ids
        for name, data in tasks.items()
        for template in instruction_templates.TEMPLATES[name]
        for text in template.given
    ]
    return InstructionSource(
        tasks,
        scenes.memory,
        layout,
        vocabulary,
        config.text_mask_prob,
        config.code_noise,
        max([config.mean_doc_text_len, *map(len, given)]),
    )


def _fit(
    config: TuningStageConfig,
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    started: ra_cm3.RACM3Config,
    source: InstructionSource,
) -> dict[str, float]:
    """Trains, and writes what `train_decoder.load_generator` loads; returns the last logged metrics."""
    mesh, scale = make_mesh(config), config.scale
    shape = dataclasses.replace(started.decoder, dtype=scale.dtype, remat=scale.remat)
    model = dataclasses.replace(started, decoder=shape, loss_chunks=scale.loss_chunks)
    make_model = config.extend(partial(decoder_record.make_model, model, config.seed), config.seed)
    _, abstract = param_trees.describe(make_model, None)
    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make_model,
        partial(ra_cm3.loss_fn, config=model),
        source.batches(
            config.batch_size,
            config.seed,
            sharding.local_rows(config.batch_size, mesh),
            scale.num_workers,
        ),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=scale.num_parts,
        start=config.start(stage_dir.parent),
        what=config.what_trains(abstract),
    )
    checkpoint.save_params(stage_dir / "params", config.merge(params))
    if not multiprocess.is_leader():
        return {}
    decoder_record.write(stage_dir, image_tokenizer, source.layout, model, config.null_prompts)
    return {name: value for name, value in log[-1].items() if name != "step"}
