"""Memory of the GPUs that this worker has, by NVML: of the whole GPU, whoever uses it."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("baton.worker")

BytesByGpu = dict[str, tuple[int, int]]
"""Used and total bytes by GPU index."""


class GpuMemory:
    """Reads NVML; has nothing to tell where there is no NVIDIA driver.

    Args:
        gpus: indices or UUIDs of the worker's GPUs, as Ray gave them; none means no GPU.
        nvml: NVML's Python binding; vLLM brings it.
    """

    def __init__(self, gpus: list[str], nvml: Any = None) -> None:
        self._nvml = nvml
        self._handles: dict[str, Any] = {}
        if gpus:
            self._open(gpus)

    def _open(self, gpus: list[str]) -> None:
        try:
            if self._nvml is None:
                from vllm.third_party import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            for gpu in gpus:
                by_index = gpu.isdigit()
                find = self._nvml.nvmlDeviceGetHandleByIndex if by_index else self._nvml.nvmlDeviceGetHandleByUUID
                self._handles[gpu] = find(int(gpu) if by_index else gpu.encode())
        except Exception as error:  # a metric is not worth a worker
            logger.warning("GPU memory can't be read: %s", error)

    def read(self) -> BytesByGpu:
        """Used and total bytes of each GPU now."""
        found: BytesByGpu = {}
        for gpu, handle in self._handles.items():
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            found[gpu] = (int(memory.used), int(memory.total))
        return found
