# What stands around the orchestrator in ha.yml: etcd, PostgreSQL under Patroni, HAProxy, Barman.
# Build in the root of the repository: docker build -f deploy/compose/cluster.Dockerfile .
FROM debian:12.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates etcd-server postgresql-15 haproxy rsync python3 python3-venv curl && \
    rm -rf /var/lib/apt/lists/* && \
    (pg_dropcluster 15 main || true)
COPY requirements/patroni.txt /tmp/patroni.txt
RUN python3 -m venv /opt/patroni && \
    /opt/patroni/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/patroni.txt
COPY requirements/barman.txt /tmp/barman.txt
RUN python3 -m venv /opt/barman && \
    /opt/barman/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/barman.txt
COPY deploy/compose/start-database deploy/compose/start-barman /usr/local/bin/
RUN install -d -o postgres -g postgres /cluster /var/lib/barman
ENV PATH=/opt/patroni/bin:/opt/barman/bin:/usr/lib/postgresql/15/bin:$PATH
USER postgres
