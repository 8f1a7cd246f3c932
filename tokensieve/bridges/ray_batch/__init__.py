"""Questions about whole folders of videos, on Ray Data: on one machine or a cluster, resumable."""

from tokensieve.bridges.ray_batch.items import Item, read_items
from tokensieve.bridges.ray_batch.journal import Journal
from tokensieve.bridges.ray_batch.pipeline import Workers, run_batch
from tokensieve.bridges.ray_batch.settings import BatchSettings
from tokensieve.bridges.ray_batch.table import write_failed, write_table

__all__ = ["BatchSettings", "Item", "Journal", "Workers", "read_items", "run_batch", "write_failed", "write_table"]
