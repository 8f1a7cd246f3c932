"""A benchmark for anyone to run: all methods on the same clips and questions, against the full model and controls."""

from tokensieve.bench.config import BenchConfig
from tokensieve.bench.data import Item, read_items
from tokensieve.bench.engine import run_bench
from tokensieve.bench.output import write_results
from tokensieve.bench.results import Comparison, Results, Row

__all__ = ["BenchConfig", "Comparison", "Item", "Results", "Row", "read_items", "run_bench", "write_results"]
