"""XLA's flags in tests, which compile many small programs and run each a few times."""

import jaxlib.version

SOONEST_COMPILED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# An unknown flag ends the process. This one was in jaxlib 0.10 and is not in 0.12.
if jaxlib.version.__version_info__ < (0, 11):
    SOONEST_COMPILED += ("--xla_cpu_use_fusion_emitters=false",)


def flags(devices: int) -> str:
    """Of a process with so many CPU devices, for its environment's `XLA_FLAGS`."""
    return " ".join(
        [f"--xla_force_host_platform_device_count={devices}", *SOONEST_COMPILED]
    )
