# Everything a contributor and CI run. The first target that needs it makes .venv; pip's own settings are honored.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

.PHONY: demo test sweeps nightly card card-real attempts lint e2e bench rounding fuzz mutants coverage publish-kills publish-layouts verify-changes tensor-maps forward-sweep servers schemas pictures docs \
	clean help

help:
	@echo "make demo    install, then watch the gate judge good and broken adapters"
	@echo "make test    the tests, with a sample of each sweep (10 minutes on 2 cores, next to make e2e)"
	@echo "make sweeps  the rest of the sweeps, and all examples of the properties (ten minutes on 2 cores)"
	@echo "make nightly what takes longer: every broken value of every method, large fleets, Ray, kills (four hours at most)"
	@echo "make card    a simulated GPU against the CPU: a fifth of the cases, or all with CARD=all; needs g++ (four minutes)"
	@echo "make card-real the same on a real GPU, and the benchmarks there; prints a table; needs CUDA (two hours)"
	@echo "make attempts the tests of what outsiders tried, with a table of them (three minutes)"
	@echo "make lint    ruff, mypy, import-linter; shows prose that breaks the language rules"
	@echo "make e2e     real workflows and containers (needs root on Debian; see .ci/install-e2e.sh)"
	@echo "make bench   the benchmarks of benchmarks/README.md"
	@echo "make rounding what rounding takes from trained adapters, next to a loss (an hour)"
	@echo "make mutants small changes of the code that judges: does a test fail? (an hour)"
	@echo "make coverage branches that the tests take (an hour)"
	@echo "make fuzz    FUZZ_SECONDS (an hour) for each parser of what strangers write"
	@echo "make publish-kills 200 kills while models are published, and runs that publish one name (a quarter of an hour)"
	@echo "make publish-layouts a published change of every model type with converted tensors (ten minutes)"
	@echo "make verify-changes 10,000 random changes of a published directory, which verify must name (half an hour)"
	@echo "make tensor-maps what transformers loads of every model type, against the gate's tensor map (an hour)"
	@echo "make forward-sweep every model type on made-up inputs, alone, in lockstep and merged (half an hour)"
	@echo "make servers what vLLM and llama.cpp apply of adapters and of their exports (half an hour)"
	@echo "make schemas writes again what is made from the code: the JSON Schemas, tables in the documents"
	@echo "make pictures the pictures of the README and the documents, from the demo's run (needs Chromium)"
	@echo "make docs    the documentation's site, in site/ (a minute)"
	@echo "make clean   removes $(VENV) and all output"

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "merge-gate needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/run: $(STAMPS)/venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(STAMPS)/test: $(STAMPS)/run
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(STAMPS)/lint: $(STAMPS)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	touch $@

$(STAMPS)/docs: $(STAMPS)/run
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(STAMPS)/e2e: $(STAMPS)/test $(STAMPS)/docs
	$(BIN)/python -m pip install --quiet --editable '.[test,e2e]'
	touch $@

# What all of them need, at once: pip takes as long for each.
$(STAMPS)/all: $(STAMPS)/run
	$(BIN)/python -m pip install --quiet --editable '.[test,lint,docs,e2e]'
	for one in test lint docs e2e all; do touch $(STAMPS)/$$one; done

demo: $(STAMPS)/run
	$(BIN)/merge-gate demo merge-gate-demo

# One process of tests per core, at most 8: each of them imports torch. WORKERS=0 runs all tests in one process.
# ORDER=random shuffles the files, and the tests in each; pytest prints the seed, and ORDER=SEED repeats that order.
WORKERS ?= logical
ORDER ?=
IN_PROCESSES = --numprocesses $(WORKERS) --maxprocesses 8 --durations 10
PYTEST = $(BIN)/python -m pytest --ignore=tests/e2e --ignore=tests/card $(IN_PROCESSES) \
	$(if $(ORDER),-p randomly $(if $(filter random,$(ORDER)),,--randomly-seed $(ORDER)))

test: $(STAMPS)/test
	$(PYTEST) -m "not slow and not nightly" --hypothesis-profile fast

# The rest of the sweeps. `make test` tries properties with few examples, and here they have all of them.
sweeps: $(STAMPS)/test
	$(PYTEST) -m "(slow or hypothesis) and not nightly"

