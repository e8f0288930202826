"""The batches that RECO's fusion trains on."""

import itertools

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.stages import training
from rag_mm.stages.reco import draw_toy_pairs, embed_pairs, train_fusion
from rag_mm.train import loop, optimizer
from rag_mm.worlds import concepts

WORLD = concepts.ConceptWorld(num_classes=40, num_common=20, num_held_out=8, dim=16)
TOY = draw_toy_pairs.ToyPairsStageConfig(0, WORLD, num_train=60, rows_per_class=3, num_test=2)


class Stopped(Exception):
    """Raised instead of training."""


def batches_of(batch_size, num_batches, tmp_path, monkeypatch):
    """The first batches that the stage would train on, and its pairs."""
    drawn = []

    def train(*args, **options):
        drawn.extend(itertools.islice(args[4], num_batches))
        raise Stopped

    pairs = draw_toy_pairs.sample_pairs(TOY)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(embed_pairs, "load", lambda folder: pairs)
    run = type("Run", (), {"finished_stage": lambda self, name: tmp_path})()
    config = train_fusion.FusionStageConfig(
        seed=3,
        world=WORLD,
        model=dict(num_heads=4),
        optimizer=optimizer.OptimizerConfig(),
        loop=loop.LoopConfig(num_steps=1),
        batch_size=batch_size,
    )
    with pytest.raises(Stopped):
        train_fusion.run(config, run, tmp_path)
    return drawn, pairs


def test_a_pair_is_drawn_once_an_epoch_with_its_own_text_and_neighbors(tmp_path, monkeypatch):
    drawn, pairs = batches_of(20, 9, tmp_path, monkeypatch)
    train = pairs.train
    numbers = {image.tobytes(): number for number, image in enumerate(train.image)}
    assert len(numbers) == 60  # All images differ.
    order = np.array([[numbers[image.tobytes()] for image in batch["image"]] for batch in drawn])
    assert (np.sort(order.reshape(3, 60), axis=1) == np.arange(60)).all()
    assert len({tuple(epoch) for epoch in order.reshape(3, 60).tolist()}) == 3
    for rows, batch in zip(order, drawn, strict=True):
        np.testing.assert_array_equal(batch["text"], train.text[rows])
        np.testing.assert_array_equal(batch["class_ids"], train.class_ids[rows])
        nearest = (train.image[rows] @ pairs.seen_memory.image.T).argmax(axis=1)
        np.testing.assert_array_equal(
            batch["image_retrieved"][:, 0], pairs.seen_memory.text[nearest]
        )


def test_a_batch_of_more_pairs_than_there_are_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="60 records do not fill one batch of 64"):
        batches_of(64, 1, tmp_path, monkeypatch)
