"""What others found: README.md has the table."""
