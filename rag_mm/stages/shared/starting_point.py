"""What the training of a decoder starts from, and which of its parameters it changes.

A decoder's stage inherits `StartConfig`; the initial parameters are new, another stage's, or another run's.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.convert import shards, weights
from rag_mm.core import checks, manifest_values, remote, run_folder
from rag_mm.core.errors import UserError
from rag_mm.nn import lora, param_trees
from rag_mm.nn.lora import LoRAConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages import training
from rag_mm.stages.shared import frozen
from rag_mm.train import checkpoint

# Stages whose parameters are those of a decoder: trained here, or imported.
STAGES = ("decoder", "pretraining", "language_model")
PARAMS, IMPORTED = "params", "frozen"
_PREFIX = "decoder/"  # of the decoder's parameters in an imported Chameleon
_TABLES = ("embedding/table", "head/table")  # with a row for each token
_MAX_NAMED = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Initial parameters, and which of them are trained.

    Attributes:
        start_from: whose parameters training starts from: a stage of the run, such as control, or a folder,
            of a run or of one of its stages; None for new parameters.
        started_from: fingerprint of the stage in the folder `start_from`. It is computed, so that another
            stage there is another config.
        freeze: patterns of the paths of parameters that stay as they are, such as ("embedding/*",); with
            `lora` all but the updates do.
        frozen_dtype: dtype in which those are kept while training, such as bfloat16; None: as they are.
        lora: train updates of low rank instead of the model's own parameters, such as {"rank": 8}; they are
            merged at the end. None trains the model itself.
    """

    start_from: str | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    started_from: str = dataclasses.field(
        init=False, default="", metadata=manifest_values.ADDED_LATER
    )
    freeze: tuple[str, ...] = dataclasses.field(default=(), metadata=manifest_values.ADDED_LATER)
    frozen_dtype: str | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    lora: LoRAConfig | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        checks.one_of(self, "frozen_dtype", (None, "float32", "bfloat16", "float16"))
        if self.lora is not None and not isinstance(self.lora, LoRAConfig):
            raise ValueError(
                f"lora is {self.lora!r}; give None or its settings, such as {{'rank': 8}}"
            )
        if self.lora is not None and self.freeze:
            raise ValueError("with lora the whole model is frozen; leave freeze out")
        if self.lora is not None and not self.start_from:
            raise ValueError("lora trains updates of a model; name one with start_from")
        if self.frozen_dtype is not None and self.lora is None and not self.freeze:
            raise ValueError("frozen_dtype is set, but nothing is frozen; give freeze or lora")
        if self.start_from and not self.start_stage:
            object.__setattr__(self, "started_from", fingerprint(self.start_from))

    @property
    def start_stage(self) -> str | None:
        """The stage of the same run that `start_from` names, if it is no folder."""
        is_stage = re.fullmatch(r"[a-z][a-z0-9_]*", self.start_from or "")
        return self.start_from if is_stage else None

    def extend(self, make_model: Callable[[], nnx.Module], seed: int) -> Callable[[], nnx.Module]:
        """The function that makes the model to train: with `lora`, the given one and its updates."""
        config = self.lora
        if config is None:
            return make_model
        # Another stream than the model's own.
        return lambda: lora.add(make_model(), config, rngs=nnx.Rngs(params=seed + 1))

    def what_trains(self, abstract: Params) -> training.WhatTrains:
        """For `training.train`, from the parameters' tree; raises UserError if a pattern matches none."""
        if self.lora is not None:
            return training.WhatTrains(lambda path: not lora.is_added(path), self.frozen_dtype)
        is_frozen = param_trees.matching(self.freeze, abstract, "freeze")
        return training.WhatTrains(is_frozen, self.frozen_dtype)

    def start(self, workdir: epath.Path) -> Callable[[Params], Params] | None:
        """For `training.train`: loads the initial parameters of the model itself, where there are some."""
        if self.start_from is None:
            return None
        folder = self._source(workdir)
        return lambda abstract: load(folder, param_trees.split(abstract, lora.is_added)[1])

    def merge(self, params: Params) -> Params:
        """The parameters of the model itself, float32."""
        if self.lora is not None:
            params = lora.merge(params, self.lora)
        if self.frozen_dtype is None:
            return params
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)

    def _source(self, workdir: epath.Path) -> epath.Path:
        if self.start_stage is not None:
            return run_folder.Run(workdir).finished_stage(self.start_stage)
        folder = find(self.start_from or "")
        return run_folder.Run(folder.parent).finished_stage(folder.name)


def load(folder: epath.Path, abstract: Params) -> Params:
    """The parameters of a stage's folder in the layout of `abstract`, float32.

    Raises:
        UserError: the stage has no decoder, or one of other shapes; the parameters that differ are named.
    """
    file = folder / IMPORTED / frozen.PARAMS
    if file.exists():
        specs = shards.read_header(file)
        is_inside = any(path.startswith(_PREFIX) for path in specs)
        others = {p: s for p, s in specs.items() if is_inside and not p.startswith(_PREFIX)}
        found = {p.removeprefix(_PREFIX): s.shape for p, s in specs.items() if p not in others}
        _check(folder, found, abstract)
        if not is_inside:
            return weights.load_file(file, abstract, np.dtype(np.float32))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        rest = {
            path: jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=device)
            for path, spec in others.items()
        }
        whole = {_PREFIX[:-1]: abstract, **rest}
        return weights.load_file(file, whole, np.dtype(np.float32))[_PREFIX[:-1]]
    if not (folder / PARAMS).exists():
        raise UserError(
            f"{folder} has no decoder's parameters; name a stage that trains a decoder."
        )
    _check(folder, checkpoint.param_shapes(folder / PARAMS), abstract)
    return checkpoint.load_params(folder / PARAMS, abstract)


def load_longer(folder: epath.Path, abstract: Params, num_old: int) -> Params:
    """As `load`, for a decoder that has more tokens: their rows are the mean of the rows of the others.

    Args:
        folder: of a stage whose decoder has `num_old` tokens.
        abstract: the decoder's layout here.
        num_old: tokens there.
    """
    wanted = param_trees.leaves_by_path(abstract)
    tables = [path for path in _TABLES if path in wanted]
    old = dict(wanted)
    for path in tables:
        leaf = wanted[path]
        # Undivided: the old rows need not split over the mesh.
        whole = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
        shape = (num_old, *leaf.shape[1:])
        old[path] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=whole)
    tree = jax.tree.structure(abstract)
    found = param_trees.leaves_by_path(load(folder, jax.tree.unflatten(tree, list(old.values()))))
    for path in tables:
        rows = np.asarray(found[path])
        more = np.repeat(rows.mean(0, keepdims=True), wanted[path].shape[0] - num_old, axis=0)
        found[path] = jax.device_put(np.concatenate([rows, more]), wanted[path].sharding)
    return jax.tree.unflatten(tree, list(found.values()))


def _check(folder: epath.Path, found: dict[str, tuple[int, ...]], abstract: Params) -> None:
    wanted = {path: leaf.shape for path, leaf in param_trees.leaves_by_path(abstract).items()}
    differing = [
        f"{path} is {list(found[path])} there and {list(shape)} here"
        for path, shape in wanted.items()
        if path in found and found[path] != shape
    ]
    problems = {
        "it lacks": [path for path in wanted if path not in found],
        "it also has": [path for path in found if path not in wanted],
        "": differing,
    }
    told = [
        f"{label} {', '.join(names[:_MAX_NAMED])}".strip()
        + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "")
        for label, names in problems.items()
        if names
    ]
    if told:
        raise UserError(
            f"{folder} holds another model than the one to train: {'; '.join(told)}. Make the models agree."
        )


def fingerprint(start_from: str, name: str = "start_from") -> str:
    """The fingerprint of the stage that a path names (`find`).

    Args:
        start_from: the path.
        name: of the setting, for errors.

    Raises:
        UserError: there is none, or it is not finished.
    """
    folder = find(start_from, name)
    manifest = run_folder.Run(folder.parent).manifest(folder.name)
    if manifest is None or not manifest.is_done:
        raise UserError(f"{name} is {start_from}, which is not finished; finish it first.")
    return manifest.fingerprint


def find(start_from: str, name: str = "start_from") -> epath.Path:
    """The folder of the stage that a path names: its own, or that of its run.

    Args:
        start_from: the path.
        name: of the setting, for errors.

    Raises:
        UserError: there is no such folder.
    """
    path = epath.Path(start_from)
    path = path if remote.is_remote(path) else path.resolve()
    for folder in (path, *(path / stage for stage in STAGES)):
        if (folder / run_folder.MANIFEST).exists():
            return folder
    raise UserError(
        f"{name} is {start_from}, which holds no decoder; give the folder of a run or of one of its "
        "stages."
    )
