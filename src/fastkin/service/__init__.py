"""`fastkin run` and Engine: pipelines side by side, reloads, signals to systemd."""
