"""Images on their way to the device: all of them at once where they are decoded and fit, a few batches ahead otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from benchmark.data.images import Images, resident

_AHEAD = 4


class Pixels:
    """The training images; `feed` yields those of each batch."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images, self.device = images, device
        self.all = torch.from_numpy(np.array(images[:])).to(device) if resident(images) and _fits(images, device) else None

    def feed(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (b,) and images uint8 (b, S, S, 3) on the device, batch by batch."""
        if self.all is not None:
            for rows in batches:
                yield rows, self.all[sent(rows, self.device)]
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: deque[Future[Tensor]] = deque(reader.submit(self._read, rows) for rows in batches[:_AHEAD])
            for index, rows in enumerate(batches):
                shown = waiting.popleft().result()
                if index + _AHEAD < len(batches):
                    waiting.append(reader.submit(self._read, batches[index + _AHEAD]))
                yield rows, shown.to(self.device, non_blocking=True)

    def _read(self, rows: Tensor) -> Tensor:
        shown = torch.from_numpy(np.ascontiguousarray(self.images[rows.numpy()]))
        return shown.pin_memory() if self.device.type == "cuda" else shown


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on the device. A GPU is not waited for: from memory that is not pinned, every copy would."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _fits(images: Images, device: torch.device) -> bool:
    """Whether all pixels may lie on the device: at most half of a GPU's free memory, and on the CPU half of what is free."""
    size = int(np.prod(images.shape))
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] / 2
    return size < _free_memory() / 2


def _free_memory() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            for line in handle:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 4e9
