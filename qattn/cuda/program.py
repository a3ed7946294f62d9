"""Kernels recorded into a CUDA graph and replayed by one call: the twin of `qattn.cpu.kernel.Program`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from qattn.cuda.kernel import recording


class Program:
    """A sequence of kernel launches.  It keeps the arrays alive that they work on.

    A replay sees the arrays' contents of its time; addresses, sizes and numbers are those of the recording.  Nothing
    that is recorded may wait for the GPU, or copy between host and GPU.
    """

    def __init__(self) -> None:
        self._graphs: list[Any] = []
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._kept)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Append the kernels launched by this thread to the program; they run when the block ends."""
        import cupy

        stream, before = cupy.cuda.Stream(non_blocking=True), recording.kept
        with stream:  # the default stream can't be captured
            stream.begin_capture()
            recording.kept = self._kept
            try:
                yield
            finally:
                recording.kept = before
                graph = stream.end_capture()
        self._graphs.append(graph)
        graph.launch(stream=cupy.cuda.get_current_stream())

    def replay(self) -> None:
        """Launch the kernels in the order of their recording, on the current stream."""
        import cupy

        for graph in self._graphs:
            graph.launch(stream=cupy.cuda.get_current_stream())
