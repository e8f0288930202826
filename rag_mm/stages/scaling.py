"""Group `scale` of the stages that train: devices, precision, and what is computed in parts.

A stage's group has the settings that mean something to it: a loss that compares the examples of a batch with
each other has no `num_parts`, and a convolutional image tokenizer no `loss_chunks`.
"""

import dataclasses

from rag_mm.core import checks, manifest_values
from rag_mm.nn.block import REMAT

DTYPES = ("float32", "bfloat16")
_LATER = manifest_values.ADDED_LATER


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """What the group of every stage has.

    Attributes:
        mesh: numbers of devices along data, fsdp and tensor. With several processes data is the number that
            uses all devices.
        dtype: float32 | bfloat16, of activations; parameters, moments and losses are float32.
        remat: what the backward pass of a layer computes anew instead of storing it: none | dots | full.
            With dots, products with parameters are stored.
    """

    mesh: tuple[int, int, int] = dataclasses.field(default=(1, 1, 1), metadata=_LATER)
    dtype: str = dataclasses.field(default="float32", metadata=_LATER)
    remat: str = dataclasses.field(default="none", metadata=_LATER)

    def __post_init__(self):
        if len(self.mesh) != 3 or min(self.mesh) < 1:
            raise ValueError(
                f"mesh is {self.mesh}; give numbers of devices along data, fsdp and tensor, each at least 1"
            )
        checks.one_of(self, "dtype", DTYPES)
        checks.one_of(self, "remat", tuple(REMAT))
        counts = {"loss_chunks": 1, "num_parts": 1, "num_workers": 0}
        for name in counts.keys() & vars(self).keys():
            checks.at_least(self, counts[name], name)


@dataclasses.dataclass(frozen=True)
class FusionScaleConfig(ScaleConfig):
    """Of a stage that contrasts pairs taken from arrays: RECO's fusion.

    Attributes:
        loss_chunks: into how many chunks each device splits the pairs whose similarities it holds at a time.
    """

    loss_chunks: int = dataclasses.field(default=1, metadata=_LATER)


@dataclasses.dataclass(frozen=True)
class RetrieverScaleConfig(FusionScaleConfig):
    """Of a stage that contrasts pairs made one by one: the retriever.

    Attributes:
        num_workers: processes that make training examples; 0 uses a thread.
    """

    num_workers: int = dataclasses.field(default=0, metadata=_LATER)


@dataclasses.dataclass(frozen=True)
class TokenizerScaleConfig(ScaleConfig):
    """Of the image tokenizer, whose convolutions are split by batch only.

    Attributes:
        mesh: numbers of devices along data, fsdp and tensor; data and fsdp split the batch, tensor is 1.
        remat: what the backward pass of a block computes anew instead of storing it: none | full.
        num_parts: parts into which a step's batch is split, one after the other; their gradients are added.
        num_workers: processes that make training examples; 0 uses a thread.
    """

    num_parts: int = dataclasses.field(default=1, metadata=_LATER)
    num_workers: int = dataclasses.field(default=0, metadata=_LATER)

    def __post_init__(self):
        super().__post_init__()
        checks.one_of(self, "remat", ("none", "full"))
        if self.mesh[2] > 1:
            raise ValueError(
                f"mesh is {self.mesh}; the image tokenizer is split by batch only, so give 1 along tensor"
            )


@dataclasses.dataclass(frozen=True)
class VisualScaleConfig:
    """Of a visual decoder, whose parameters and activations are float32 and held whole.

    Attributes:
        mesh: numbers of devices along data, fsdp and tensor; data and fsdp split the batch, tensor is 1.
        num_parts: parts into which a step's batch is split, one after the other; their gradients are added.
    """

    mesh: tuple[int, int, int] = (1, 1, 1)
    num_parts: int = 1

    def __post_init__(self):
        if len(self.mesh) != 3 or min(self.mesh) < 1 or self.mesh[2] > 1:
            raise ValueError(
                f"mesh is {self.mesh}; give numbers of devices along data and fsdp, each at least 1, and 1 "
                "along tensor"
            )
        checks.at_least(self, 1, "num_parts")


@dataclasses.dataclass(frozen=True)
class DecoderScaleConfig(ScaleConfig):
    """Of a stage that trains a decoder; it has every setting.

    Attributes:
        loss_chunks: into how many chunks the positions are split whose logits are held at a time.
        num_parts: parts into which a step's batch is split, one after the other; their gradients are added.
        num_workers: processes that make training examples; 0 uses a thread.
    """

    # Manifests have these under their older names, the mesh even if it is the default.
    mesh: tuple[int, int, int] = dataclasses.field(
        default=(1, 1, 1), metadata=manifest_values.recorded_as("mesh")
    )
    dtype: str = dataclasses.field(
        default="float32", metadata=_LATER | manifest_values.recorded_as("model.dtype")
    )
    remat: str = dataclasses.field(
        default="none", metadata=_LATER | manifest_values.recorded_as("model.remat")
    )
    loss_chunks: int = dataclasses.field(default=1, metadata=_LATER)
    num_parts: int = dataclasses.field(default=1, metadata=_LATER)
    num_workers: int = dataclasses.field(default=0, metadata=_LATER)
