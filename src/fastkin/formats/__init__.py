"""What a payload says: partition keys."""
