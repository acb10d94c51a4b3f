"""What can never be stored: when it is settled, its file, its stream."""
