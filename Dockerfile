# not built here: no Docker runs where this file is tested. tests/test_repository.py compares its commands with the README's.
# CPU:  docker build -t ditune . && docker run -v ./logs:/ditune/logs ditune
# CUDA: docker build -t ditune --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 . && docker run --gpus all ditune
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends git make python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /ditune
COPY requirements.txt requirements-extras.txt requirements.lock pyproject.toml Makefile ./
# the packages first, so that a change of the code installs none; torch's wheels of Linux run on CPUs and with CUDA
RUN python3 -m venv .venv && .venv/bin/python -m pip install --no-cache-dir -r requirements.lock
COPY . .
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps -e . && touch .venv/.installed .venv/.extras
ENV PATH=/ditune/.venv/bin:$PATH
CMD ["make", "train"]
