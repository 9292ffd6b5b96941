-- The tables, PostgreSQL's words. Times: microseconds on the store's clock. Digests: 32 bytes.
-- What people name sorts by bytes ("C"), as on SQLite. Payloads are compressed, if at all, before
-- they come here (EXTERNAL): pglz is slower than the disk.
CREATE TABLE store (
    id integer PRIMARY KEY CHECK (id = 1),
    incarnation text NOT NULL,
    generation bigint NOT NULL,
    role text NOT NULL DEFAULT 'primary',
    created_at bigint NOT NULL
);
CREATE TABLE workflows (
    name text COLLATE "C" NOT NULL,
    version text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL,
    definition bytea NOT NULL,
    created_at bigint NOT NULL,
    PRIMARY KEY (name, version, digest)
);
CREATE TABLE runs (
    run_id uuid PRIMARY KEY,
    parent_run_id uuid,
    epoch bigint NOT NULL,
    priority bigint NOT NULL,
    wake_at bigint NOT NULL,
    wake_first bigint NOT NULL,
    inbox_seq bigint NOT NULL,
    head_seq bigint NOT NULL DEFAULT 0,
    created_at bigint NOT NULL,
    started_at bigint,
    finished_at bigint,
    picked_until bigint NOT NULL DEFAULT 0,
    picked_by text,
    workflow text COLLATE "C" NOT NULL,
    version text NOT NULL,
    digest text NOT NULL,
    state text NOT NULL,
    reason text NOT NULL,
    owner text,
    queue text NOT NULL,
    idempotency_key text,
    head_digest bytea,
    labels text NOT NULL,
    origin text NOT NULL,
    input bytea NOT NULL,
    output bytea,
    error bytea
) WITH (fillfactor = 70);
ALTER TABLE runs ALTER input SET STORAGE EXTERNAL, ALTER output SET STORAGE EXTERNAL;
CREATE INDEX runs_to_claim ON runs (wake_at) WHERE state IN ('pending', 'waiting') AND owner IS NULL;
CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_finished ON runs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX runs_of_parent ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
CREATE TABLE journal (
    run_id uuid NOT NULL,
    seq bigint NOT NULL,
    epoch bigint NOT NULL,
    attempt bigint NOT NULL,
    recorded_at bigint NOT NULL,
    kind text NOT NULL,
    step text NOT NULL,
    digest bytea NOT NULL,
    payload bytea NOT NULL,
    PRIMARY KEY (run_id, seq)
);
ALTER TABLE journal ALTER payload SET STORAGE EXTERNAL;
CREATE TABLE inbox (
    run_id uuid NOT NULL,
    number bigint NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    payload bytea,
    sender_key text,
    digest bytea NOT NULL,
    created_at bigint NOT NULL,
    PRIMARY KEY (run_id, number),
    UNIQUE (run_id, sender_key)
);
CREATE TABLE progress (
    run_id uuid NOT NULL,
    step text COLLATE "C" NOT NULL,
    attempt bigint NOT NULL,
    part bigint NOT NULL,
    text bytea NOT NULL,
    handle bytea,
    digest bytea NOT NULL,
    PRIMARY KEY (run_id, step, attempt, part)
);
CREATE TABLE records (
    kind text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    value bytea NOT NULL,
    version bigint NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (kind, key)
);
CREATE TABLE vectors (
    index_name text COLLATE "C" NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    vector bytea NOT NULL,
    metadata bytea NOT NULL,
    PRIMARY KEY (index_name, namespace, id)
);
CREATE TABLE blobs (
    run_id uuid NOT NULL,
    digest bytea NOT NULL,
    content bytea NOT NULL,
    PRIMARY KEY (run_id, digest)
);
ALTER TABLE blobs ALTER content SET STORAGE EXTERNAL;
CREATE TABLE commits (
    node_id text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    entries bigint NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (node_id, number)
);
CREATE TABLE nodes (
    node_id text COLLATE "C" PRIMARY KEY,
    region text NOT NULL,
    state text NOT NULL,
    beat bigint NOT NULL,
    started_at bigint NOT NULL,
    heartbeat_at bigint NOT NULL,
    info text NOT NULL,
    session_pid integer,
    session_start timestamptz
) WITH (fillfactor = 20);
CREATE FUNCTION instr(text, text) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$ SELECT strpos($1, $2) $$;
