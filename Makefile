# The menu. Each entry is one script that can also be called by itself.
# `make` alone prints it; `make setup` is part of every entry that needs it.

export PATH := $(CURDIR)/.tools/bin:$(PATH)
# Only what the machine lacks is in .tools (scripts/tools).
export LD_LIBRARY_PATH := $(if $(LD_LIBRARY_PATH),$(LD_LIBRARY_PATH):)$(CURDIR)/.tools/lib

.DEFAULT_GOAL := help
.PHONY: help setup check test demo sim drill soak bench docs

help: ## print this menu
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: ## make .venv and fetch tools into .tools (quick when it is all there)
	@scripts/setup

check: ## format, lint, types, layers, house style
	@scripts/setup
	@scripts/check

test: ## everything CI runs: check, then all tests
	@scripts/setup
	@scripts/check
	@scripts/test

demo: ## a workflow on a real local model, killed with -9 half way, goes on where it was
	@scripts/setup demo
	@scripts/demo

bench: ## measure, in one session, and print the numbers of docs/explanation/performance.md
	@scripts/setup
	@.venv/bin/python -m bench

docs: ## write the generated pages of docs/ again
	@scripts/setup
	@.venv/bin/python scripts/docs.py
	@.venv/bin/python scripts/recovery_docs.py
	@.venv/bin/python scripts/unasync.py

sim: ## seeded simulation in virtual time (SEEDS=2000, FROM=0)
	@scripts/setup
	@.venv/bin/python -m tests.simulation --seeds $(or $(SEEDS),2000) --from $(or $(FROM),0)

soak: ## two nodes under mixed load (MINUTES=10): memory, descriptors, p99, nothing lost
	@scripts/setup
	@.venv/bin/python -m bench.soak --minutes $(or $(MINUTES),10)

drill: ## inject disasters for real, measure the recovery, write the report (REPEAT=N, KILLS=20)
	@scripts/setup
	@KILLS=$(or $(KILLS),20) .venv/bin/pytest -q -n 2 tests/recovery -k "killed or one_dies"
	@.venv/bin/pytest -q tests/drill/sabotage.py
	@code=0; .venv/bin/llmo drill run --all --repeat $(or $(REPEAT),0) \
		--results docs/disaster_recovery/results || code=$$?; \
	.venv/bin/llmo drill report --results docs/disaster_recovery/results \
		--markdown docs/disaster_recovery/RECOVERY_METRICS.md; exit $$code
