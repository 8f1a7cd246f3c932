"""VFlowOpt: importance from the attention of important patches, pruned patches recycled cell by cell.

Based on "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization" (arXiv
2508.05211, ICCV 2025). The importance map of a picture is the attention that a patch receives from the most
attended patches alone, plus the entropy of its pixels. One map serves all cuts: in front of the LLM, where the
patches cut from a picture are averaged inside coarse cells, and twice more inside the LLM. Its parameters are found
for each model by a search that compares the last state of the prompt with and without cuts
(`tokensieve.methods.vflowopt.search`).
"""

from tokensieve.methods.vflowopt.functions import (
    STRATEGIES,
    Strategy,
    add_entropy,
    average_retention,
    grid_cells,
    importance_map,
    last_ratio,
    nearest_strategy,
    pixel_entropy,
    prune_and_recycle,
    select_important,
    survivors,
)
from tokensieve.methods.vflowopt.method import VFlowOpt
from tokensieve.methods.vflowopt.strategy_file import StoredStrategy

__all__ = [
    "STRATEGIES",
    "StoredStrategy",
    "Strategy",
    "VFlowOpt",
    "add_entropy",
    "average_retention",
    "grid_cells",
    "importance_map",
    "last_ratio",
    "nearest_strategy",
    "pixel_entropy",
    "prune_and_recycle",
    "select_important",
    "survivors",
]
