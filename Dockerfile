# Two images from one file: `service` is gateway, tokenizer, scheduler and cache, without torch; `worker` has torch.
#
# Pip's own variables work as build arguments. On PyPI, Linux builds of torch bring gigabytes of CUDA libraries: for a
# worker that computes on CPUs set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONPATH=/opt/weft HF_HOME=/models
RUN useradd --uid 10001 --create-home weft && install -d -o weft -g weft /data /models
WORKDIR /src
# Enough for pip to know what Weft needs: the layers that install it change only when that does.
COPY pyproject.toml ./
RUN touch README.md

FROM base AS code
COPY . .
RUN pip install --no-cache-dir --no-deps --target /opt/weft . && chmod -R a+rX /opt/weft

FROM base AS service
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir '.[gateway,tokenizer,cache]'
COPY --from=code /opt/weft /opt/weft
USER weft
WORKDIR /home/weft

FROM base AS worker
# As `weft up` has it (weft/up.py says why).
ENV GOMP_SPINCOUNT=3000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Compiled kernels, which a volume keeps for the next container.
ENV NUMBA_CACHE_DIR=/var/cache/weft TRITON_CACHE_DIR=/var/cache/weft/triton
RUN install -d -o weft -g weft /var/cache/weft
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch==2.13.0
RUN pip install --no-cache-dir "$TORCH"
RUN pip install --no-cache-dir '.[worker]'
COPY --from=code /opt/weft /opt/weft
USER weft
WORKDIR /home/weft
