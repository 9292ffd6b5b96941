-- The audit log: one chain of entries per process life (store/audit.py).
CREATE TABLE audit (
    chain_id text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    recorded_at bigint NOT NULL,
    actor text COLLATE "C" NOT NULL,
    action text COLLATE "C" NOT NULL,
    target text COLLATE "C" NOT NULL,
    result text NOT NULL,
    detail bytea NOT NULL,
    request_id text NOT NULL,
    previous bytea NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (chain_id, number)
);
CREATE INDEX audit_by_time ON audit (recorded_at, chain_id, number);
