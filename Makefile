# Everything runs in .venv, which is made at the first call; after that nothing here needs the network.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# albumentations asks the network for newer releases otherwise
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format typecheck web test-web train-generator train-encoder bundle edits evaluate clean distclean

help: ## List the targets
	@echo "make TARGET [ARGS='...'] [PYTHON=python3.12]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

setup: .venv/.installed ## Make .venv and install what is pinned in constraints.txt (the other targets do it too)
	@:

# The stamp holds what was installed for: a newer date of these files alone installs nothing.
WANTED = cat pyproject.toml constraints.txt | cksum

.venv/.installed: pyproject.toml constraints.txt
	@if [ -f $@ ] && [ "$$(cat $@)" = "$$($(WANTED))" ]; then touch $@; else $(MAKE) --no-print-directory install; fi

.PHONY: install
install:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and \
		"Expected Python 3.11 or newer, $(PYTHON) is " + v + "; name another: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv: some minutes, and some 6 GB where torch comes with CUDA."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@$(WANTED) > .venv/.installed

demo: export HF_HUB_OFFLINE := 1
demo: .venv/.installed ## Upsample the faces in samples/ into demo/
	@$(BIN)/python infer.py samples --out demo --overwrite $(ARGS)
	@echo "demo/*/grid.png shows each face larger, and where its samples disagree."

test: export HF_HUB_OFFLINE := 1
test: .venv/.installed ## Run the tests
	@$(BIN)/python -m pytest -q $(ARGS)

test-all: export AMORTIZED_PULSE_TEST_ALL := 1
test-all: test test-web ## Run the tests, those of the page too, and those that take long in full

lint: .venv/.installed ## Check style, formatting and which package imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

format: .venv/.installed ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

typecheck: .venv/.installed ## Check the types
	@$(BIN)/mypy

# Of onnxruntime-web, pinned in web/package-lock.json by its hash; fetched once.
web/node_modules/.package-lock.json: web/package.json web/package-lock.json
	@npm ci --silent --ignore-scripts --no-audit --no-fund --prefix web
	@touch $@

web: .venv/.installed web/node_modules/.package-lock.json ## Make build/web, the page that upsamples in the browser (npm)
	@$(BIN)/python -m export.page --out build/web --overwrite $(ARGS)

# Why the page cannot be tested here, or nothing.
NO_BROWSER = if ! command -v npm > /dev/null; then echo "npm is not installed (Debian: apt-get install npm)"; \
	elif [ -z "$$CHROMIUM" ] && ! command -v chromium chromium-browser google-chrome > /dev/null; then \
		echo "there is no Chromium (Debian: apt-get install chromium; elsewhere name it in CHROMIUM)"; \
	elif ! $(MAKE) --no-print-directory -s web/node_modules/.package-lock.json > /dev/null 2>&1; then \
		echo "npm could not fetch onnxruntime-web"; fi

test-web: .venv/.installed ## Test the page in a headless Chromium, if there is one
	@reason="$$($(NO_BROWSER))"; if [ -n "$$reason" ]; then echo "test-web: skipped, $$reason"; else \
		$(MAKE) --no-print-directory ARGS= web && \
		AMORTIZED_PULSE_PAGE=build/web $(BIN)/python -m pytest -q tests/test_web_modules.py tests/test_web_page.py $(ARGS); fi

train-generator: .venv/.installed ## Train the 64 px generator; ARGS go to the command line
	$(BIN)/python train.py fit --config configs/stylegan2_64.yaml $(ARGS)

train-encoder: .venv/.installed ## Train the 64 px encoder; ARGS go to the command line
	$(BIN)/python train.py fit --config configs/amortized_64.yaml $(ARGS)

BUNDLE ?= bundles/celeba64

# Given to every step; what is not given is the recipes'.
OF_BUNDLE = $(if $(RESOLUTION),--resolution $(RESOLUTION)) $(if $(GENERATOR),--generator $(GENERATOR)) \
	$(if $(DATA),--data $(DATA)) $(if $(SPLIT),--split $(SPLIT)) $(if $(LABELS),--labels $(LABELS))

bundle: .venv/.installed ## Train all that a bundle holds; RESOLUTION=256 GENERATOR=FILE DATA=ZIP SPLIT=celebahq LABELS=FILE
	@$(BIN)/python -m cli.make_bundle $(OF_BUNDLE)

edits: .venv/.installed ## Train both attribute classifiers, fit the directions of BUNDLE, measure them; resumes after an interruption
	$(BIN)/python train.py fit --config configs/attributes_64.yaml
	$(BIN)/python train.py fit --config configs/attributes_64.yaml --seed_everything 1 --model.backbone regnety_002 \
		--model.options null --trainer.max_steps 7200 --trainer.logger.init_args.name attributes_64_second
	$(BIN)/python -m editing fit --bundle $(BUNDLE) --classifier runs/attributes_64/attributes.safetensors
	$(BIN)/python benchmarks/editing.py --bundle $(BUNDLE) \
		--classifier runs/attributes_64_second/attributes.safetensors --overwrite

evaluate: .venv/.installed ## Compare all methods on the same faces; ARGS go to the command line
	$(BIN)/python evaluate.py $(ARGS)

clean: ## Remove caches, demo/ and build/; runs/ and .venv stay
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and what npm fetched as well; runs/ stays
	rm -rf .venv web/node_modules
