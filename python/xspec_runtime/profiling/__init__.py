"""What a profiler recorded of rounds, as one table: see docs/profiling.md."""
