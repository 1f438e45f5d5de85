# make book    the whole book: sample runs, results, site      make lab       JupyterLab in the book's environment
# make test    tests and chapters                              make clean     remove what `make book` made
# make help    what contributors need besides
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SITE := $(BIN)/python nbs/_site

# The environment is made anew only when the requirements (or the version or the commands) have changed, not whenever
# a file that holds them was touched: the stamp's name is their checksum.
WANTED := $(shell { grep -E '^(version|min_python|    )' settings.ini; grep -E '^scsa' pyproject.toml; cat setup.py; } \
	| cksum | cut -d ' ' -f 1)
STAMP := .venv/installed-$(WANTED)

.PHONY: help book test test-all lab clean pull push execute export readme links

help:
	@echo "make book               the book, with the sample experiments run here"
	@echo "make test               tests and chapters; make test-all also the long ones"
	@echo "make lab                JupyterLab"
	@echo "make clean              remove what make book made (.venv stays)"
	@echo "make pull NB=nbs/a.ipynb    notebook -> text in _txt/; make push: back; make execute: run it"
	@echo "make export             notebooks -> library, then clean the notebooks"
	@echo "make readme             home page -> README.md"
	@echo "make links              repo_url of settings.ini -> notebooks and _quarto.yml"

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer, please" if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the requirements into .venv (the first time this takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@rm -f .venv/installed-*
	@touch $@

book: $(STAMP)
	@$(SITE)/build.py

# One thread a process: two processes share the cores, and figures do not depend on how many there are.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	@echo "the tests and every cell of the chapters passed"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow"
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --flags slow
	@echo "the tests, the long ones too, and every cell of the chapters passed"

lab: $(STAMP)
	$(BIN)/jupyter lab nbs

# Checkpoints of larger runs and downloaded data stay in .cache.
clean:
	rm -rf _docs _preview .quarto .cache/site_* nbs/results/.built
	for run in nbs/results/sample/*.json; do rm -rf ".cache/runs/$$(basename "$$run" .json)"; done
	git clean -q -f -d -X nbs/results/sample

pull push execute: $(STAMP)
	@test -n "$(NB)" || { echo "which notebook? make $@ NB=nbs/channel/se.ipynb"; exit 2; }
	@$(SITE)/text.py $@ $(NB)

export: $(STAMP)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(STAMP)
	@$(SITE)/readme.py

links: $(STAMP)
	@$(SITE)/repository.py
