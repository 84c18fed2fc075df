# Short names for the commands of CONTRIBUTING.md.
.PHONY: help lint types smoke test slow docs picture models ci

help:          ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

lint:          ## ruff, and its format
	ruff check . && ruff format --check .

types:         ## mypy
	mypy

smoke:         ## the tests of a commit hook
	pytest -m smoke

test:          ## the quick tests
	pytest

slow:          ## the second tier
	pytest -m slow

docs:          ## the site, to build/site
	mkdocs build --strict

picture:       ## README's picture, from the committed results
	python benchmarks/picture.py benchmarks/results/generate-qwen3-30b-a3b-nvidia_h200-2026-11-23.json docs/images/qwen3-30b-a3b.png

models:        ## docs/models.md, for the installed transformers
	python docs/generate_models.py

ci:            ## everything, in fresh environments
	.ci/run
