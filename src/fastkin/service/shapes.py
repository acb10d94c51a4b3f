"""What becomes of the records of a pipeline before they are stored: its settings as one compiled object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin._codec import Shape

if TYPE_CHECKING:
    from fastkin.config import Pipeline


def shape_of(pipeline: Pipeline) -> Shape | None:
    """None: records are stored as they come, and no one is asked."""
    if not (pipeline.topic_field or pipeline.separator):
        return None
    return Shape(
        topic_field=pipeline.topic_field,
        topic_clash=pipeline.topic_clash,
        topic_others=pipeline.topic_others,
        separator=pipeline.separator,
    )
