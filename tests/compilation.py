"""How fast XLA compiles the programs of the tests, here and in the processes that tests start.

Most of the suite's time would be XLA optimising programs that run once.
"""

import os

import jax

FLAGS = (
    # One object file a program: a small program gains nothing from 32 that are compiled side by side.
    "--xla_cpu_parallel_codegen_split_count=1",
    # LLVM IR of fusions without the passes of MLIR: a third of the time. Unknown extra options are ignored.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
)

#: Environment of a process that compiles as users do, in spite of the above.
AS_USERS_DO = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def compile_fast(cache: str) -> None:
    """From now on, in this process and in those that inherit its environment.

    Args:
      cache: folder of compiled programs. Its writers take turns: a file may be read while another process writes it.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])


def with_devices(number: int) -> str:
    """XLA_FLAGS of a process that shall have so many devices, else as this one's."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
