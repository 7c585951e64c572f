# Everything that is done to this project, and what it needs for that.
#
# The targets set themselves up: a virtual environment in .venv, the packages from PyPI that the
# target needs, the native module. What has been done is remembered by empty files (stamps) in .venv,
# so the next run starts at once, and a change in a C, Cython or setup file redoes what depends on
# it. A machine needs python3 with venv and its headers, gcc and make.

PYTHON ?= python3
VENV ?= .venv
BUILD := build
ARGS ?=
ifeq ($(origin CC),default)
CC := gcc
endif

PY := $(VENV)/bin/python
INSTALL := flock $(VENV)/.key $(PY) -m pip install --quiet --disable-pip-version-check

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

##@ Use

.PHONY: run
run: $(VENV)/.native $(VENV)/.examples ## Start a fabric with a coordinator and hosts, and run the demonstration on it
	PYTHON=$(abspath $(PY)) PATH="$(abspath $(VENV)/bin):$$PATH" scripts/run_fabric.sh $(ARGS)

.PHONY: social
social: $(VENV)/.native $(VENV)/.social ## Run the social network: fill it, check it, compare by value and by reference; HTTP is on while it runs
	$(PY) -m examples.social_network $(if $(ARGS),-- $(ARGS))

.PHONY: examples
examples: $(VENV)/.native $(VENV)/.examples $(VENV)/.social ## Run every program of examples/ with its default arguments
	@for module in $(EXAMPLES); do echo "== $$module"; $(PY) -m $$module; done

.PHONY: bench
bench: $(VENV)/.native $(VENV)/.bench ## Measure, and print ratios [ARGS="..." is handed on]
	$(PY) -m benchmarks.bench $(ARGS)

.PHONY: figures figures-quick figures-clusters
FIGURES := $(VENV)/.native $(VENV)/.examples $(VENV)/.social $(VENV)/.figures
figures: $(FIGURES) ## Run the paper's experiments, write docs/results.md and its pictures; 40 minutes [ARGS="--only fig07"]
	$(PY) -m benchmarks.figures --publish $(ARGS)
figures-quick: $(FIGURES) ## The same with fewer points, into build/figures only; 4 minutes
	$(PY) -m benchmarks.figures --quick $(ARGS)
figures-clusters: $(FIGURES) $(VENV)/.ray $(VENV)/.spark ## The same as figures, beside Ray and Spark, which are installed
	$(PY) -m benchmarks.figures --publish $(ARGS)

##@ Test

.PHONY: test
test: $(VENV)/.native $(VENV)/.test $(VENV)/.examples $(VENV)/.social $(VENV)/.redis $(VENV)/.figures ctest ## Run the C unit tests, then pytest [ARGS="-k name" is handed on to pytest]
	$(PY) -m pytest $(ARGS)

.PHONY: ctest asan tsan
ctest: c-plain ## Run the C unit tests, tests/c/test_*.c
asan: c-asan ## Run the C unit tests under AddressSanitizer and UndefinedBehaviorSanitizer
tsan: c-tsan ## Run the C unit tests under ThreadSanitizer

.PHONY: fuzz
fuzz: $(VENV)/.native $(VENV)/.test ## Let the fuzz tests look for much longer than `make test` does
	$(PY) -m pytest tests/fuzz -m "slow or not slow" --hypothesis-profile=campaign \
		-o faulthandler_timeout=0 $(ARGS)

FUZZ_SECONDS ?= 60
.PHONY: fuzz-rpc
fuzz-rpc: $(VENV)/.native $(VENV)/.fuzz ## Look for bytes that the RPC layer stumbles over, guided by coverage [FUZZ_SECONDS=60]
	@mkdir -p $(BUILD)/fuzz-rpc/corpus
	$(PY) scripts/fuzz_rpc.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=2048 \
		-timeout=10 -artifact_prefix=$(BUILD)/fuzz-rpc/ $(ARGS) $(BUILD)/fuzz-rpc/corpus

.PHONY: soak
soak: $(VENV)/.native ## Kill and stop hosts and coordinators at random while they work, for long [ARGS="--kills 10000 --seed N"]
	$(PY) -m tests.soak $(ARGS)

