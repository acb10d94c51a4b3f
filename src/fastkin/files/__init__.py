"""Records into files, and finished files into S3."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkin.config import Pipeline
    from fastkin.files.client import FileClient


def file_client(pipeline: Pipeline) -> FileClient | None:
    """The client of a pipeline that writes files; None for any other."""
    if not pipeline.file:
        return None
    # Loaded here: who writes no files would have it in memory for nothing.
    from fastkin.files.client import FileClient

    return FileClient(pipeline)
