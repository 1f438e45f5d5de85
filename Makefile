# make book    the whole book: sample runs, results, site      make lab       JupyterLab in the book's environment
# make test    tests and chapters                              make clean     remove the files of `make book`
# make help    further commands for contributors
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SITE := $(BIN)/python nbs/_site

# The environment is installed again only when the requirements (or the version or the commands) have changed, not
# whenever the file with them was touched: the name of the stamp is their checksum.
WANTED := $(shell { grep -E '^(version|min_python|    )' settings.ini; grep -E '^scsa' pyproject.toml; cat setup.py; } \
	| cksum | cut -d ' ' -f 1)
STAMP := .venv/installed-$(WANTED)
ALL := .venv/all-installed-$(WANTED)

# Byte code is kept, whatever the shell asks for: without it every process compiles all of PyTorch anew, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE
CORES := $(shell getconf _NPROCESSORS_ONLN)
.PHONY: help book test test-all check-tests check-chapters check-kernels lab clean pull push execute export readme links

help:
	@echo "make book               build the book, including the sample experiments"
	@echo "make test               run tests and chapters; make test-all also the long tests"
	@echo "make lab                JupyterLab"
	@echo "make clean              remove the files of make book (.venv stays)"
	@echo "make pull NB=nbs/a.ipynb    notebook -> text in _txt/; make push: text -> notebook; make execute: run it"
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

# The long tests also write files for the runtimes that `deploy` names.
$(ALL): $(STAMP)
	@echo "installing the runtimes into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev,deploy]'
	@rm -f .venv/all-installed-*
	@touch $@

book: $(STAMP)
	@$(SITE)/build.py

# Tests and chapters side by side: while one waits, another has its core. One thread a process; figures do not depend
# on how many there are.
CHECKS = $(MAKE) --no-print-directory --jobs 3 --keep-going check-tests check-chapters check-kernels
SLOW :=

test test-all: export OMP_NUM_THREADS = 1
test: $(STAMP)
	@$(CHECKS)
	@echo "the tests and every cell of the chapters passed"

test-all: $(ALL)
	@$(CHECKS) SLOW=yes
	tests/slurm/run.sh || test $$? -eq 77  # 77: SLURM is not installed
	@echo "the tests, the long ones too, and every cell of the chapters passed"

# A test file stays in one process, so that what its tests share is made once; tests/conftest.py says which come first.
check-tests:
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder $(if $(SLOW),-m "slow or not slow")

# As many processes as half of the cores: the tests have one a core. Each chapter has a thread of its own, and without the
# limit also memory of its own, which nobody gets back: six gigabytes in the end.
check-chapters: export MALLOC_ARENA_MAX = 1
check-chapters:
	$(SITE)/chapters.py --n-workers $(shell expr \( $(CORES) + 1 \) / 2) --skip-file-glob 'gpu*.ipynb' \
		$(if $(SLOW),--flags slow)

# Chapters of kernels for a GPU, in a process where Triton interprets from its import on.
check-kernels:
	TRITON_INTERPRET=1 $(SITE)/chapters.py --n-workers 1 --file-glob 'gpu*.ipynb'

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
