"""Compiled programs kept on disk, so that a run's later commands start without compiling again."""

import jax
from etils import epath


def keep_programs(workdir: epath.PathLike) -> None:
    """Keeps programs in `workdir/.jax_cache`, or where JAX_COMPILATION_CACHE_DIR or an earlier call says.

    Jax takes up one folder in a process, so the runs of one process share it. A folder that cannot be
    written is passed over: the cache is a convenience.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
