"""Records into files, and finished files into S3."""
