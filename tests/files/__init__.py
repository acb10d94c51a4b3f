"""Tests of fastkin.files: parts, finished files, what goes to S3."""
