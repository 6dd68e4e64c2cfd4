# Everything runs in .venv, built from requirements.txt on first use (about 3 minutes, 6 GB: torch with CUDA).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
DEMO ?= workdirs/demo
N ?= 1000
# As many as the machine has; each takes some GB. A caller's OMP_NUM_THREADS has nothing to do with it.
CORES ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 2)
# Where it is set, nothing that Python compiles is kept, and every process compiles anew what it imports, for 20 s.
unexport PYTHONDONTWRITEBYTECODE
# Small nets on a few cores are fastest with one thread per process; see docs/performance.md.
TEST_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
# Tests of a module mostly stay in one process, where its fixtures and imports are made once.
SHARED := -n $(CORES) --dist worksteal

.PHONY: demo docs browser test test-slow test-slurm test-wheel test-torchtext test-oldest fuzz torture study-tiny nets lint bench clean

# Modules are compiled when they are imported: to compile all 19,000 takes two minutes.
.venv/installed: requirements.txt requirements-nodeps.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	  --dest .venv/share/attrib vaderSentiment==3.3.2  # the movie snippets lie in its source archive only
	touch $@

demo: .venv/installed  ## real photographs, a real network, four methods, two metrics, a table and a report
	$(BIN)/attrib run -m run.root=$(DEMO) method=random,integrated_gradients,grad_cam,iba \
	  metric.insertion_deletion.steps=16 run.png=true
	$(BIN)/attrib table $(DEMO) --wide
	$(BIN)/attrib report $(DEMO) --out $(DEMO)/report.html

test: .venv/installed  ## everything but the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" $(SHARED)

fuzz: .venv/installed  ## N=1000 random nets against every method: right, refused (by reason) or wrong (with the seeds)
	$(TEST_ENV) PYTHONPATH=. $(BIN)/python tests/fuzz.py --count $(N) --jobs 2

torture: .venv/installed  ## N=500 faults of a disk at every place of a run, a training, a repair, an export: none does harm (needs gcc)
	$(TEST_ENV) PYTHONPATH=.:tests $(BIN)/python tests/torture.py --count $(if $(filter file,$(origin N)),500,$(N)) \
	  --folder $$(mktemp -d)

study-tiny: .venv/installed  ## the study on small data that come with pip: every command, every finding (FOLDER=)
	$(TEST_ENV) $(BIN)/attrib paper study_2026 paper.size=tiny run.root=$(or $(FOLDER),$(shell mktemp -d)) run.progress=false

nets: .venv/installed  ## docs/nets.md: some 50 architectures against every method (an hour of a core; goes on where it was stopped)
	$(TEST_ENV) PYTHONPATH=. $(BIN)/python tests/net_table.py --out docs/nets.md

test-slow: .venv/installed  ## end-to-end checks of minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(SHARED)

test-slurm: .venv/installed  ## arrays on a real Slurm, killed, preempted and timed out (root on Debian, else skipped; 3 min)
	tests/slurm/run.sh

test-wheel: .venv/installed  ## the wheel alone, from an empty folder (1 min)
	tests/wheel/run.sh

test-torchtext:  ## our tokenizer and vocabulary against the real torchtext, in an environment of its own (2 min)
	$(PYTHON) -m venv .venv-torchtext
	.venv-torchtext/bin/pip install --quiet --disable-pip-version-check -r requirements-torchtext.txt
	PYTHONPATH=. .venv-torchtext/bin/python -m pytest -q -c /dev/null --rootdir . --noconftest tests/torchtext_check.py

test-oldest: .venv/installed  ## the tests with the oldest packages that pyproject.toml allows (torch 2.4) on Python 3.12, in an environment of its own (20 min)
	python3.12 -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	  -e '.[demo,text,train,quantus,coco,attacks,study,slurm,docs,test]'
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --no-deps -r requirements-nodeps.txt
	mkdir -p .venv-oldest/share && cp -r .venv/share/attrib .venv-oldest/share/
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -m "not slow" $(SHARED) -o filterwarnings=default

docs: .venv/installed  ## the site, in site/; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	! grep -rlE --include='*.html' '<(script|img|iframe)[^>]* src="(https?:)?//|<link[^>]* rel="(stylesheet|preconnect)"[^>]*href="(https?:)?//' site

browser: docs  ## the site, and REPORT=a/report.html, in headless Chromium at two widths (apt-get install chromium; 2 min)
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install --quiet --disable-pip-version-check playwright==1.65.2
	.venv-browser/bin/python tests/browser_check.py site $(REPORT)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed  ## speed as ratios to plain loops in the same run
	$(BIN)/python tools/bench/bench_peers.py
	$(BIN)/python tools/bench/bench.py
	$(BIN)/python tools/bench/bench_fisher.py --draws 8 --rows 8
	$(BIN)/python tools/bench/bench_cd.py
	$(BIN)/python tools/bench/bench_cd.py --acd --rows 256
	$(BIN)/python tools/bench/bench_causal.py
	$(BIN)/python tools/bench/bench_metrics.py
	$(BIN)/python tools/bench/bench_memory.py
	$(BIN)/python tools/bench/bench_runner.py --overhead --repeat 2

clean:
	rm -rf .venv .venv-torchtext .venv-browser .venv-oldest build *.egg-info
