# syntax=docker/dockerfile:1
# Inkstream with PyTorch, DALI and CUDA, for a user without privileges (docs/deploy.md).
#
#   docker build --tag inkstream .
#   docker run --rm --gpus all --ipc=host --volume "$PWD:/workspace" inkstream inkstream doctor
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${CUDA_IMAGE}

# torch.compile calls the compiler, and Triton includes Python.h. The CUDA libraries come with the Python packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The dependencies are a layer of their own, which a change of the code leaves as it is.
WORKDIR /opt/inkstream
COPY pyproject.toml constraints.txt README.md inkstream.py ./
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
 && pip install --no-cache-dir --constraint constraints.txt --no-build-isolation \
      --editable '.[gs,mlflow,onnx,parquet,s3,tensorboard,tune]'

COPY shards shards
COPY pipeline pipeline
COPY trainer trainer
COPY benchmarks benchmarks
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt --no-build-isolation --no-deps --editable . \
 && python -m compileall -q shards pipeline trainer benchmarks

# Another user may be given (--user), who has no name and no home: caches lie in the working directory. That of
# torch.compile, with Triton's kernels, would lie in /tmp, which ends with the container. Libraries ask USER for a name.
RUN useradd --uid 10001 --no-create-home inkstream \
 && install --directory --mode=1777 /workspace
ENV HOME=/workspace USER=inkstream TORCHINDUCTOR_CACHE_DIR=/workspace/.cache/torchinductor
WORKDIR /workspace
USER 10001
CMD ["inkstream", "--help"]
