"""One module per command. Each imports what it needs, so that `fastkin run` stays small."""
