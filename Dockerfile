# Two images: `service` (web; no torch) and `trainer` (workers). Everything that is installed has a hash in a lock.
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY requirements-build.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md LICENSE hatch_build.py ./
COPY apt_jobs apt_jobs
COPY migrations migrations
# git's history stays outside: docker build --build-arg VERSION=$(git describe --tags | cut -c2-)
ARG VERSION=0.1.0.dev0
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_APT_JOBS=$VERSION pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12-slim AS service
WORKDIR /app
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock && useradd --create-home --uid 1000 apt && mkdir /data && chown apt /data
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
USER apt
ENV APT_JOBS_DATA_DIR=/data
ENTRYPOINT ["apt-jobs"]
CMD ["web"]

FROM service AS trainer
USER root
# Triton compiles kernels as they are first used
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# On Linux PyPI's torch is the build for CUDA: its libraries are locked, too
COPY requirements-train.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements-train.lock
USER apt
CMD ["worker", "train"]
