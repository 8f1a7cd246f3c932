"""What was kept, as a page or a picture one can show: frames with kept, merged and dropped patches, and charts.

data = ViewData.of_run(run, clip.frames, clip.timestamps, processor=processor, label="street.mp4")
write_html(data, "report.html")
write_png(data, "report.png")
"""

from tokensieve.view.cells import Cells, CellState, State, states
from tokensieve.view.data import ViewData
from tokensieve.view.html import render_html, write_html
from tokensieve.view.overlay import overlay
from tokensieve.view.png import write_png
from tokensieve.view.regions import Region

__all__ = [
    "CellState",
    "Cells",
    "Region",
    "State",
    "ViewData",
    "overlay",
    "render_html",
    "states",
    "write_html",
    "write_png",
]
