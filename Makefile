# Every target brings its own environment: `make install` makes .venv, and is quick when nothing changed.

PYTHON ?= python3
BIN := .venv/bin
DEBIAN := data/debian
FASHION := data/FashionMNIST/raw/t10k-labels-idx1-ubyte
# On a CPU page faults dominate allocation-heavy code: keep freed memory (glibc), and lay tensors of 2 MB and more on large
# pages (torch), between which less is lost. Elsewhere both are without effect.
CPU_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 THP_MEM_ALLOC_ENABLE=1
# Torch's threads slow each other several times where two processes share two cores.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help install data demo demo-readme demo-tune scenes scenes-readme scenes-tune sweep sweep-docs table recipes docs docs-serve rows test test-fast lint types format notebooks bench bench-docs clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed data  ## make .venv with everything that the other targets need, and fetch Fashion-MNIST

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo,dev,docs,notebooks]'
	touch $@

# Fashion-MNIST: Debian's package, fetched and unpacked without root; where there is no apt, torchvision downloads it.
data: $(FASHION)

$(FASHION): | .venv/installed
	-if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then $(MAKE) --no-print-directory $(DEBIAN); fi
	-$(BIN)/python -c "from pathlib import Path; from unimim.samples.fashion_mnist import provide; print(provide(Path('data')))"

$(DEBIAN):
	mkdir -p $(DEBIAN)/apt/lists/partial $(DEBIAN)/apt/cache
	cd $(DEBIAN) && own="-o Dir::State::lists=apt/lists -o Dir::Cache=apt/cache" && { \
	  apt-get -q download dataset-fashion-mnist || \
	  { apt-get -q $$own update && apt-get -q $$own download dataset-fashion-mnist; }; } && \
	  dpkg-deb -x dataset-fashion-mnist_*.deb . && rm -rf dataset-fashion-mnist_*.deb apt || { rm -rf ../debian; false; }

demo: install  ## pretrain a small student with three targets on real images, compare, draw (7 to 17 minutes on 2 cores)
	$(CPU_MEMORY) $(BIN)/python benchmarks/demo.py

demo-readme: install  ## put the demo's table and figure into README and docs
	$(BIN)/python benchmarks/demo.py --readme

demo-tune: install  ## the grid of learning rates behind the demo's yamls
	$(CPU_MEMORY) $(BIN)/python benchmarks/demo.py --tune

scenes: install  ## segmentation of composed scenes, pretrained against from scratch
	$(CPU_MEMORY) $(BIN)/python benchmarks/scenes.py

scenes-readme: install  ## put the table and figure of the scenes into README and docs
	$(BIN)/python benchmarks/scenes.py --readme

scenes-tune: install  ## the grid of learning rates and layer decays behind both arms
	$(CPU_MEMORY) $(BIN)/python benchmarks/scenes.py --tune

sweep: install  ## masking ratios against targets on the sample images, offline; goes on where it was interrupted
	$(CPU_MEMORY) $(BIN)/unimim sweep conf/sweeps/mask_ratio.yaml --seeds 0 1 --trainer.enable_progress_bar=false

sweep-docs: install  ## put the sweep's table and figure into docs
	$(BIN)/python docs/sweeps.py

table: install  ## write Table 1 of README and docs from the recipes
	$(BIN)/python docs/table1.py

recipes: install  ## write docs/recipes.md from the recipes' headers and initial weights
	$(BIN)/python docs/recipes.py

docs: install  ## build the documentation site into outputs/site
	$(BIN)/mkdocs build --strict

docs-serve: install  ## show the documentation site while it is written
	$(BIN)/mkdocs serve

rows: install  ## two steps of every recipe at full size, one after the other (16 GB, half an hour on 2 cores)
	@for file in conf/pretrain/*.yaml; do echo "== $$file"; $(CPU_MEMORY) $(BIN)/unimim pretrain fit --config "$$file" \
	  --config conf/debug.yaml --trainer.enable_progress_bar=false || exit 1; done

test: install  ## all tests, in two processes of one thread
	$(CPU_MEMORY) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install  ## the tests without the slow ones
	$(CPU_MEMORY) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

lint: install  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## ruff: mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy, strict, on src
	$(BIN)/mypy

notebooks: install  ## execute the notebooks
	@for file in $(wildcard notebooks/*.ipynb); do $(BIN)/jupyter execute "$$file" || exit 1; done

bench: install  ## run the benchmarks
	@for file in $(filter-out benchmarks/demo.py benchmarks/scenes.py benchmarks/report.py,$(wildcard benchmarks/*.py)); do $(CPU_MEMORY) $(BIN)/python "$$file" || exit 1; done

bench-docs: install  ## put what the benchmarks measured into docs/performance.md
	$(BIN)/python benchmarks/report.py

clean:  ## remove environment and caches; data and outputs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
