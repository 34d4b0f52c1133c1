# Two commands do everything on a fresh Debian or Ubuntu: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
SEEDS ?= 200
CUTS ?= 150
PAIRS ?= 5
SCALE ?= 1
ONLY ?=
DAEMONS ?= uvloop,asyncio
DIRECTORY ?=
# Twice the processors: a test waits for disks, clocks and processes about as long as it computes.
WORKERS ?= $(shell n=$$((2 * $$(nproc))); echo $$((n < 16 ? n : 16)))

# What the tests compare with; each is optional, its tests are skipped without it.
PEERS := qemu-utils qemu-system-common nbdkit libnbd-bin python3-libnbd fio socat

.PHONY: all bench chaos demo guest test test-all stress powercut matrix mutants-guards check lint \
	coverage peers clean

all: $(VENV)/.run

$(VENV)/.run: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tools/debian-packages python3-venv
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@$(BIN)/python -m compileall -q liveblockd # where PYTHONDONTWRITEBYTECODE is set, nobody else does
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[test,dev]'
	@touch $@

peers:
	@tools/debian-packages --optional $(PEERS)

demo: $(VENV)/.run
	@$(BIN)/python -m liveblockd.demo

test: $(VENV)/.test peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

test-all: $(VENV)/.test peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

stress: $(VENV)/.test peers
	$(BIN)/python -m tests.simulation.stress --seeds $(SEEDS)

# Every kind of job at once, by QMP, on several drives in use.
chaos: $(VENV)/.test peers
	$(BIN)/python -m tests.simulation.chaos --seeds $(SEEDS)

# Tens of thousands of power cuts, in the middle of guest I/O, streams, snapshots and resizes.
powercut: $(VENV)/.test peers
	$(BIN)/python -m tests.simulation.powercut --seeds $(SEEDS) --cuts $(CUTS)

# Live operations under a Linux guest that works on its file system. Two minutes.
guest: $(VENV)/.test peers
	@tools/debian-packages --optional qemu-system-x86 busybox-static e2fsprogs
	@tools/guest-kernel .guest
	$(BIN)/python -m pytest -n 0 -rs tests/guest

# QEMU's tools and this engine on twins of images of every kind.
matrix: $(VENV)/.test peers
	$(BIN)/python -m tests.support.matrix --seeds $(SEEDS)

# Beside qemu-storage-daemon; writes docs/benchmarks.md (benchmarks/README.md).
bench: $(VENV)/.run peers
	@tools/debian-packages --optional xfsprogs btrfs-progs
	$(BIN)/python -m benchmarks --only '$(ONLY)' --pairs $(PAIRS) --scale $(SCALE) \
		--daemons $(DAEMONS) $(if $(DIRECTORY),--directory '$(DIRECTORY)')

# Takes every check of what an image says out of a copy, and sees a test fail. An hour or so.
mutants-guards: $(VENV)/.test
	$(BIN)/python -m tests.fuzz.guards --jobs 2

check: lint coverage

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(VENV)/.dev peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' \
		--cov --cov-report=term:skip-covered

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* .import_linter_cache
