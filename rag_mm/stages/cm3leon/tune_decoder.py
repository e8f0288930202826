"""Stage `sft`: tunes a trained decoder on instructions about scenes (CM3Leon, section 4).

It starts from the run's `decoder` with the same loss and layout, and trains on a mixture of tasks with a
decaying rate, the whole decoder or updates of low rank. Then every task is measured on test classes, before
and after.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, manifest_values, run_folder, sharding
from rag_mm.data import instruction_files, instruction_mixing
from rag_mm.decode import guidance
from rag_mm.decode.sampler import Sampling
from rag_mm.models import ra_cm3
from rag_mm.nn import lora, param_trees
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.cm3leon import (
    edit_guidance,
    file_examples,
    instruction_sequences,
    measure_tasks,
    measure_tuning,
    scene_examples,
    scene_instructions,
    watch_tasks,
)
from rag_mm.stages.cm3leon.instruction_sequences import InstructionSource, TaskData
from rag_mm.stages.cm3leon.scene_instructions import TEXT_TO_IMAGE
from rag_mm.stages.ra_cm3 import decoder_record, decoder_training
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
        files: public instruction data that is added to the mixture, `LAYOUT:PATH` each (docs/own_data.md).
            Its items read no retrieved documents, and are not measured here, but by `rag-mm eval`.
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
        num_watched: test scenes of tune classes on which each task is measured at every checkpoint, by a
            single process; 0 measures none.
        also_measured: tasks that are measured beside those that are trained, as where text to image is left
            out.
        edit_weights: weights of picture and instruction with which test edits are drawn (`edit_guidance`);
            (1, 1), plain sampling, is among them. They need the null prompts of text to image without
            documents.
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
    files: tuple[str, ...] = dataclasses.field(default=(), metadata=manifest_values.ADDED_LATER)
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
    num_watched: int = dataclasses.field(default=0, metadata=manifest_values.ADDED_LATER)
    also_measured: tuple[str, ...] = ()
    edit_weights: tuple[tuple[float, float], ...] = dataclasses.field(
        default=edit_guidance.WEIGHTS, metadata=manifest_values.ADDED_LATER
    )
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
        checks.at_least(self, 0, "mean_doc_text_len", "num_test", "num_watched")
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
        object.__setattr__(self, "edit_weights", edit_guidance.checked(self.edit_weights))
        for spec in self.files:
            instruction_files.InstructionFiles(spec)
        if len(set(self.files)) < len(self.files):
            raise ValueError(f"files are {self.files}; name each once")
        _ = self.shares()

    def shares(self, file_sizes: Mapping[str, int] | None = None) -> dict[str, float]:
        """The share of each task among the sequences, in sum 1.

        Args:
            file_sizes: numbers of examples in `files`, which are known once they are read; None: leave these
                out.
        """
        given = instruction_mixing.shares(
            {**self.tasks, **(file_sizes or {})}, self.mixing, self.max_repeats, self.min_repeats
        )
        if not self.text_to_image_share:
            return given
        return instruction_mixing.with_at_least(given, TEXT_TO_IMAGE, self.text_to_image_share)

    @property
    def measured(self) -> list[str]:
        """The tasks that are measured."""
        return [*dict.fromkeys((*self.tasks, *self.also_measured))]

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
        `train`, the last logged metrics; `shares` of the tasks; `files`, what was read of them; `tokens`,
        the number trained on, within a batch; and those of `measure_tuning.Measurement.run`. {} in followers.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    start = run.finished_stage(config.start_stage or "")
    record = decoder_record.read(start, image_tokenizer)
    corpus = coded_corpus.Corpus(record.layout, image_tokenizer)
    read = file_examples.read(config.files, image_tokenizer, corpus.layout.max_docs)
    source = make_source(config, run, corpus, read)
    measured = [scene_instructions.find(name) for name in config.measured]
    watch = None
    if config.num_watched and not multiprocess.has_others():
        scenes = measure_tasks.AskedScenes(
            run, config.world, image_tokenizer, config.num_watched, watch_tasks.SPLIT
        )
        sampling = Sampling(config.temperature)
        watch = watch_tasks.TaskWatch(scenes, measured, sampling, config.seed)
    train = _fit(config, stage_dir, image_tokenizer, record.model, source, watch)
    if not multiprocess.is_leader():
        return {}
    tokens = round(config.loop.num_steps * config.batch_size * source.mean_length)
    shares = {name: data.share for name, data in source.tasks.items()}
    result = {"train": train, "shares": shares, "tokens": tokens}
    if read:
        result["files"] = file_examples.counts(read)
    if not config.num_test:
        return result
    can_guide = set(edit_guidance.NULLS) <= set(config.null_prompts)
    measurement = measure_tuning.Measurement(
        measure_tasks.AskedScenes(run, config.world, image_tokenizer, config.num_test),
        start,
        stage_dir,
        measured,
        Sampling(config.temperature),
        config.seed,
        config.edit_weights if can_guide else (),
    )
    return result | measurement.run()


def make_source(
    config: TuningStageConfig,
    run: run_folder.Run,
    corpus: coded_corpus.Corpus,
    read: Mapping[str, file_examples.FileExamples],
) -> InstructionSource:
    """The training sequences of all tasks, and of the files as read.

    Raises as `scene_examples.make_examples` does.
    """
    layout, vocabulary = corpus.layout, corpus.image_tokenizer.vocabulary
    scenes = scene_examples.open_scenes(run, config.world, corpus, config.seed)
    shares = config.shares({spec: len(found.items) for spec, found in read.items()})
    tasks = scene_examples.make_examples(scenes, config.tasks, shares, config.num_docs_weights)
    nothing = np.zeros(0, np.int32)
    for spec, found in read.items():
        documents = [nothing] * len(found.items)
        tasks[spec] = TaskData(found.items, documents, (1.0,), shares[spec])
    return InstructionSource(
        tasks,
        scenes.memory,
        layout,
        vocabulary,
        config.text_mask_prob,
        config.code_noise,
        # In slots the texts of given pictures have to fit where those of documents do.
        max(
            [
                config.mean_doc_text_len,
                *instruction_sequences.given_lengths(tasks, layout, vocabulary),
            ]
        ),
    )


def _fit(
    config: TuningStageConfig,
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    started: ra_cm3.RACM3Config,
    source: InstructionSource,
    watch: watch_tasks.TaskWatch | None,
) -> dict[str, float]:
    """Trains, and writes what `train_decoder.load_generator` loads; returns the last logged metrics."""
    mesh, scale = make_mesh(config), config.scale
    shape = dataclasses.replace(started.decoder, dtype=scale.dtype, remat=scale.remat)
    model = dataclasses.replace(started, decoder=shape, loss_chunks=scale.loss_chunks)
    make_model = config.extend(partial(decoder_record.make_model, model, config.seed), config.seed)
    graphdef, abstract = param_trees.describe(make_model, None)

    def measure(step: int, params: param_trees.Params) -> dict[str, float]:
        loaded = frozen.LoadedModel(graphdef, jax.device_get(params))
        generator = decoder_training.make_generator(loaded, image_tokenizer, source.layout)
        with jax.set_mesh(Mesh(np.empty((), object), ())):  # On one device, whatever trains.
            return {} if watch is None else watch(step, generator)

    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make_model,
        lora.with_dropout(partial(ra_cm3.loss_fn, config=model)),
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
        watch=None if watch is None else measure,
    )
    checkpoint.save_params(stage_dir / "params", config.merge(params))
    if not multiprocess.is_leader():
        return {}
    decoder_record.write(stage_dir, image_tokenizer, source.layout, model, config.null_prompts)
    return {name: value for name, value in log[-1].items() if name != "step"}
