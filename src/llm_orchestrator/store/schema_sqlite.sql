-- The tables, SQLite's words. Times: microseconds on the store's clock. Digests: 32 bytes.
CREATE TABLE store (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    incarnation TEXT NOT NULL,
    generation INTEGER NOT NULL,
    role TEXT NOT NULL DEFAULT 'primary',
    created_at INTEGER NOT NULL
);
CREATE TABLE workflows (
    name TEXT NOT NULL,
    version TEXT NOT NULL,
    digest TEXT NOT NULL,
    definition BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (name, version, digest)
);
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    workflow TEXT NOT NULL,
    version TEXT NOT NULL,
    digest TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    owner TEXT,
    epoch INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    queue TEXT NOT NULL,
    idempotency_key TEXT,
    parent_run_id TEXT,
    wake_at INTEGER NOT NULL,
    wake_first INTEGER NOT NULL,
    inbox_seq INTEGER NOT NULL,
    labels TEXT NOT NULL,
    origin TEXT NOT NULL,
    input BLOB NOT NULL,
    output BLOB,
    error BLOB,
    head_seq INTEGER NOT NULL DEFAULT 0,
    head_digest BLOB,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER
);
CREATE INDEX runs_to_claim ON runs (state, wake_at) WHERE state IN ('pending', 'waiting');
CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_finished ON runs (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE journal (
    run_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    kind TEXT NOT NULL,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    digest BLOB NOT NULL,
    recorded_at INTEGER NOT NULL,
    payload BLOB NOT NULL, -- last: the predecessor check reads `digest` and not past a long payload
    PRIMARY KEY (run_id, seq)
);
CREATE TABLE inbox (
    run_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    payload BLOB,
    sender_key TEXT,
    digest BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, number),
    UNIQUE (run_id, sender_key)
);
CREATE TABLE progress (
    run_id TEXT NOT NULL,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    part INTEGER NOT NULL,
    text TEXT NOT NULL,
    handle BLOB,
    digest BLOB NOT NULL,
    PRIMARY KEY (run_id, step, attempt, part)
);
CREATE TABLE records (
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    value BLOB NOT NULL,
    version INTEGER NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (kind, key)
);
CREATE TABLE vectors (
    index_name TEXT NOT NULL,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    vector BLOB NOT NULL,
    metadata BLOB NOT NULL,
    PRIMARY KEY (index_name, namespace, id)
);
CREATE TABLE blobs (
    run_id TEXT NOT NULL,
    digest BLOB NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (run_id, digest)
);
CREATE TABLE commits (
    node_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    entries INTEGER NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (node_id, number)
) WITHOUT ROWID;
CREATE TABLE nodes (
    node_id TEXT PRIMARY KEY,
    region TEXT NOT NULL,
    state TEXT NOT NULL,
    beat INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    heartbeat_at INTEGER NOT NULL,
    info TEXT NOT NULL
);
CREATE TABLE audit (
    chain_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    result TEXT NOT NULL,
    detail BLOB NOT NULL,
    request_id TEXT NOT NULL,
    previous BLOB NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (chain_id, number)
);
CREATE INDEX audit_by_time ON audit (recorded_at, chain_id, number);
