"""Load for demos, tests and benches: a simulated plant, a source at full speed."""
