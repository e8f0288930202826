"""The losses that a tokenizer's stage adds to its own: their config, networks, start, and what trains them.

The networks lie in the model beside the tokenizer's own parts: `discriminator`, `logit_averages`, and
`perceptual`, which is frozen. `own` leaves them out of what is saved.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np
import optax
from etils import epath
from flax import nnx

from rag_mm.convert import vgg16_format, weights
from rag_mm.core import checks, configuration, files
from rag_mm.models import clip
from rag_mm.models.spae import adversarial, perceptual
from rag_mm.models.spae.discriminator import Discriminator, DiscriminatorConfig
from rag_mm.models.spae.loss_weights import LossWeights
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.stages import training
from rag_mm.stages.shared import frozen, given_models
from rag_mm.train.optimizer import OptimizerConfig

_SUFFIX = ".safetensors"
_MODULES = ("discriminator", "logit_averages", "perceptual")
MakeModel = Callable[[], nnx.Module]


@dataclasses.dataclass(frozen=True)
class AddedLossesConfig(given_models.GivenConfig):
    """Perceptual and adversarial losses; all weights are 0 by default, which leaves them out.

    Attributes:
        folder: the tower of the perceptual loss: a safetensors file of torchvision's VGG16, a run with a
            retriever, or a retriever's own folder. None: the run's own retriever.
        weights: of the terms.
        discriminator: sizes of the discriminator.
        optimizer: of the discriminator's parameters.
        lecam_decay: decay per step of the moving averages of logits.
    """

    weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(b1=0.0, b2=0.99)
    )
    lecam_decay: float = 0.999

    def __post_init__(self):
        checks.below_one(self, "lecam_decay")
        self.identify(_fingerprint)

    @property
    def needs_retriever(self) -> bool:
        """Whether the run's own retriever is the tower, so that its stage comes before."""
        return self.weights.perceptual > 0 and self.folder is None


def extend(
    config: AddedLossesConfig,
    make_model: MakeModel,
    image_size: int,
    retriever: epath.Path | None,
    seed: int,
) -> MakeModel:
    """The function that makes the model to train: the given one with the networks of the added losses.

    Args:
        config: what is added; without weights `make_model` is returned.
        make_model: makes the image tokenizer.
        image_size: of the images that are judged, in pixels.
        retriever: folder of the run's frozen retriever, where `config.needs_retriever`.
        seed: of the discriminator's initial parameters.
    """
    on = config.weights

    def make() -> nnx.Module:
        model, rngs = make_model(), nnx.Rngs(params=seed + 2)
        if on.adversarial:
            model.discriminator = Discriminator(config.discriminator, image_size, rngs=rngs)
        if on.lecam:
            model.logit_averages = adversarial.LogitAverages()
        if on.perceptual:
            model.perceptual = _make_tower(config, retriever, rngs)
        return model

    return make if on.adversarial or on.perceptual else make_model


def start(config: AddedLossesConfig, retriever: epath.Path | None, abstract: Params) -> Params:
    """The parameters of the perceptual tower, {} without one; for `start` of `training.train`.

    Args:
        config, retriever: as for `extend`.
        abstract: the whole model's, with shardings.
    """
    if not config.weights.perceptual:
        return {}
    tower, given = abstract["perceptual"], _tower_folder(config, retriever)
    if given.suffix == _SUFFIX:
        return {"perceptual": vgg16_format.load(given, tower)}
    make = lambda: clip.CLIP(_read_clip(given), rngs=nnx.Rngs(0))
    whole = weights.load_file(
        given / frozen.PARAMS, param_trees.describe(make, None)[1], np.dtype(np.float32)
    )
    place = lambda value, leaf: jax.device_put(value, leaf.sharding)
    return {"perceptual": {"vision": jax.tree.map(place, whole["vision"], tower["vision"])}}


def what_trains(
    config: AddedLossesConfig,
    reconstruct: adversarial.Reconstruct,
    is_frozen: param_trees.IsChosen = lambda path: False,
) -> training.WhatTrains:
    """For `training.train`: the tower is frozen, the discriminator and the averages have losses of their own.

    Args:
        config: what is added.
        reconstruct: images and reconstructions as in the tokenizer's own loss.
        is_frozen: parameters of the tokenizer that are frozen besides.
    """
    further: dict[str, training.FurtherLoss] = {}
    if config.weights.adversarial:
        judge = partial(
            adversarial.discriminator_loss, reconstruct=reconstruct, weights=config.weights
        )
        further["discriminator"] = training.FurtherLoss(judge, config.optimizer, _within(0))
    if config.weights.lecam:
        averages = partial(adversarial.averages_loss, reconstruct=reconstruct)
        follow = optax.sgd(1 - config.lecam_decay)
        further["logit_averages"] = training.FurtherLoss(averages, follow, _within(1))
    is_tower = _within(2)
    return training.WhatTrains(
        lambda path: is_tower(path) or is_frozen(path), further_losses=further
    )


def own(params: Params) -> Params:
    """The tokenizer's own parameters, without those of the added losses."""
    return {name: value for name, value in params.items() if name not in _MODULES}


def _within(module: int) -> param_trees.IsChosen:
    return lambda path: path.startswith(f"{_MODULES[module]}/")


def _tower_folder(config: AddedLossesConfig, retriever: epath.Path | None) -> epath.Path:
    if config.folder is None:
        if retriever is None:
            raise ValueError("the perceptual loss needs the folder of a retriever")
        return retriever
    if config.folder.endswith(_SUFFIX):
        return epath.Path(config.folder)
    return given_models.find_model(config.folder, "retriever")


def _make_tower(
    config: AddedLossesConfig, retriever: epath.Path | None, rngs: nnx.Rngs
) -> nnx.Module:
    folder = _tower_folder(config, retriever)
    if folder.suffix == _SUFFIX:
        return perceptual.VGG16(rngs=rngs)
    return perceptual.CLIPFeatures(_read_clip(folder), rngs=rngs)


def _read_clip(folder: epath.Path) -> clip.CLIPConfig:
    values: Mapping = frozen.read_config(folder, ["clip"])[1]
    return configuration.make(clip.CLIPConfig, values, str(folder / frozen.CONFIG))


def _fingerprint(folder: str) -> str:
    if not folder.endswith(_SUFFIX):
        return given_models.model_fingerprint(folder, "retriever", ["clip"])
    vgg16_format.check(folder)
    return files.file_digest(epath.Path(folder))
