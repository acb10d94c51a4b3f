"""From an open batch to an answer: when it closes, what goes next, what waits on disk."""
