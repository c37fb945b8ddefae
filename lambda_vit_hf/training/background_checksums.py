"""A checkpoint's `SHA256SUMS`, written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..models.checksums import write_checksums


class BackgroundChecksums:
    """
    One list at a time, by a thread: hashing and writing to disk let go of Python's lock. Whoever writes the next
    checkpoint, deletes old ones or reads a list waits first.
    """

    def __init__(self):
        self._running: Future | None = None

    def start(self, checkpoint: Path) -> None:
        """List a checkpoint in which everything is written, once the one before is listed."""
        self.wait()
        with_one_thread = ThreadPoolExecutor(max_workers=1)
        self._running = with_one_thread.submit(write_checksums, checkpoint)
        with_one_thread.shutdown(wait=False)

    def wait(self) -> None:
        """
        Until the list is there.

        Raises:
            OSError: if it could not be written. The checkpoint is whole, and has no list.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()
