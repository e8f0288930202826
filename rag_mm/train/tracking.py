"""Sends a stage's log lines to an experiment tracker: a module with `init`, `log` and `finish`.

`trackio` and `wandb` have the same three functions. Neither is required; the module that the user names is
imported when it is asked for. A tracker never stops training: its first failure is a warning and its end.
"""

import contextlib
import contextvars
import dataclasses
import importlib
import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from rag_mm.core import costs, files, progress
from rag_mm.core.errors import UserError

PROJECT = "rag_mm"


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where log lines go.

    Attributes:
        module: has `init(project=, name=, config=)`, `log(values, step=)` and `finish()`; `id` and `resume`
            are passed too if its `init` names them.
        config: the run's config, nested plain values, which the tracker shows.
    """

    module: Any
    config: Mapping[str, Any]


_DESTINATION: contextvars.ContextVar[Destination | None] = contextvars.ContextVar(
    "destination", default=None
)


def find(name: str) -> Any:
    """The tracker's module, imported.

    Raises:
        UserError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"--tracker={name} cannot be imported ({error}); run pip install {name}, or leave it out."
        ) from error


@contextlib.contextmanager
def tracked(destination: Destination | None) -> Iterator[None]:
    """Every `loop.fit` in the body sends its log lines there, a run for each stage; None sends none."""
    token = _DESTINATION.set(destination)
    try:
        yield
    finally:
        _DESTINATION.reset(token)


class Tracker:
    """A stage's run in the tracker; without one, and in all processes but the first, it does nothing.

    `tracker.json` in the stage's folder keeps the tracker's name, the run's id and the last step that was
    sent, so that a resumed stage goes on with the same run and sends no step twice.
    """

    def __init__(self, stage_dir: epath.PathLike):
        """Starts or resumes the run of the stage in `stage_dir`."""
        self._path = epath.Path(stage_dir) / costs.TRACKER_NAME
        destination = _DESTINATION.get()
        self._module = None
        if destination is None or jax.process_index() != 0:
            return
        self._module, self._name = destination.module, destination.module.__name__
        self._id, self._last = self._read()
        self._try(lambda: self._start(destination))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step, unless an interrupted training has already sent it."""
        module = self._module
        if module is not None and step > self._last:
            self._try(lambda: self._log(module, step, values))

    def close(self) -> None:
        """Ends the run in the tracker."""
        if self._module is not None:
            self._try(self._module.finish)
            self._module = None

    def _start(self, destination: Destination) -> None:
        stage = self._path.parent
        further = {"id": self._id, "resume": "allow"}
        known = inspect.signature(destination.module.init).parameters
        self._save()
        destination.module.init(
            project=PROJECT,
            # With a part of the id, as trackio resumes by name.
            name=f"{stage.parent.name}-{stage.name}-{self._id[:8]}",
            config={**destination.config, "stage": stage.name},
            **{key: value for key, value in further.items() if key in known},
        )

    def _log(self, module: Any, step: int, values: Mapping[str, float]) -> None:
        module.log(dict(values), step=step)
        self._last = step
        self._save()

    def _read(self) -> tuple[str, int]:
        with contextlib.suppress(UserError, OSError):
            saved = files.read_object(self._path, tracker=str, id=str, step=int)
            if saved["tracker"] == self._name:
                return saved["id"], saved["step"]
        return uuid.uuid4().hex, 0

    def _save(self) -> None:
        saved = {"tracker": self._name, "id": self._id, "step": self._last}
        files.write_json(self._path, saved)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._module = None
            progress.warn(
                f"{self._name} failed ({type(error).__name__}: {error}); training goes on without it."
            )
