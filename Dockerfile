# The image ships TensorRT 11.1.0.106, the version of constraints-gpu.txt, with CUDA 13.3 and Python 3.12.
#   docker build -t screening .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v /archive:/data screening manifest.csv -b bundle -o results
FROM nvcr.io/nvidia/tensorrt:26.07-py3

# Triton compiles its launcher when it first runs: a C compiler and Python's headers
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# all pins but TensorRT's: that would be a second copy of what the image has
WORKDIR /opt/screening
COPY constraints-gpu.txt ./
RUN grep -v '^tensorrt-' constraints-gpu.txt > pins.txt \
    && pip install --no-cache-dir --no-deps -r pins.txt

COPY pyproject.toml README.md ./
COPY engine engine
COPY build_engines build_engines
COPY training training
COPY benchmarks benchmarks
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python -c "import tensorrt; assert tensorrt.__version__ == '11.1.0.106', tensorrt.__version__"

# safe path: a file in /data never stands in for a module
ENV PYTHONSAFEPATH=1 TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
RUN useradd --create-home screening
USER screening
WORKDIR /data
ENTRYPOINT ["python", "-m", "engine.run"]