nightly: $(STAMPS)/test
	$(PYTEST) -m nightly

# The library is built first, so that a missing compiler is an error.
CARD ?= fifth
card: $(STAMPS)/test
	$(BIN)/python -m tests.support.card.build
	CARD=$(CARD) $(BIN)/python -m pytest tests/card $(IN_PROCESSES)

# All fleets and the benchmarks on the GPU that torch sees. Other cases and parts: CARD_REAL="--fleets methods-float32"
CARD_REAL ?=
card-real: $(STAMPS)/test
	$(BIN)/python -m tests.tools.card_real $(CARD_REAL)

# Prints the table of what outsiders tried, from the tests that repeat it.
attempts: $(STAMPS)/test
	$(PYTEST) -m attempt --attempts

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.tools.prose

e2e: $(STAMPS)/e2e
	$(BIN)/python -m pytest tests/e2e -m e2e

BENCH ?=
bench: $(STAMPS)/test
	$(BIN)/python benchmarks/run.py $(BENCH)

# Trains adapters of two small bases of PyPI in .rounding/, and writes the table of docs/evidence/truth.md.
rounding: $(STAMPS)/test
	$(BIN)/python benchmarks/rounding.py --write

FUZZ_SECONDS ?= 3600
fuzz: $(STAMPS)/test
	$(BIN)/python tests/tools/fuzz.py --seconds $(FUZZ_SECONDS)

$(STAMPS)/mutants: $(STAMPS)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,mutants]'
	touch $@

# Of one part: make mutants PARTS=judging
PARTS ?= judging preflight config
mutants: $(STAMPS)/mutants
	for part in $(PARTS); do $(BIN)/python tests/tools/mutants.py $$part --show || exit; done

$(STAMPS)/coverage: $(STAMPS)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,coverage]'
	touch $@

# Branches of all that imports no torch; what the tests start is measured too, except Ray's own processes, whose tests
# have no branch to themselves.
WITH_TORCH := tests/card tests/e2e tests/engine tests/test_methods.py tests/__pycache__
MEASURED := $(filter-out $(WITH_TORCH),$(patsubst %/,%,$(wildcard tests/*/)) $(wildcard tests/test_*.py))
coverage: $(STAMPS)/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m "not cuda" --ignore=tests/features/ray/test_ray.py --ignore=tests/run/test_every_way.py $(MEASURED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

publish-kills: $(STAMPS)/test
	$(BIN)/python -m tests.tools.publish_kills --kills 200 --real 10

publish-layouts: $(STAMPS)/test
	$(BIN)/python -m tests.tools.publish_layouts --write

verify-changes: $(STAMPS)/test
	$(BIN)/python -m tests.tools.verify_changes 10000

tensor-maps: $(STAMPS)/test
	$(BIN)/python -m tests.tools.tensor_maps --write

forward-sweep: $(STAMPS)/test
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/forward.py --write

# Serves adapters without merging them; the servers have an environment of their own in build/servers, of 4 GB.
servers: $(STAMPS)/test
	$(BIN)/python benchmarks/servers.py --work build/servers
	$(BIN)/python benchmarks/servers.py --work build/servers --write

# The JSON Schemas and every table of the documents that is made from the code.
schemas: $(STAMPS)/test
	UPDATE_GOLDENS=1 $(BIN)/python -m pytest -q -k "stored_schema or schema_file or tables_of_fields or table_of_checks_is or table_of_policies or table_of_the_models or docstring_of_its_check or number_of_checks or copy_of_them or table_of_the_kinds or table_of_the_expected or the_reference_of or index_has_every_page" \
		tests/config tests/report/test_report_files.py tests/features/publish/test_attestations_page.py tests/report/test_json_report.py tests/test_docs.py tests/test_reference.py tests/features/verify/test_docs.py

# The pictures of README.md and docs/, from a real run; Chromium comes from .ci/install-e2e.sh.
pictures: $(STAMPS)/e2e
	$(BIN)/python -m tests.tools.pictures

# Strict: a broken link or anchor fails.
docs: $(STAMPS)/docs
	$(BIN)/python -m website.build

clean:
	rm -rf $(VENV) merge-gate-demo merge-gate-report merge-gate-verify build dist site src/*.egg-info
