"""Checkpoints that are written while the training goes on.

A run that is killed meanwhile goes on from the checkpoint before, and nothing that is written beside may rely on more:

- best.safetensors is in its place before its checkpoint begins, and no evaluation begins before a checkpoint has ended.
  So no checkpoint speaks of weights that are not there, and they are ahead of it by one evaluation at most, which a
  resumed run does again.
- Lines of metrics.jsonl are ahead of a checkpoint by what was trained meanwhile; resuming forgets them.
- Checkpoints come one at a time, in their order. Each is whole or not there (`normfree.train.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from normfree.train.checkpoint import save_checkpoint


class Saver:
    """Writes the checkpoints of a folder in a thread of its own, one at a time.

    Whoever reads the folder calls `wait` first. On leaving the context the last one is written, or has failed, which is
    raised, or said where another error is on its way.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self._folder, self._say = folder, say
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if e is None:
            self.wait()
        elif self._writing is not None and (failure := self._writing.exception()) is not None:
            self._say(f"a checkpoint could not be saved: {failure}")

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint in the background, once the one before is written.

        Args:
            step: of the checkpoint.
            tensors: by name; they and the state must not change any more, see `copies`.
            state: plain values.

        Raises:
            OSError: the one before could not be written; those that were there before it are untouched.
        """
        self.wait()
        self._writing = self._thread.submit(save_checkpoint, self._folder, step, tensors, state)

    def check(self) -> None:
        """Raise what has gone wrong in the background, as `begin` does, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is on the disk. Raises as `begin` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that do not change when the originals do."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}
