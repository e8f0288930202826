"""What a retriever may be shown."""

import pytest

from rag_mm.stages import retriever, world
from rag_mm.train import loop, optimizer


@pytest.mark.parametrize("roles", [(), ("test",), ("train", "test")], ids=str)
def test_scenes_of_tests_are_never_shown(roles):
    with pytest.raises(ValueError, match="choose some of train, memory"):
        retriever.Config(
            seed=0,
            world=world.World(),
            optimizer=optimizer.Config(learning_rate=1e-3),
            loop=loop.Config(num_steps=1),
            roles=roles,
        )