.PHONY: slow
slow: $(VENV)/.native $(VENV)/.test $(VENV)/.figures ## Run the tests marked slow, which `make test` leaves out
	$(PY) -m pytest -m slow -o faulthandler_timeout=0 $(ARGS)

.PHONY: crash
crash: $(VENV)/.native $(VENV)/.test ## Kill somebody behind every labelled step, in every act that passes it; 4 minutes [ARGS="-k callee"]
	$(PY) -m pytest tests/crash -m "crash or not crash" -o faulthandler_timeout=0 $(ARGS)

.PHONY: crash-survey
crash-survey: $(VENV)/.native $(VENV)/.test ## Write down which labels the acts of tests/crash pass, after a change of either
	$(PY) -m tests.crash.survey

##@ Check

.PHONY: check
check: check-format check-lint check-types check-c check-model asan tsan ## Run every check below and the sanitizers

.PHONY: check-format
check-format: $(VENV)/.dev ## Compare the layout of Python and C with what the formatters would make of it
	$(PY) -m ruff format --check .
	$(if $(C_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES))

.PHONY: check-lint
check-lint: $(VENV)/.dev ## Lint the Python
	$(PY) -m ruff check .

.PHONY: check-types
check-types: $(VENV)/.native $(VENV)/.dev $(VENV)/.test $(VENV)/.social $(VENV)/.figures ## Check the types: mypy, strict on the packages
	$(PY) scripts/check_types.py

.PHONY: check-c
check-c: c-strict ## Compile the C with warnings as errors

.PHONY: check-model
check-model: $(VENV)/.created ## Explore the model of the protocol: every interleaving, a crash at each step
	$(PY) -m docs.model.check

.PHONY: model
model: $(VENV)/.created ## Explore a bigger model, or the seeded mistakes [ARGS="--hosts 3", "--mistakes"]
	$(PY) -m docs.model.check $(or $(ARGS),--ops 1)

.PHONY: format
format: $(VENV)/.dev ## Lay out Python and C, and repair what the linter can
	$(PY) -m ruff check --fix --exit-zero --quiet .
	$(PY) -m ruff format .
	$(if $(C_FILES),$(VENV)/bin/clang-format -i $(C_FILES))

##@ Keep house

.PHONY: build
build: $(VENV)/.native ## Make .venv with the package in it, and the native module

.PHONY: clean
clean: ## Remove all that make made, the virtual environment included
	rm -rf $(VENV) $(BUILD) dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f dmrpc_cxl/_native*.so dmrpc_net/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------- the virtual environment
#
#   .key <- .created <- .package <- .native
#           .created <- .test, .dev, .examples, ... one for each extra of setup.cfg
#
# Two files are rewritten only when their content changes, so what depends on them is redone only
# then: .key, where and for which Python the environment was made (it survives neither a move nor
# another Python), and .packages, the folders that an editable installation maps.

EXAMPLES = $(sort $(subst /,.,$(basename $(patsubst %/__main__.py,%,\
	$(wildcard examples/[a-z]*.py examples/[a-z]*/__main__.py)))))
PACKAGES = $(patsubst %/__init__.py,%,$(wildcard dmrpc_cxl/__init__.py dmrpc_net/__init__.py \
	coordinator/__init__.py fabric/__init__.py pyuserfaultfd/__init__.py))
