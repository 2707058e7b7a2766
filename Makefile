# make run: set up, build the demo bundle, screen a synthetic archive.   make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin

# on a GPU machine: any Python that has what the extras gpu, training and proof list
GPU_PYTHON ?= python3

# with it, each process would compile PyTorch, pandas and the engine anew: three times the time of a short run
unexport PYTHONDONTWRITEBYTECODE

# uv reads neither pip.conf nor PIP_*: the lines of `pip config list` become uv's own variables, where those are not set
define PIP_TO_UV
s/\\n/ /g
s/^(:env:|global|install)\.//
s/^index-url=/UV_DEFAULT_INDEX=/
s/^extra-index-url=/UV_INDEX=/
/^find-links=/s/ +/,/g
s/^find-links=/UV_FIND_LINKS=/
s/^no-index='(1|true|yes|on)'/set -- --no-index/p
s/^trusted-host=/UV_INSECURE_HOST=/
s/^cert=/SSL_CERT_FILE=/
s/^proxy=/ALL_PROXY=/
s/^([A-Z_]+)=(.*)/: $${\1=\2}; export \1/p
endef
export PIP_TO_UV
# like pip, it takes the pinned version from whichever index has it
INSTALL = eval "$$($(BIN)/pip config list | sed -nE "$$PIP_TO_UV")"; $(BIN)/uv pip install --quiet \
  --python $(BIN)/python --index-strategy unsafe-best-match -c constraints.txt "$$@"

.PHONY: run test test-all lint benchmarks peers gpu-proof fuzz clean

run: .venv/training.stamp demo/bundle/ensemble.json demo/archive/manifest.csv
	$(BIN)/python -m engine.run demo/archive/manifest.csv -b demo/bundle -o demo/results
	@$(BIN)/python -c 'import engine; \
	  rows = engine.read_results("demo/results").sort_values("p_osteoporosis", ascending=False); \
	  print("\nThe rows with the highest probability of osteoporosis, of", len(rows), "in demo/results:\n"); \
	  print(rows[["row", "path", "label", "prediction", "p_osteoporosis", "triage"]].head(10).to_string(index=False))'

# two workers; which tests stay together is in tests/conftest.py
IN_TWO := -n 2 --dist loadscope --no-loadscope-reorder

# make test-all: with the tests marked slow
test: .venv/dev.stamp
	$(BIN)/python -m pytest -m 'not slow' $(IN_TWO)

test-all: .venv/dev.stamp
	$(BIN)/python -m pytest $(IN_TWO)

lint: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmarks: .venv/dev.stamp demo/bundle/ensemble.json
	$(BIN)/python -m benchmarks throughput -b demo/bundle
	$(BIN)/python -m benchmarks throughput -b demo/bundle --null
	$(BIN)/python -m benchmarks memory -b demo/bundle
	$(BIN)/python -m benchmarks damage -b demo/bundle
	$(BIN)/python -m benchmarks scaling -b demo/bundle
	$(BIN)/python -m benchmarks restart -b demo/bundle
	$(BIN)/python -m benchmarks decode -b demo/bundle
	$(BIN)/python -m benchmarks tables

# the engine beside what people write instead; its bundle is its own, since a random one tells no right row from a wrong
peers: .venv/peers.stamp demo/contest/plans/onnx-int8/resnet50.json
	$(BIN)/python -m benchmarks peers -b demo/contest
	$(BIN)/python -m benchmarks peers -b demo/contest --archive uniform
	$(BIN)/python -m benchmarks tables

STAND_IN := tests/engine/pipeline/test_open_gpu.py tests/engine/preprocess/test_gpu*.py \
  tests/engine/runners tests/engine/scoring/test_gpu*.py

# no test may skip for want of a GPU; the JSON goes to benchmarks/results
gpu-proof:
	REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest -m gpu tests/engine/pipeline tests/training/test_fit.py
	REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest $(STAND_IN)
	$(GPU_PYTHON) -m benchmarks gpu

fuzz: .venv/dev.stamp
	$(BIN)/python -m tests.fuzz --count 20000

clean:
	rm -rf .venv demo

$(BIN)/uv: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	touch $@

.venv/training.stamp: $(BIN)/uv pyproject.toml
	$(INSTALL) -e '.[training]'
	touch $@

.venv/dev.stamp: .venv/training.stamp
	$(INSTALL) -e '.[training,dev,explain]'
	touch $@

.venv/peers.stamp: .venv/training.stamp
	$(INSTALL) -e '.[training,peers]'
	touch $@

demo/images/normal: | .venv/training.stamp
	$(BIN)/python -m training.synthetic demo/images --class-folders --count 34 --seed 1 --size 256 384

demo/labelled/normal: | .venv/training.stamp
	$(BIN)/python -m training.synthetic demo/labelled --class-folders --count 30 --seed 4 --size 256 384

# the results of an older bundle go with it
demo/bundle/ensemble.json: demo/images/normal demo/labelled/normal
	rm -rf demo/results
	$(BIN)/python -m training demo/images -o demo/bundle --weights none --freeze --copies 0 --seed 1 --overwrite
	$(BIN)/python -m engine.calibrate demo/bundle --on demo/labelled

demo/contest/ensemble.json: | .venv/training.stamp
	$(BIN)/python -m benchmarks bundle demo/contest

demo/contest/plans/onnx-int8/resnet50.json: demo/contest/ensemble.json demo/calibration/manifest.csv
	$(BIN)/python -m build_engines demo/contest --target onnx --precision int8 --calibration demo/calibration \
	  --calibration-images 400

demo/calibration/manifest.csv: | .venv/training.stamp
	$(BIN)/python -m training.synthetic demo/calibration --count 400 --seed 3 --size 400 1400

demo/archive/manifest.csv: | .venv/training.stamp
	$(BIN)/python -m training.synthetic demo/archive --count 48 --seed 2 --size 400 1400
