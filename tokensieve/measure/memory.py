"""Peak memory of a run: of the CUDA allocator on a GPU, of the process elsewhere."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


class PeakMemory:
    """The most memory in use since `start`, in bytes.

    On CUDA: the allocator's peak on the given device. On Linux CPUs: the kernel's high-water mark of resident
    memory, reset at `start`. Elsewhere: the present resident size, a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak: int | None = None

    @property
    def kind(self) -> str:
        """What is counted, for tables."""
        return "CUDA allocator" if self.device.type == "cuda" else "process resident set"

    def start(self) -> None:
        """Begin to count."""
        self._peak = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # Without the reset the mark also covers what ran before; still an upper bound.
            return

    def stop(self) -> None:
        """Freeze the peak."""
        self._peak = self.read()

    def read(self) -> int:
        """Peak so far in bytes."""
        if self._peak is not None:
            return self._peak
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process().memory_info().rss)
