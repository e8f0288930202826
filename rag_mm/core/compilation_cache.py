"""Keeps jax's compilation cache in the run folder, so that later commands start without recompiling."""

import jax
from etils import epath


def keep_programs(workdir: epath.PathLike) -> None:
    """Caches programs in `workdir/.jax_cache`, or where JAX_COMPILATION_CACHE_DIR or an earlier call says.

    jax uses one cache folder per process, so all runs of a process share it. A folder that cannot be
    written is ignored.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
