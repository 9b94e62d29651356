PY := .venv/bin/python
.PHONY: setup demo test large browser fuzz kill check bench backbones docs extras fresh clean

setup: .venv/demo  ## what the demo needs

.venv/demo: pyproject.toml constraints.txt
	@echo "installing torch and what the demo needs into .venv: some minutes, and gigabytes unless torch's CPU build is there"
	python3 -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[images]'
	touch $@

.venv/ready: .venv/demo  ## and what the tests, the checks and the benchmarks need
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs: .venv/demo
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: setup  ## linear probing, bypass and res-tuning on small tasks: a table, a picture and the next command
	$(PY) scripts/demo.py

test: .venv/ready browser  ## a process for each core
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --dist worksteal

large: .venv/ready browser  ## the tests that take minutes: the page with 5,000 pictures of 150 classes, UMAP
	OMP_NUM_THREADS=1 $(PY) -m pytest -m large

browser: .venv/ready  ## a Chromium for the page's tests, where there is none: Debian's, or Playwright's
	@which chromium chromium-browser google-chrome google-chrome-stable | grep -q . \
	|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	|| $(PY) -m playwright install chromium || echo "no Chromium: tests/test_page.py will say so"

fuzz: .venv/ready  ## 1,600 bad inputs over every command, flag and file format: totals by exit code, violations
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) tests/fuzzing.py --count 1600

kill: .venv/ready  ## 20 SIGKILLs in every long command, resumed: files that differ from an undisturbed run's
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) tests/killing.py --kills 20

check: .venv/ready  ## format, lint, types, import layers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo

bench: .venv/ready  ## the recorded tables of docs/results; hours
	for what in memory step multitask mixed grid bank cluster soak; do .venv/bin/restuning bench $$what --out runs/bench || exit 1; done
	for what in vit-tiny methods bank-formats text resnet18 kept memory-accuracy small-shared unseen choice defaults unet; do \
	.venv/bin/restuning reproduce $$what --data-root ../shared/data --out runs/$$what || exit 1; done
	$(PY) scripts/convert_taef2.py --out runs/emoji/vae
	$(PY) scripts/pretrain_emoji.py --vae runs/emoji/vae --out runs/emoji --data-out runs/emoji/data --save-every 300
	.venv/bin/restuning reproduce emoji --data-root ../shared/data --out runs/emoji/tuned
	.venv/bin/restuning reproduce tasks --data-root ../shared/data --out runs/emoji/tasks
	.venv/bin/restuning reproduce small --data-root ../shared/data --out runs/small
	.venv/bin/restuning report runs/small --out docs/results/small
	.venv/bin/restuning bench memory --backbone resnet50 --batch-size 4 --rounds 1 --method full linear bypass res-tuning lora peft-lora peft-lora-equal --out runs/bench/resnet50

TRIED = docs/results/backbones
backbones: .venv/ready  ## every family of timm, transformers and torchvision tried, one small model each: docs/backbones.md; an hour
	-.venv/bin/restuning backbones check --library timm --kind image --out $(TRIED)/timm-image.json
	-.venv/bin/restuning backbones check --library torchvision --kind image --out $(TRIED)/torchvision-image.json
	-.venv/bin/restuning backbones check --library transformers --kind image --out $(TRIED)/transformers-image.json
	-.venv/bin/restuning backbones check --library transformers --kind text --out $(TRIED)/transformers-text.json
	.venv/bin/restuning backbones page $(TRIED)/*.json --out docs/backbones.md

docs: .venv/docs  ## the pages as a site in runs/site
	$(PY) scripts/make_pages.py
	$(PY) -m mkdocs build --strict --site-dir runs/site

extras: setup  ## the wheel alone, and with each extra, in environments of their own: does each do what it is for
	$(PY) scripts/check_extras.py

fresh:  ## a clone in runs/fresh: set-up, the demo, README's lines on a folder of pictures, the docs, each with its seconds
	python3 scripts/fresh.py

clean:
	rm -rf .venv runs
