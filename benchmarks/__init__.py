"""Timings of this connector beside plain pylance in one process, in the same run. ``python -m benchmarks --help``."""
