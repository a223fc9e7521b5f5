# The image of a training job on TPU: cloud.tpu_image. The CPU image with TensorFlow's TPU build in TensorFlow's place.
#
# Build, after the CPU image:  docker build -f pipeline/cloud/images/tpu.Dockerfile --build-arg CPU_IMAGE=moco:cpu -t moco:tpu .
# Smoke test:                  docker run --rm moco:tpu
#
# libtpu 2.16.0rc0, the driver that tensorflow-tpu 2.16.2 asks for, is on no index of packages but on Google's page
# alone. It has no hash here, for that page could not be reached; to check it against one:
# --build-arg LIBTPU='libtpu==2.16.0rc0 --hash=sha256:…'
ARG PYTHON_IMAGE=python:3.10-slim-bookworm
ARG CPU_IMAGE=moco:cpu

FROM ${CPU_IMAGE} AS packages
# Of this stage alone, to change the packages.
# hadolint ignore=DL3002
USER 0
RUN python -m pip uninstall --yes tensorflow
COPY pipeline/tpu/requirements-lower.txt /tmp/requirements-lower.txt
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes \
        --only-binary=:all: --requirement /tmp/requirements-lower.txt \
    && rm -r /opt/venv/lib/python3.10/site-packages/tensorflow/include
ARG LIBTPU=libtpu==2.16.0rc0
ARG LIBTPU_LINKS=https://storage.googleapis.com/libtpu-tf-releases/index.html
RUN echo "${LIBTPU}" >/tmp/libtpu.txt \
    && python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --only-binary=:all: \
        --find-links "${LIBTPU_LINKS}" --requirement /tmp/libtpu.txt

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home moco
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/moco /opt/moco
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /home/moco
USER 10001:10001
CMD ["python", "-m", "pipeline.cloud.smoke", "tpu"]
