"""Efficiency of every method on one CUDA GPU, with models of real sizes and random weights.

    python -m benchmarks.gpu [--quick] [--models llava-onevision-7b] [--methods vidcom2] [--batch 1 4]

The columns are those of the papers' efficiency tables, each by its own protocol (see docs/benchmarks.md).
"""
