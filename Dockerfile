# One image, three uses: the action's container, a job's `container:`, and `docker run` on a laptop.
#
#   docker build --build-arg VARIANT=cpu  -t merge-gate:cpu .
#   docker build --build-arg VARIANT=cuda -t merge-gate:cuda .
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/workspace:ro" -v "$PWD/out:/out" merge-gate:cpu run gate.yml --output /out
#
# The base is python:slim and the CUDA libraries are those of torch's own wheels: a CUDA base image would bring a
# second copy of them, and its NVIDIA_REQUIRE_CUDA refuses drivers that the wheels run on.
# An exact tag here; the release workflow resolves it to a digest and records that in the image's labels.
ARG BASE_IMAGE=python:3.11.14-slim-trixie

# --- the environment: everything but merge-gate, by hash ------------------------------------------------------------
FROM ${BASE_IMAGE} AS environment
ARG VARIANT=cpu
# The CPU build of torch is not on the default package index. The locks' hashes decide what is accepted.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/image-cpu.txt requirements/image-cuda.txt /requirements/
# The secret is an optional pip.conf, for builds behind a mirror; it never becomes part of a layer.
# bitsandbytes ships its library for every CUDA, ROCm and XPU version; the CPU image keeps the one for CPUs. Headers,
# static libraries and test folders serve those who build or test these packages; the gate imports none of them.
# hadolint ignore=DL3042 # the cache is a mount and no part of the image
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    set -eu; \
    set --; \
    if [ "${VARIANT}" = cpu ] && [ -n "${TORCH_INDEX}" ]; then set -- --extra-index-url "${TORCH_INDEX}"; fi; \
    python -m venv --without-pip /opt/merge-gate; \
    pip --python /opt/merge-gate/bin/python --cache-dir /var/cache/pip install "$@" --only-binary :all: \
        --require-hashes --requirement "/requirements/image-${VARIANT}.txt"; \
    if [ "${VARIANT}" = cpu ]; then \
        find /opt/merge-gate -name 'libbitsandbytes_*' ! -name 'libbitsandbytes_cpu*' -delete; \
    fi; \
    find /opt/merge-gate -depth -type d '(' -path '*/torch/include' -o -path '*/torch/share' -o -name tests ')' \
        -exec rm -rf {} +; \
    find /opt/merge-gate -type f '(' -name '*.h' -o -name '*.a' -o -path '*/torch/bin/*' ! -name torch_shm_manager ')' \
        -delete

# --- merge-gate's own wheel -------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS wheel
COPY requirements/build.txt /requirements/
# hadolint ignore=DL3042 # the cache is a mount and no part of the image
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    pip --cache-dir /var/cache/pip install --root-user-action=ignore --require-hashes --only-binary :all: -r /requirements/build.txt
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src/ src/
RUN pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels .

# --- both together: the image itself needs no pip ---------------------------------------------------------------------
FROM environment AS installed
# podman's build cache does not notice another wheel in the mount: it reuses this step unless the revision changes.
ARG REVISION=unknown
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip --python /opt/merge-gate/bin/python install --no-deps --no-index --no-cache-dir /wheels/*.whl
COPY entrypoint.py /opt/merge-gate/entrypoint.py

# --- the image --------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}
ARG VARIANT=cpu
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG SOURCE=
ARG BASE_DIGEST=unknown
LABEL org.opencontainers.image.title="merge-gate" \
      org.opencontainers.image.description="Merges PEFT adapters into a scratch copy of their base and checks every parameter" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"

# What lets a process gain rights (setuid, setgid), or fetch packages, has no use here.
# hadolint ignore=DL3059 # a layer of its own, so that it stays when the packages change
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} + && \
    python -m pip uninstall --yes --root-user-action=ignore --no-cache-dir pip && \
    rm -rf /usr/local/lib/python*/ensurepip
COPY --from=installed /opt/merge-gate /opt/merge-gate

# There is no USER: a job's container must be able to run as root, and `docker run` passes the caller's uid. An uid
# without a passwd entry has no home and no name, so both are given here; caches go where any uid can write.
# NVIDIA_*: for hosts whose default runtime is NVIDIA's, which reads them. MERGE_GATE_IMAGE tells the action that it
# runs inside this image.
ENV PATH=/opt/merge-gate/bin:$PATH \
    HOME=/tmp/home \
    USER=merge-gate \
    LOGNAME=merge-gate \
    HF_HOME=/tmp/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MERGE_GATE_IMAGE=${VARIANT}

WORKDIR /workspace
ENTRYPOINT ["/opt/merge-gate/bin/python", "-I", "/opt/merge-gate/entrypoint.py"]
CMD ["--help"]
