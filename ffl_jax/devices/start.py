"""Why JAX does not start on this machine, in words. Light on imports, for it may be they that fail."""

import os
import sys

from ffl_jax.errors import ConfigError, FFLError, ResourceError


def problem(error: Exception) -> FFLError | None:
    """The refusal behind an error that came out of JAX; None where JAX starts, and the mistake is ours."""
    reason = " ".join(str(error).split()) or "there is none here"
    unloadable = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError)
    if unloadable and _memory_is_limited():
        return ResourceError(f"a library cannot be loaded ({reason}): raise the limit on memory (ulimit -v).")
    if not any(name.partition(".")[0] == "jax" for name in sys.modules):
        return None
    try:
        import jax

        jax.devices()
    except Exception:
        # Set by `cli` where the user has not.
        ours = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
        given = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
        settings = " ".join(f"{name}={value}" for name, value in sorted(given.items()) if name not in ours)
        return ConfigError(
            f"JAX does not start{f' with {settings}' if settings else ''}: {reason}; set JAX_PLATFORMS to "
            "what this machine has, such as cpu, or leave these variables unset."
        )
    return None


def _memory_is_limited() -> bool:
    try:
        import resource
    except ImportError:  # Windows
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)
