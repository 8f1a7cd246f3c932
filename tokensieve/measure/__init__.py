"""FLOPs, memory and the report of a run."""
