# Every target does its own set-up; `ci/setup` says what it installs and is quick when nothing changed.
.PHONY: help setup build demo unit test faults simulate lint bench soak fuzz clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## everything the tests need: system packages, .venv, .servers
	@ci/setup test

build: ## fastkin and what it needs to run, in .venv
	@ci/setup run

demo: build ## a simulated plant through a broker into an emulated stream, with a ledger at the end
	.venv/bin/fastkin demo

unit: setup ## the first look after a change: tests that start no process, without those of tests/outsiders
	.venv/bin/python -m pytest -n 4 --dist worksteal -m "not process" --ignore=tests/outsiders

test: setup ## the tests, against mosquitto, kinesalite and kinesis-mock
	.venv/bin/python -m pytest -n 3 --dist worksteal

faults: setup ## the ledger suite: every fault case and 300 random combinations, every record accounted for
	.venv/bin/python tests/faults/run

simulate: setup ## the real stages on virtual time: SEEDS=FROM:TO, each replays exactly; tests/simulation/run.py says how
	tests/simulation/run --seeds $(or $(SEEDS),0:2000) --marks

lint: setup ## formatting, style, Cython's warnings, types and stubs
	ci/lint

bench: setup ## the benches, peers beside us in the same run
	.venv/bin/python -m pytest benches

soak: build ## ten minutes at 100 messages a second: 60,000 records looked up, CPU share, growth of memory
	.venv/bin/fastkin-bench soak --rate 100 --count 60000 --interval 10

fuzz: setup ## coverage-guided fuzzing: SECONDS=60 each or RUNS=N each, JOBS=2, TARGETS="frame mqtt", MERGE=1
	ci/variant fuzz --seconds $(or $(filter-out 0,$(SECONDS)),60) --runs $(or $(RUNS),0) --jobs $(or $(JOBS),2) $(if $(MERGE),--merge) $(TARGETS)

clean: ## what was built and cached; .venv and .servers stay
	rm -rf build dist .coverage* .hypothesis .benchmarks .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
	find src/fastkin -name "*.so" -delete; rm -f src/fastkin/_codec.c src/fastkin/mqtt/_core.c src/fastkin/*.html src/fastkin/mqtt/*.html .venv/built
