# Two images: `service` (web; no torch) and `trainer` (workers).
FROM python:3.12-slim AS service
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt hatch_build.py ./
COPY apt_jobs apt_jobs
COPY migrations migrations
RUN pip install --no-cache-dir -c constraints.txt '.[export]' && useradd --create-home --uid 1000 apt && mkdir /data && chown apt /data
USER apt
ENV APT_JOBS_DATA_DIR=/data
ENTRYPOINT ["apt-jobs"]
CMD ["web"]

FROM service AS trainer
USER root
# Triton compiles kernels as they are first used
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir -c constraints.txt '.[train]'
USER apt
CMD ["worker", "train"]