NATIVE_SOURCES = $(wildcard $(foreach package,dmrpc_cxl dmrpc_net,\
	$(package)/*.pyx $(package)/*.pxd $(package)/*.pxi $(package)/csrc/*.[ch]))

.PHONY: FORCE
FORCE:

$(VENV)/.key: FORCE
	@key="$(CURDIR) $$($(PYTHON) -c 'import sys; print(sys.version.split()[0], sys.base_prefix)')"; \
	if [ "$$key" != "$$(cat $@ 2>/dev/null)" ]; then \
		if [ -e $@ ]; then rm -rf $(VENV); fi; \
		mkdir -p $(VENV); echo "$$key" >$@; \
	fi

$(VENV)/.created: $(VENV)/.key
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot: on Debian and Ubuntu, install python3-venv and python3-dev" >&2; \
		exit 1; \
	}
	@touch $@

$(VENV)/.packages: FORCE $(VENV)/.created
	@echo "$(PACKAGES)" | cmp -s - $@ || echo "$(PACKAGES)" >$@

$(VENV)/.package: $(VENV)/.created $(VENV)/.packages setup.py setup.cfg pyproject.toml
	@echo "Installing the package and what it needs"
	@$(PY) scripts/requirements.py build run | $(INSTALL) -r /dev/stdin
	@$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# setup.py knows what is out of date; this rule only knows when to ask it.
$(VENV)/.native: $(VENV)/.package $(NATIVE_SOURCES)
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

EXTRAS := test dev examples social redis bench fuzz figures ray spark
$(EXTRAS:%=$(VENV)/.%): $(VENV)/.created setup.cfg
	@echo "Installing the $(@F:.%=%) tools"
	@$(PY) scripts/requirements.py $(@F:.%=%) | $(INSTALL) -r /dev/stdin
	@touch $@

# ---------------------------------------------------------------- C unit tests
#
# Each variant compiles all of both csrc folders into one library below build/c/VARIANT, and links
# each tests/c/test_*.c with the other files of tests/c and those objects of the library that it calls
# for. So no two files of the folders have the same name.

C_FOLDERS := dmrpc_cxl/csrc dmrpc_net/csrc
C_FILES = $(wildcard $(C_FOLDERS:%=%/*.[ch]) tests/c/*.[ch] benchmarks/*.[ch])
C_SOURCES = $(wildcard $(C_FOLDERS:%=%/*.c))
C_TESTS = $(sort $(wildcard tests/c/test_*.c))
C_SHARED = $(filter-out tests/c/test_%,$(wildcard tests/c/*.c))

C_WARNINGS := -Wall -Wextra
C_FLAGS := -std=gnu11 -g $(C_WARNINGS) -fvisibility=hidden -pthread $(C_FOLDERS:%=-I%) -Itests/c
C_FLAGS_plain := -O2
C_FLAGS_strict := -O2 -Werror
C_FLAGS_asan := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
C_FLAGS_tsan := -O1 -fno-omit-frame-pointer -fsanitize=thread

# $(call c_objects,VARIANT,SOURCES)
c_objects = $(patsubst %.c,$(BUILD)/c/$(1)/%.o,$(2))

define C_VARIANT
$(BUILD)/c/$(1)/%.o: %.c Makefile
	@mkdir -p $$(@D)
	@echo "cc ($(1)) $$<"
	@$$(CC) $(C_FLAGS) $(C_FLAGS_$(1)) $$(CFLAGS) -MMD -MP -c -o $$@ $$<

# The folder: its time changes when a file goes, whose object then has to go as well.
$(BUILD)/c/$(1)/libdmrpc.a: $(call c_objects,$(1),$(C_SOURCES)) $(C_FOLDERS)
	@mkdir -p $$(@D)
	@rm -f $$@
	@ar rcs $$@ $$(filter %.o,$$^)

$(C_TESTS:%.c=$(BUILD)/c/$(1)/%): %: %.o $(call c_objects,$(1),$(C_SHARED)) $(BUILD)/c/$(1)/libdmrpc.a
	@$$(CC) $(C_FLAGS_$(1)) -pthread -o $$@ $$^

-include $$(wildcard $(BUILD)/c/$(1)/*/*.d $(BUILD)/c/$(1)/*/*/*.d)
endef
$(foreach variant,plain strict asan tsan,$(eval $(call C_VARIANT,$(variant))))

.PHONY: c-strict
c-strict: $(call c_objects,strict,$(C_SOURCES) $(C_TESTS) $(C_SHARED))

define C_RUN
.PHONY: c-$(1)
c-$(1): $(C_TESTS:%.c=$(BUILD)/c/$(1)/%)
	@scripts/run_c_tests.sh $(1) $$^
endef
$(foreach variant,plain asan tsan,$(eval $(call C_RUN,$(variant))))

.SECONDARY:
