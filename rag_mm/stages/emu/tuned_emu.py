"""An Emu that was tuned on instructions: the stage `emu`'s model, and a folder with updates of low rank.

Nothing of the model is changed where it lies: without the updates it is what it was. `[USER]` and
`[ASSISTANT]` are the two ids after the special ones; their rows of the embedding are the means of those of
the words, and are not trained (docs/papers/emu.md#instruction-tuning-and-evaluation).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from rag_mm.core import configuration, files
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Mark, P
from rag_mm.decode import decode_batch
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.emu_model import Emu
from rag_mm.nn import lora, param_trees
from rag_mm.nn.lora import LoRAConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages.emu import saved_emu
from rag_mm.stages.emu.emu_text import EmuText
from rag_mm.stages.shared import frozen
from rag_mm.train import checkpoint

RECORD, ADAPTER = "instructions.json", "adapter"
# The paper's: the decoder's self-attention, with as large an alpha as the rank.
PAPER_LORA = LoRAConfig(
    16, 16.0, tuple(f"decoder/*attention/{name}" for name in ("q", "k", "v", "out")), dropout=0.05
)


@dataclasses.dataclass(frozen=True, eq=False)
class TunedEmu:
    """A tuned model.

    Attributes:
        emu: the model with the updates merged, whose sequences may have marks.
        system: what a dialogue begins with; empty for nothing.
    """

    emu: saved_emu.LoadedEmu
    system: str

    def prompt(self, turns: Sequence[tuple[Sequence[P], str | None]]) -> tuple[P | str | Mark, ...]:
        """A dialogue, as of `interleaved.dialogue`."""
        return interleaved.dialogue(turns, self.system)


def marks_of(config: EmuConfig, vocabulary: EmuText) -> dict[Mark, Sequence[int]]:
    """The ids of the marks of dialogues, `[USER]:`, `[ASSISTANT]:` and `</s>`.

    Raises:
        UserError: the embedding has no rows for them.
    """
    user = max(vars(config.ids).values()) + 1
    if user + 1 >= config.decoder.vocab_size:
        raise UserError(
            f"The model's {config.decoder.vocab_size} ids leave none for [USER] and [ASSISTANT]; train emu "
            "with a smaller emu_data.vocab_size."
        )
    colon = vocabulary.encode_text(":")
    return {
        Mark.USER: (user, *colon),
        Mark.ASSISTANT: (user + 1, *colon),
        Mark.END: (config.ids.end,),
    }


def with_marks(emu: saved_emu.LoadedEmu) -> saved_emu.LoadedEmu:
    """The same model, whose sequences may have marks."""
    marks = marks_of(emu.config, emu.vocabulary)
    return dataclasses.replace(emu, maker=dataclasses.replace(emu.maker, marks=marks))


def add_roles(params: Params, marks: Mapping[Mark, Sequence[int]], vocabulary: EmuText) -> Params:
    """The parameters with rows of the embedding for the two roles, each the mean of its word's rows."""
    table = params["decoder"]["embedding"]["table"]
    for mark in (Mark.USER, Mark.ASSISTANT):
        words = jnp.array(vocabulary.encode_text(mark.value), jnp.int32)
        table = _with_mean(table, words, marks[mark][0])
    decoder = {**params["decoder"], "embedding": {"table": table}}
    return {**params, "decoder": decoder}


def _with_mean(table: jax.Array, rows: jax.Array, at: int) -> jax.Array:
    put = lambda table, rows: table.at[at].set(table[rows].mean(0))
    layout = table.sharding
    if not isinstance(layout, NamedSharding):
        return put(table, rows)
    with jax.set_mesh(layout.mesh):
        return jax.jit(jax.sharding.auto_axes(put, out_sharding=layout.spec))(table, rows)


def make_model(config: EmuConfig, updates: LoRAConfig, seed: int) -> Emu:
    """An untrained model with untrained updates."""
    return lora.add(saved_emu.make_model(config, seed), updates, rngs=nnx.Rngs(params=seed + 1))


def save(
    folder: epath.Path, params: Params, updates: LoRAConfig, system: str, is_leader: bool = True
) -> None:
    """Writes what `load` reads; with several processes all call it, and the leader writes the small file.

    Args:
        folder: of the stage.
        params: of `make_model`; only the updates are written.
        updates: their sizes.
        system: what a dialogue begins with.
        is_leader: whether this process is the leader.
    """
    checkpoint.save_params(folder / ADAPTER, param_trees.split(params, lora.is_added)[0])
    if is_leader:
        record = {"lora": dataclasses.asdict(updates), "system": system}
        files.write_json(folder / RECORD, record)


def load(folder: epath.Path, base: saved_emu.LoadedEmu) -> TunedEmu:
    """The tuned model of a finished stage; all that the updates leave alone is shared with `base`.

    Raises:
        UserError: there are no updates, or they are another model's.
    """
    record = files.read_object(folder / RECORD, lora=dict, system=str)
    updates = configuration.make(LoRAConfig, record["lora"], str(folder / RECORD))
    mesh = decode_batch.mesh_of(base.model.params)
    make = functools.partial(make_model, base.config, updates, 0)
    abstract = param_trees.describe(make, mesh)[1]
    added = param_trees.split(abstract, lora.is_added)[0]
    emu = with_marks(base)
    plain = add_roles(base.model.params, emu.maker.marks, base.vocabulary)
    trained = checkpoint.load_params(folder / ADAPTER, added)
    merged = lora.merge(param_trees.join(plain, trained), updates)
    model = frozen.LoadedModel(base.model.graphdef, merged)
    return TunedEmu(dataclasses.replace(emu, model=model), record["system"])
