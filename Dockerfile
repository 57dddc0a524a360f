# syntax=docker/dockerfile:1
# Two images of one tree:
#
#   docker build --target cuda --tag mone_megatron .         GPUs: NVIDIA's PyTorch, with its torch,
#                                                            Transformer Engine and apex
#   docker build --target cpu  --tag mone_megatron:cpu .     laptops and CI
#
# Not built here: there was no container engine (docs/cluster.md says what was checked instead).
#
# 26.05 has torch 2.12.0a0. Before 26.04 it is 2.11.0a0 or older, which comes before the 2.11 that
# pyproject.toml asks for.
ARG NVIDIA_PYTORCH=nvcr.io/nvidia/pytorch:26.05-py3
ARG PYTHON=python:3.12-slim-bookworm

FROM ${NVIDIA_PYTORCH} AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/mone_megatron
COPY pyproject.toml tools/dependencies.py ./
# What the image was built around stays as it is: everything else is installed under constraints
# that pin what is there (in place of the image's own, which pin every package), and the project
# itself without its dependencies.
RUN pip list --format=freeze \
        | grep -iE '^(torch|pytorch|triton|transformer.engine|apex|flash.attn|nvidia|numpy)' \
        > /tmp/constraints.txt \
    && python dependencies.py pyproject.toml --without torch > /tmp/requirements.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt \
        pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/constraints.txt /tmp/requirements.txt dependencies.py
COPY . .
# The image's constraints would hold for setuptools, too, which builds this.
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 10001 mone \
    && install --directory --owner mone /workspace/runs
USER 10001
WORKDIR /workspace
LABEL org.opencontainers.image.title="mone_megatron" \
      org.opencontainers.image.description="Pretrain Mixture-of-Neuron-Experts models on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/opt/mone_megatron/launch/torchrun.sh"]
CMD ["--help"]

FROM ${PYTHON} AS cpu
WORKDIR /opt/mone_megatron
COPY pyproject.toml tools/dependencies.py ./
# torch first and by itself: packages that depend on it then keep the build that is there.
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${TORCH}" \
    && python dependencies.py pyproject.toml --without torch > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt dependencies.py
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 10001 mone \
    && install --directory --owner mone /workspace/runs
USER 10001
WORKDIR /workspace
LABEL org.opencontainers.image.title="mone_megatron" \
      org.opencontainers.image.description="Pretrain Mixture-of-Neuron-Experts models on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/opt/mone_megatron/launch/torchrun.sh"]
CMD ["--help"]
