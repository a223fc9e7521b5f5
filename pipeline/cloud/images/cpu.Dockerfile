# The image of every stage, of Dataflow's workers, and of a training job without a TPU: cloud.image.
#
# Build, at the root of the repository:  docker build -f pipeline/cloud/images/cpu.Dockerfile -t moco:cpu .
# Smoke test:                            docker run --rm --entrypoint python moco:cpu -m pipeline.cloud.smoke cpu
#
# Vertex AI and Kubeflow name each container's command, python -m …; the entrypoint is what Dataflow starts.
# These are tags; a digest, to have the same bytes for ever: --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.10-slim-bookworm
ARG BEAM_IMAGE=apache/beam_python3.10_sdk:2.65.0

FROM ${BEAM_IMAGE} AS beam

FROM ${PYTHON_IMAGE} AS packages
# pyfarmhash has to be compiled. Debian's mirrors keep one version of a compiler only, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# As the launcher, ./moco, sets up: all hashes checked, builds pinned by the same list, bytecode made here, since who
# runs the image cannot write it. pip stays in the environment: Beam's boot asks it for Beam. TensorFlow's headers, 422 MB,
# are for who compiles against it.
RUN python -m venv /opt/uv \
    && /opt/uv/bin/python -m pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 \
    && python -m venv /opt/venv
COPY requirements.txt /opt/moco/requirements.txt
RUN UV_SYSTEM_CERTS=true UV_PYTHON_DOWNLOADS=never /opt/uv/bin/uv pip install --no-cache --require-hashes \
        --build-constraint /opt/moco/requirements.txt --compile-bytecode --python /opt/venv/bin/python \
        --requirement /opt/moco/requirements.txt \
    && rm -r /opt/venv/lib/python3.10/site-packages/tensorflow/include \
    && echo /opt/moco >/opt/venv/lib/python3.10/site-packages/moco.pth
COPY . /opt/moco
RUN python -m compileall -q /opt/moco

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home moco
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/moco /opt/moco
# Beam's boot would make an environment of its own, in a folder that this user cannot write and without these packages.
ENV PATH=/opt/venv/bin:$PATH RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
WORKDIR /home/moco
USER 10001:10001
ENTRYPOINT ["/opt/apache/beam/boot"]
