"""From an open batch to an answer: when it may go, what goes next, what waits on disk."""
