"""XLA's flags in tests, which compile many small programs and run each a few times."""

SOONEST_COMPILED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags(devices: int) -> str:
    """Of a process with so many CPU devices, for its environment's `XLA_FLAGS`."""
    return " ".join(
        [f"--xla_force_host_platform_device_count={devices}", *SOONEST_COMPILED]
    )
