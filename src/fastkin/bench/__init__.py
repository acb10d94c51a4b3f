"""Load for demos, tests and benches: a simulated plant, a source at full speed. `fastkin-bench` and `fastkin demo`.

Publisher, fastkin and endpoint are processes of their own: in one process each would take from the time that is
measured. runs.py starts and watches them as plan.py says; ledger.py looks each record up; result.py tells.
"""
