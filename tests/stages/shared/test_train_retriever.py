"""The documents that a retriever may train on."""

import pytest

from rag_mm.stages.shared import train_retriever, world_config
from rag_mm.train import loop, optimizer


@pytest.mark.parametrize("roles", [(), ("test",), ("train", "test")], ids=str)
def test_it_never_trains_on_test_scenes(roles):
    with pytest.raises(ValueError, match="choose from train, memory"):
        train_retriever.RetrieverStageConfig(
            seed=0,
            world=world_config.EmojiWorld(),
            optimizer=optimizer.OptimizerConfig(learning_rate=1e-3),
            loop=loop.LoopConfig(num_steps=1),
            roles=roles,
        )
