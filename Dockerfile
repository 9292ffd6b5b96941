# The orchestrator. Build: docker build -t llm-orchestrator .
# Two stages: what builds it stays behind. Exact versions with hashes: requirements/build.txt (what
# builds) and image.txt (what runs). The tags of images: deploy/images.toml.
FROM python:3.13.7-slim-bookworm AS build
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
WORKDIR /build
COPY requirements/build.txt requirements/image.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/build.txt
RUN uv venv /opt/orchestrator && \
    uv pip install --python /opt/orchestrator/bin/python --require-hashes -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN hatchling build -t wheel -d dist && \
    uv pip install --python /opt/orchestrator/bin/python --no-deps dist/*.whl

FROM python:3.13.7-slim-bookworm
# pg_dump and pg_restore, for backups of a PostgreSQL store: 15, as the server of docker-compose.yml.
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-client && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --create-home --home-dir /data orchestrator
COPY --from=build /opt/orchestrator /opt/orchestrator
ENV PATH=/opt/orchestrator/bin:$PATH PYTHONUNBUFFERED=1 LLM_ORCHESTRATOR_DATA=/data \
    LLM_ORCHESTRATOR_LOG_FORMAT=json
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
# The live endpoint, by what is there: the image has no curl.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health/live', timeout=2)"]
# Another address than this machine's needs LLM_ORCHESTRATOR_TOKEN.
CMD ["llmo", "serve", "--host", "0.0.0.0", "--port", "8080"]
