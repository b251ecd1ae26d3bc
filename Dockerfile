# The HTTP service on a CPU. Bundles are mounted, not built in: see docs/service.md.
FROM python:3.12-slim AS packages
WORKDIR /app
COPY requirements.txt requirements-service.txt ./
RUN python -m venv /venv && \
    /venv/bin/pip install --no-cache-dir -r requirements.txt -r requirements-service.txt

FROM python:3.12-slim
# Paddle needs OpenMP's run-time library
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --no-install-recommends -y libgomp1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --system --uid 10001 --no-create-home flowad
WORKDIR /app
COPY --from=packages /venv /venv
COPY LICENSE NOTICE ./
COPY deploy deploy
COPY metrics metrics
COPY utils utils
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "deploy/serve.py", "--host", "0.0.0.0"]
CMD ["--engine", "auto", "/bundle"]
