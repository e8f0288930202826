"""What a retriever may be shown."""

import pytest

from rag_mm.stages.shared import train_retriever, world_config
from rag_mm.train import loop, optimizer


@pytest.mark.parametrize("roles", [(), ("test",), ("train", "test")], ids=str)
def test_scenes_of_tests_are_never_shown(roles):
    with pytest.raises(ValueError, match="choose some of train, memory"):
        train_retriever.RetrieverStageConfig(
            seed=0,
            world=world_config.EmojiWorld(),
            optimizer=optimizer.OptimizerConfig(learning_rate=1e-3),
            loop=loop.LoopConfig(num_steps=1),
            roles=roles,
        )
