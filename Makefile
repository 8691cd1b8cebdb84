# The README's commands. `make help` lists them.
PY := .venv/bin/python
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONFIG ?= $(if $(GPU),deploy/config/gpu.yaml,deploy/config/demo.yaml)

.PHONY: setup serve serve-sim serve-kserve test test-kserve test-kserve-engine canary-live test-deploy manifests test-unit test-serve test-engine test-elastic test-elastic-engine chaos chaos-engine fuzz soak check lint format lock docs clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: ## install everything and prepare the demo model (quick the second time)
	@scripts/setup.sh

serve: setup ## serve the demo model on one prefill and one decode worker; CONFIG=FILE for another
	@exec .venv/bin/baton serve --config $(CONFIG)

serve-sim: setup ## the same on simulated engines: up in seconds
	@exec .venv/bin/baton serve --config deploy/config/sim.yaml

serve-kserve: setup ## the same behind KServe's protocols, everything in one process, on port 8080
	@exec .venv/bin/python -m kserve_adapter --config_file $(CONFIG) --host 127.0.0.1

test: setup lint test-unit test-serve test-engine ## everything: lint, unit, Ray with simulated engines, real engines

test-unit: ## pure tests, no Ray
	@echo "== unit tests"
	@$(PY) -m pytest tests/unit tests/deploy -q

test-serve: ## real Ray Serve with simulated engines
	@echo "== Ray Serve with simulated engines"
	@$(PY) -m pytest tests/serve -q
	@$(PY) -m pytest tests/elastic/test_elastic.py -q

test-engine: ## real vLLM engines
	@echo "== real vLLM engines"
	@$(PY) -m pytest tests/engine -q

test-elastic: ## pools that scale, on Ray with simulated engines: all of it, and a real Prometheus
	@$(PY) -m pytest tests/elastic -q -m "not engines"

test-elastic-engine: ## real vLLM engines that scale: from 1+1 to 2 decode workers and back under load
	@$(PY) -m pytest tests/elastic/test_real_engines.py -q -m engines -s

chaos: ## deaths, hangs, lost messages: in one process, on real Ray, and bad bodies; BATON_CHAOS_SEED replays
	@echo "== chaos"
	@$(PY) -m pytest tests/chaos/test_in_process.py tests/chaos/test_admission.py tests/chaos/test_refusals.py \
	  tests/chaos/test_network.py tests/chaos/test_front_ends.py tests/fuzz tests/chaos/test_ray.py \
	  tests/chaos/test_drain.py -q -rP --show-capture=stdout

chaos-engine: ## kills of real vLLM engines, ten of each kind: takes an hour; BATON_CHAOS_KILLS for fewer
	@$(PY) -m pytest tests/chaos/test_engine.py -q -s

fuzz: ## ten thousand mutated bodies and a thousand requests from the schema
	@BATON_FUZZ_BODIES=$${BATON_FUZZ_BODIES:-10000} BATON_FUZZ_EXAMPLES=$${BATON_FUZZ_EXAMPLES:-100} \
	  $(PY) -m pytest tests/fuzz -q -rP --show-capture=stdout

soak: ## twenty minutes of steady load with a kill every 20 s: memory, descriptors, failures
	@$(PY) -m tests.chaos.soak

test-kserve: ## KServe's protocols and a predictor's life, on Ray with simulated engines
	@echo "== KServe"
	@$(PY) -m pytest tests/kserve -q

test-kserve-engine: ## the same on real vLLM engines, as far as one machine can
	@BATON_KSERVE_ENGINE=vllm $(PY) -m pytest tests/kserve -q

canary-live: ## two revisions under traffic that a real Envoy splits, a real Prometheus, the judge: needs both installed
	@$(PY) -m pytest tests/canary/test_live.py -q

test-deploy: ## manifests, chart and overlays; stores of weights; the canary's judge
	@echo "== manifests"
	@$(PY) -m pytest tests/deploy tests/storage tests/canary/test_judge.py -q

manifests: ## write deploy/chart/presets from the code
	@$(PY) -m kserve_adapter.manifest.presets deploy/chart/presets

check: lint test-unit ## what to run before each commit

lint: ## ruff, mypy, import-linter, generated docs up to date
	@echo "== lint"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: ## format the code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

docs: ## write the settings, the metrics and the PrometheusRule from their sources
	@$(PY) -m runtime.config_reference > docs/configuration.md
	@$(PY) -m runtime.metric_reference > docs/metrics.md
	@$(PY) scripts/prometheus_rule.py > deploy/alerts/prometheusrule.yaml
	@$(PY) -m kserve_adapter.manifest.reference > docs/kubernetes.md

lock: ## resolve requirements/*.lock anew (needs uv)
	uv pip compile requirements/cpu.in --override requirements/overrides.txt --generate-hashes --python-version 3.11 \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  --index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match -o requirements/cpu.lock
	uv pip compile requirements/tools.in --generate-hashes --python-version 3.11 \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o requirements/tools.lock

clean: ## remove the environment and all caches of the project
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
