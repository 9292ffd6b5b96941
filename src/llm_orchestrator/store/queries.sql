-- Every statement, once. A name line starts each; parameters are :named and numbered by the adapter
-- in the order in which they first appear. Text after `--` below a name says why it is as it is.
-- `@sqlite` and `@postgres` behind a name: only for that one.

-- name: append @sqlite
-- Law 1: plain INSERT, never ON CONFLICT; the predecessor must be there with its digest (without
-- it the key is NULL, which no row takes), and the primary key refuses a seq that is taken.
-- VALUES, not SELECT: SQLite copies what a SELECT on the same table gives into a table of its own.
INSERT INTO journal (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
VALUES (
    CASE WHEN :prev_seq = 0
           OR (SELECT digest FROM journal WHERE run_id = :run_id AND seq = :prev_seq) = :prev_digest
         THEN :run_id END,
    :seq, :epoch, :kind, :step, :attempt, :payload, :digest, :recorded_at);

-- name: digest_at
SELECT digest FROM journal WHERE run_id = :run_id AND seq = :seq;

-- name: scan_digest @sqlite
-- Like digest_at, past the index. Differs because only SQLite says it so.
SELECT digest FROM journal NOT INDEXED WHERE run_id = :run_id AND seq = :seq;

-- name: incarnation
SELECT incarnation, generation FROM store;

-- name: accept
INSERT INTO runs (run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
                  idempotency_key, parent_run_id, wake_at, wake_first, inbox_seq, labels, origin, input,
                  created_at)
VALUES (:run_id, :workflow, :version, :digest, 'pending', '', NULL, 0, :priority, :queue,
        :idempotency_key, :parent_run_id, :wake_at, :wake_at, 0, :labels, :origin, :input,
        :created_at);

-- name: change_state
-- A park keeps wake_at = 0 if the inbox moved beyond what the driver had seen (no lost wake-up).
UPDATE runs SET
    state = :state,
    reason = :reason,
    owner = :owner,
    epoch = :epoch,
    wake_at = CASE WHEN inbox_seq > :inbox_seen THEN 0 ELSE :wake_at END,
    output = :output,
    error = :error,
    head_seq = :head_seq,
    head_digest = :head_digest,
    started_at = CASE WHEN :state = 'running' THEN COALESCE(started_at, :now) ELSE started_at END,
    finished_at = CASE WHEN :state IN ('completed', 'failed', 'cancelled') THEN :now ELSE NULL END
WHERE run_id = :run_id;

-- name: count_commit
INSERT INTO commits (node_id, number, entries, digest) VALUES (:node_id, :number, :entries, :digest);

-- name: last_commit
SELECT MAX(number) FROM commits WHERE node_id = :node_id;

-- name: commit_gaps
-- Nodes whose commits are not numbered without a gap.
SELECT node_id, MIN(number), MAX(number), COUNT(*) FROM commits GROUP BY node_id
HAVING MAX(number) - MIN(number) + 1 <> COUNT(*);

-- name: trim_commits
-- The last ones of each node prove as much as all of them: their numbers go on without a gap.
DELETE FROM commits WHERE (node_id, number) IN (
    SELECT old.node_id, old.number FROM commits AS old
    WHERE old.number <= (SELECT MAX(number) FROM commits WHERE node_id = old.node_id) - :keep
    ORDER BY old.node_id, old.number LIMIT :limit);

-- name: next_message @sqlite
-- Law 7: a message takes its number from the run's row and wakes the run, in one statement. A run
-- that is being driven is told in process; one that ended or is paused only wakes for what moves
-- it.
UPDATE runs SET
    inbox_seq = inbox_seq + 1,
    wake_at = CASE WHEN state = 'waiting' THEN 0 ELSE wake_at END
WHERE run_id = :run_id
  AND NOT EXISTS (SELECT 1 FROM inbox WHERE run_id = :run_id AND sender_key = :sender_key)
RETURNING inbox_seq;

-- name: post
INSERT INTO inbox (run_id, number, kind, name, payload, sender_key, digest, created_at)
VALUES (:run_id, :number, :kind, :name, :payload, :sender_key, :digest, :created_at);

-- name: consume
-- A message without a payload is consumed: one column says it. The row stays, so that a repeated
-- sender_key is still known.
UPDATE inbox SET payload = NULL WHERE run_id = :run_id AND number = :number;

-- name: inbox
SELECT run_id, number, kind, name, payload, sender_key, digest FROM inbox
WHERE run_id = :run_id AND payload IS NOT NULL ORDER BY number;

-- name: inbox_seq @sqlite
SELECT inbox_seq FROM runs WHERE run_id = :run_id;

-- name: register
INSERT INTO workflows (name, version, digest, definition, created_at)
VALUES (:name, :version, :digest, :definition, :created_at)
ON CONFLICT (name, version, digest) DO UPDATE SET definition = excluded.definition;

-- name: unregister
-- Only while no run refers to it, ended or not.
DELETE FROM workflows WHERE name = :name AND (version = :version OR :version IS NULL)
  AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.workflow = :name
                  AND (runs.version = :version OR :version IS NULL));

-- name: workflow
SELECT name, version, digest, definition, created_at FROM workflows
WHERE name = :name AND (version = :version OR :version IS NULL) AND (digest = :digest OR :digest IS NULL)
ORDER BY created_at DESC, version DESC, digest DESC LIMIT 1;

-- name: workflows
SELECT name, version, digest, definition, created_at FROM workflows
ORDER BY name, created_at, version, digest;

-- name: record
SELECT value, version, digest FROM records WHERE kind = :kind AND key = :key;

-- name: records
SELECT key, value, version, digest FROM records WHERE kind = :kind ORDER BY key;

-- name: all_records
SELECT kind, key, version, value, digest FROM records;

-- name: all_progress
SELECT run_id, step, attempt, part, text, handle, digest FROM progress;

-- name: insert_record
INSERT INTO records (kind, key, value, version, digest) VALUES (:kind, :key, :value, 1, :digest);

-- name: update_record
UPDATE records SET value = :value, version = version + 1, digest = :digest
WHERE kind = :kind AND key = :key AND version = :version;

-- name: delete_record
DELETE FROM records WHERE kind = :kind AND key = :key AND version = :version;

-- name: audit
-- Newest first. `detail` and the digests come along: whoever reads may check.
SELECT chain_id, number, recorded_at, actor, action, target, result, detail, request_id, previous,
       digest
FROM audit
WHERE (actor = :actor OR :actor IS NULL) AND (action = :action OR :action IS NULL)
  AND (target = :target OR :target IS NULL)
  AND (recorded_at >= :since OR :since IS NULL) AND (recorded_at < :until OR :until IS NULL)
  AND ((recorded_at, chain_id, number) < (:at, :chain_id, :number) OR :at IS NULL)
ORDER BY recorded_at DESC, chain_id DESC, number DESC LIMIT :limit;

-- name: audit_chains
SELECT chain_id, number, recorded_at, actor, action, target, result, detail, request_id, previous,
       digest
FROM audit WHERE (chain_id, number) > (:chain_id, :number) ORDER BY chain_id, number LIMIT :limit;

-- name: audit_entry
-- The primary key refuses a place that is taken.
INSERT INTO audit (chain_id, number, recorded_at, actor, action, target, result, detail, request_id,
                   previous, digest)
VALUES (:chain_id, :number, :recorded_at, :actor, :action, :target, :result, :detail, :request_id,
        :previous, :digest);

-- name: forget_audit
DELETE FROM audit WHERE chain_id = :chain_id;

-- name: put_blob
INSERT INTO blobs (run_id, digest, content) VALUES (:run_id, :digest, :content)
ON CONFLICT (run_id, digest) DO UPDATE SET content = excluded.content;

-- name: blob
SELECT content FROM blobs WHERE run_id = :run_id AND digest = :digest;

-- name: put_progress
INSERT INTO progress (run_id, step, attempt, part, text, handle, digest)
VALUES (:run_id, :step, :attempt, :part, :text, :handle, :digest)
ON CONFLICT (run_id, step, attempt, part) DO NOTHING;

-- name: drop_progress
DELETE FROM progress WHERE run_id = :run_id AND step = :step;

-- name: progress
SELECT attempt, part, text, handle, digest FROM progress WHERE run_id = :run_id AND step = :step
ORDER BY attempt, part;

-- name: put_vector
INSERT INTO vectors (index_name, namespace, id, vector, metadata)
VALUES (:index_name, :namespace, :id, :vector, :metadata)
ON CONFLICT (index_name, namespace, id)
DO UPDATE SET vector = excluded.vector, metadata = excluded.metadata;

-- name: vectors
SELECT id, vector, metadata FROM vectors WHERE index_name = :index_name AND namespace = :namespace
ORDER BY id;

-- name: journal_from @sqlite
-- A run's rows and the first one behind them: an index whose key was damaged shows there.
SELECT run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at FROM journal
WHERE run_id >= :run_id ORDER BY run_id, seq;

-- name: journal_scan @sqlite
-- The same rows past the index, from the table itself: slow, and a second copy of the keys.
-- Differs because only SQLite says it so.
SELECT run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at
FROM journal NOT INDEXED WHERE run_id = :run_id ORDER BY seq;

-- name: journal_row
SELECT run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at FROM journal
WHERE run_id = :run_id AND seq = :seq;

-- name: run
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs WHERE run_id = :run_id;

-- name: runs
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs
WHERE (:states = '' OR instr(:states, ',' || state || ',') > 0)
  AND (workflow = :workflow OR :workflow IS NULL)
  AND (parent_run_id = :parent_run_id OR :parent_run_id IS NULL)
  AND (queue = :queue OR :queue IS NULL)
  AND (instr(labels, '{' || :label) > 0 OR instr(labels, ',' || :label) > 0 OR :label IS NULL)
  AND (created_at >= :since OR :since IS NULL)
  AND (created_at < :until OR :until IS NULL)
  AND (run_id < :before OR :before IS NULL)
ORDER BY run_id DESC LIMIT :limit;

-- name: ids_of_rows
SELECT run_id FROM runs ORDER BY run_id;

-- name: ids_of_entries @sqlite
-- From run to run through the key, without looking at every entry.
WITH RECURSIVE found (run_id) AS (
    SELECT MIN(run_id) FROM journal
    UNION ALL
    SELECT (SELECT MIN(run_id) FROM journal WHERE run_id > found.run_id)
    FROM found WHERE found.run_id IS NOT NULL
)
SELECT run_id FROM found WHERE run_id IS NOT NULL;

-- name: states @sqlite
-- From the table, past its index: a row whose own id is damaged is there under its right one only
-- in the index. Differs because only SQLite says it so.
SELECT run_id, state FROM runs NOT INDEXED;

-- name: anchor
SELECT head_seq, head_digest FROM runs WHERE run_id = :run_id;

-- name: run_row @sqlite
-- The last column is the id as the table has it (found was the row through the index).
SELECT workflow, version, digest, priority, queue, idempotency_key, parent_run_id, wake_first,
       origin, labels, input,
       state, reason, owner, wake_at, inbox_seq, output, error,
       epoch, head_seq, head_digest, created_at, started_at, finished_at,
       (SELECT own.run_id FROM runs AS own NOT INDEXED WHERE own.rowid = runs.rowid)
FROM runs WHERE run_id = :run_id;

-- name: claimable @sqlite
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs
WHERE state IN ('pending', 'waiting') AND owner IS NULL AND wake_at <= :now
  AND instr(:full_queues, ',' || queue || ',') = 0
  AND instr(:strange, ',' || digest || ',') = 0
  AND (queue = :queue OR :queue IS NULL)
ORDER BY priority DESC, wake_at, run_id LIMIT :limit;

-- name: driven @sqlite
SELECT COUNT(*) FROM runs WHERE owner IS NOT NULL AND queue = :queue;

-- name: owned @sqlite
-- Runs of nodes that do not live.
SELECT run_id FROM runs
WHERE owner IS NOT NULL AND instr(:alive, ',' || owner || ',') = 0
  AND instr(:strange, ',' || digest || ',') = 0 ORDER BY priority DESC, run_id;

-- name: next_wake
SELECT MIN(wake_at) FROM runs WHERE state IN ('pending', 'waiting') AND owner IS NULL;

-- name: census
-- Reads every row: metrics ask for it seldom.
SELECT state, workflow, COUNT(*) FROM runs GROUP BY state, workflow
ORDER BY COUNT(*) DESC, state, workflow;

-- name: queues_due
-- Due since: its own time; else the first message that nobody took, the entry with which its last
-- driver let it go, or its acceptance.
SELECT due.queue, COUNT(*),
       MIN(CASE WHEN due.wake_at > due.since THEN due.wake_at ELSE due.since END)
FROM (SELECT r.queue, r.wake_at, COALESCE(
          CASE WHEN r.state = 'waiting' AND r.wake_at = 0 THEN
              (SELECT MIN(i.created_at) FROM inbox AS i
               WHERE i.run_id = r.run_id AND i.payload IS NOT NULL) END,
          CASE WHEN r.started_at IS NOT NULL THEN
              (SELECT j.recorded_at FROM journal AS j WHERE j.run_id = r.run_id
               ORDER BY j.seq DESC LIMIT 1) END,
          r.created_at) AS since
      FROM runs AS r
      WHERE r.state IN ('pending', 'waiting') AND r.owner IS NULL
        AND r.wake_at <= CAST(:now AS bigint)) AS due
GROUP BY due.queue ORDER BY COUNT(*) DESC, due.queue;

-- name: stalled
-- Driven, and no entry for a while.
SELECT COUNT(*) FROM runs AS r
WHERE r.owner IS NOT NULL
  AND COALESCE((SELECT j.recorded_at FROM journal AS j WHERE j.run_id = r.run_id
                ORDER BY j.seq DESC LIMIT 1), 0) < CAST(:before AS bigint);

-- name: expirable
-- The oldest finished runs beyond an age or a count, a handful at a time: no long lock.
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs
WHERE finished_at IS NOT NULL AND state IN ('completed', 'failed', 'cancelled')
  AND (finished_at < :finished_before
       OR finished_at < (SELECT finished_at FROM runs WHERE finished_at IS NOT NULL
                         ORDER BY finished_at DESC LIMIT 1 OFFSET CAST(:keep AS bigint) - 1))
ORDER BY finished_at LIMIT :limit;

-- name: expire_journal
DELETE FROM journal WHERE run_id = :run_id;

-- name: expire_inbox
DELETE FROM inbox WHERE run_id = :run_id;

-- name: expire_blobs
DELETE FROM blobs WHERE run_id = :run_id;

-- name: expire_progress
DELETE FROM progress WHERE run_id = :run_id;

-- name: expire_run
-- First of all: a run that an operator has taken up again meanwhile stays.
DELETE FROM runs WHERE run_id = :run_id AND state IN ('completed', 'failed', 'cancelled');

-- name: mend_entry
-- Only what the chain proves to have been there; no append passes here.
INSERT INTO journal (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
VALUES (:run_id, :seq, :epoch, :kind, :step, :attempt, :payload, :digest, :recorded_at)
ON CONFLICT (run_id, seq) DO UPDATE SET
    epoch = excluded.epoch, kind = excluded.kind, step = excluded.step,
    attempt = excluded.attempt, payload = excluded.payload, digest = excluded.digest;

-- name: drop_row @sqlite
DELETE FROM runs WHERE run_id = :run_id;

-- name: set_row
-- The rest of a row that is rebuilt from its journal. Messages that came meanwhile still count.
UPDATE runs SET
    state = :state, reason = :reason, owner = :owner, wake_at = :wake_at,
    output = :output, error = :error, epoch = :epoch,
    head_seq = :head_seq, head_digest = :head_digest,
    started_at = :started_at, finished_at = :finished_at,
    inbox_seq = COALESCE((SELECT MAX(number) FROM inbox WHERE run_id = :run_id), 0)
WHERE run_id = :run_id;

-- name: join @sqlite
INSERT INTO nodes (node_id, region, state, beat, started_at, heartbeat_at, info)
VALUES (:node_id, :region, 'alive', 0, :now, :now, :info);

-- name: beat @sqlite
UPDATE nodes SET beat = beat + 1, heartbeat_at = :now, info = :info
WHERE node_id = :node_id AND state IN ('alive', 'leaving');

-- name: members @sqlite
SELECT node_id, region, state, beat, 1, started_at, heartbeat_at, info FROM nodes
WHERE state IN ('alive', 'leaving') OR node_id = :node_id ORDER BY node_id;

-- name: nodes @sqlite
-- For people: the dead ones, too, newest first.
SELECT node_id, region, state, beat, 1, started_at, heartbeat_at, info FROM nodes
ORDER BY started_at DESC, node_id LIMIT :limit;

-- name: bury
-- Only while it is as silent as it was when it was judged. Of one that was leaving anyway nobody says
-- that it died: no run is blamed.
UPDATE nodes SET state = CASE WHEN state = 'leaving' THEN 'left' ELSE 'dead' END
WHERE node_id = :node_id AND beat = :beat AND state IN ('alive', 'leaving');

-- name: bury_others @sqlite
-- A file has one engine: whoever holds its lock is the only one that lives.
UPDATE nodes SET state = CASE WHEN state = 'leaving' THEN 'left' ELSE 'dead' END
WHERE state IN ('alive', 'leaving') AND node_id <> :node_id;

-- name: leave
UPDATE nodes SET state = :state WHERE node_id = :node_id AND state IN ('alive', 'leaving');

-- name: forget_nodes
-- Rows of nodes that are gone are kept for people, not for ever.
DELETE FROM nodes WHERE state IN ('left', 'dead') AND heartbeat_at < :before
  AND NOT EXISTS (SELECT 1 FROM runs WHERE owner = nodes.node_id);

-- ---------------------------------------------------------------------------------------------------
-- PostgreSQL. A commit is `append`, the parts that it needs, and `append_end`: one statement, one
-- round trip, READ COMMITTED (laws 1 and 2). Rows come as arrays. `via` is the run whose entries a
-- change stands and falls with, NULL for a change that stands alone.

-- name: append @postgres
-- Law 1. Scalar sub-selects, not EXISTS: a plan made on an empty table stays good. The row of a
-- stale owner meets the `claimed` entry of the next one at the primary key, in either order.
WITH head AS MATERIALIZED (
    SELECT h.run_id FROM unnest(:head_run::uuid[], :head_seq::bigint[], :head_digest::bytea[])
        AS h (run_id, seq, digest)
    WHERE (SELECT incarnation FROM store) = :incarnation
      AND (h.seq = 0 OR (SELECT j.digest FROM journal AS j
                         WHERE j.run_id = h.run_id AND j.seq = h.seq) = h.digest)
      AND (SELECT j.seq FROM journal AS j WHERE j.run_id = h.run_id AND j.seq = h.seq + 1) IS NULL
), entry AS (
    INSERT INTO journal (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
    SELECT e.* FROM unnest(:run_id::uuid[], :seq::bigint[], :epoch::bigint[], :kind::text[],
                           :step::text[], :attempt::bigint[], :payload::bytea[], :digest::bytea[],
                           :recorded_at::bigint[])
        AS e (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
    WHERE e.run_id IN (SELECT run_id FROM head)
    ORDER BY e.run_id, e.seq
), counted AS (
    INSERT INTO commits (node_id, number, entries, digest)
    VALUES (:lane, :number, :entries, :batch)
)

-- name: append_end @postgres
SELECT ARRAY(SELECT run_id FROM head), 1 / (CASE WHEN CHECKS THEN 1 ELSE 0 END) ANSWERS

-- name: mailed_answer @postgres
, ARRAY(SELECT ARRAY[placed.place, placed.number] FROM placed)

-- name: accepted @postgres
-- A run that is accepted and claimed in one commit has its row written once.
accepted AS (
    INSERT INTO runs (run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
                      idempotency_key, parent_run_id, wake_at, wake_first, inbox_seq, labels, origin,
                      input, output, error, head_seq, head_digest, created_at, started_at,
                      finished_at)
    SELECT a.run_id, a.workflow, a.version, a.digest, a.state, a.reason, a.owner, a.epoch, a.priority,
           a.queue, a.idempotency_key, a.parent_run_id, a.wake_at, a.wake_first, 0, a.labels, a.origin,
           a.input, a.output, a.error, a.head_seq, a.head_digest, :now::bigint,
           CASE WHEN a.state = 'running' THEN :now::bigint END,
           CASE WHEN a.state IN ('completed', 'failed', 'cancelled') THEN :now::bigint END
    FROM unnest(:a_run::uuid[], :a_workflow::text[], :a_version::text[], :a_digest::text[],
                :a_state::text[], :a_reason::text[], :a_owner::text[], :a_epoch::bigint[],
                :a_priority::bigint[], :a_queue::text[], :a_key::text[], :a_parent::uuid[],
                :a_wake::bigint[], :a_first::bigint[], :a_labels::text[], :a_origin::text[],
                :a_input::bytea[], :a_output::bytea[], :a_error::bytea[], :a_seq::bigint[],
                :a_head::bytea[])
        AS a (run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
              idempotency_key, parent_run_id, wake_at, wake_first, labels, origin, input, output,
              error, head_seq, head_digest)
    WHERE a.run_id IN (SELECT run_id FROM head)
    RETURNING run_id
)

-- name: changed @postgres
-- A park keeps wake_at = 0 if the inbox moved beyond what the driver had seen (law 7).
changed AS (
    UPDATE runs AS r SET
        state = c.state, reason = c.reason, owner = c.owner, epoch = c.epoch,
        wake_at = CASE WHEN r.inbox_seq > c.inbox_seen THEN 0 ELSE c.wake_at END,
        output = c.output, error = c.error, head_seq = c.head_seq, head_digest = c.head_digest,
        started_at = CASE WHEN c.state = 'running' THEN COALESCE(r.started_at, :now::bigint)
                          ELSE r.started_at END,
        finished_at = CASE WHEN c.state IN ('completed', 'failed', 'cancelled') THEN :now::bigint END,
        picked_until = 0
    FROM unnest(:c_run::uuid[], :c_state::text[], :c_reason::text[], :c_owner::text[],
                :c_epoch::bigint[], :c_wake::bigint[], :c_seen::bigint[], :c_output::bytea[],
                :c_error::bytea[], :c_seq::bigint[], :c_head::bytea[])
        AS c (run_id, state, reason, owner, epoch, wake_at, inbox_seen, output, error, head_seq,
              head_digest)
    WHERE r.run_id = c.run_id AND c.run_id IN (SELECT run_id FROM head)
    RETURNING r.run_id
)

-- name: same_store_check @postgres
-- Changes that stand alone have no head that would say so.
(SELECT incarnation FROM store) = :incarnation

-- name: changed_check @postgres
(SELECT count(*) FROM changed)
    = (SELECT count(*) FROM head WHERE run_id = ANY (:c_run::uuid[]))

-- name: mailed @postgres
-- Law 7: a message takes its number from the run's row and wakes the run, in one statement.
mail AS MATERIALIZED (
    SELECT m.* FROM unnest(:m_via::uuid[], :m_run::uuid[], :m_place::bigint[], :m_kind::text[],
                           :m_name::text[], :m_payload::bytea[], :m_key::text[], :m_digest::bytea[])
        AS m (via, run_id, place, kind, name, payload, sender_key, digest)
    WHERE (m.via IS NULL OR m.via IN (SELECT run_id FROM head))
      AND (m.sender_key IS NULL OR (SELECT i.number FROM inbox AS i
           WHERE i.run_id = m.run_id AND i.sender_key = m.sender_key) IS NULL)
), numbered AS (
    UPDATE runs AS r SET
        inbox_seq = r.inbox_seq + n.many,
        wake_at = CASE WHEN r.state = 'waiting' THEN 0 ELSE r.wake_at END
    FROM (SELECT run_id, count(*) AS many FROM mail GROUP BY run_id ORDER BY run_id) AS n
    WHERE r.run_id = n.run_id
    RETURNING r.run_id, r.inbox_seq - n.many AS before
), placed AS MATERIALIZED (
    SELECT m.*, n.before + row_number() OVER (PARTITION BY m.run_id ORDER BY m.place) AS number
    FROM mail AS m JOIN numbered AS n USING (run_id)
), mailed AS (
    INSERT INTO inbox (run_id, number, kind, name, payload, sender_key, digest, created_at)
    SELECT p.run_id, p.number, p.kind, p.name, p.payload, p.sender_key,
           sha256(p.digest || int8send(p.number)), :now::bigint
    FROM placed AS p
)

-- name: consumed @postgres
consumed AS (
    UPDATE inbox AS i SET payload = NULL
    FROM unnest(:t_via::uuid[], :t_run::uuid[], :t_number::bigint[]) AS t (via, run_id, number)
    WHERE i.run_id = t.run_id AND i.number = t.number
      AND (t.via IS NULL OR t.via IN (SELECT run_id FROM head))
)

-- name: recorded @postgres
-- New ones, moved ones, removed ones; another version than the caller's fails the statement.
fresh AS (
    INSERT INTO records (kind, key, value, version, digest)
    SELECT p.kind, p.key, p.value, 1, p.digest
    FROM unnest(:p_via::uuid[], :p_kind::text[], :p_key::text[], :p_value::bytea[],
                :p_version::bigint[], :p_digest::bytea[])
        AS p (via, kind, key, value, version, digest)
    WHERE p.version = 0 AND p.value IS NOT NULL
      AND (p.via IS NULL OR p.via IN (SELECT run_id FROM head))
    RETURNING key
), moved AS (
    UPDATE records AS r SET value = p.value, version = r.version + 1, digest = p.digest
    FROM unnest(:p_via::uuid[], :p_kind::text[], :p_key::text[], :p_value::bytea[],
                :p_version::bigint[], :p_digest::bytea[])
        AS p (via, kind, key, value, version, digest)
    WHERE r.kind = p.kind AND r.key = p.key AND r.version = p.version AND p.value IS NOT NULL
      AND (p.via IS NULL OR p.via IN (SELECT run_id FROM head))
    RETURNING r.key
), removed AS (
    DELETE FROM records AS r
    USING unnest(:p_via::uuid[], :p_kind::text[], :p_key::text[], :p_value::bytea[],
                 :p_version::bigint[], :p_digest::bytea[])
        AS p (via, kind, key, value, version, digest)
    WHERE r.kind = p.kind AND r.key = p.key AND r.version = p.version AND p.value IS NULL
      AND (p.via IS NULL OR p.via IN (SELECT run_id FROM head))
    RETURNING r.key
)

-- name: recorded_check @postgres
(SELECT count(*) FROM fresh) + (SELECT count(*) FROM moved) + (SELECT count(*) FROM removed)
    = (SELECT count(*) FROM unnest(:p_via::uuid[]) AS p (via)
       WHERE p.via IS NULL OR p.via IN (SELECT run_id FROM head))

-- name: kept @postgres
kept AS (
    INSERT INTO progress (run_id, step, attempt, part, text, handle, digest)
    SELECT p.run_id, p.step, p.attempt, p.part, p.text, p.handle, p.digest
    FROM unnest(:k_via::uuid[], :k_run::uuid[], :k_step::text[], :k_attempt::bigint[],
                :k_part::bigint[], :k_text::bytea[], :k_handle::bytea[], :k_digest::bytea[])
        AS p (via, run_id, step, attempt, part, text, handle, digest)
    WHERE p.via IS NULL OR p.via IN (SELECT run_id FROM head)
    ON CONFLICT (run_id, step, attempt, part) DO NOTHING
)

-- name: dropped @postgres
dropped AS (
    DELETE FROM progress AS g USING unnest(:d_via::uuid[], :d_run::uuid[], :d_step::text[])
        AS d (via, run_id, step)
    WHERE g.run_id = d.run_id AND g.step = d.step
      AND (d.via IS NULL OR d.via IN (SELECT run_id FROM head))
)

-- name: audited @postgres
audited AS (
    INSERT INTO audit (chain_id, number, recorded_at, actor, action, target, result, detail,
                       request_id, previous, digest)
    SELECT u.chain_id, u.number, u.recorded_at, u.actor, u.action, u.target, u.result, u.detail,
           u.request_id, u.previous, u.digest
    FROM unnest(:u_via::uuid[], :u_chain::text[], :u_number::bigint[], :u_at::bigint[],
                :u_actor::text[], :u_action::text[], :u_target::text[], :u_result::text[],
                :u_detail::bytea[], :u_request::text[], :u_previous::bytea[], :u_digest::bytea[])
        AS u (via, chain_id, number, recorded_at, actor, action, target, result, detail, request_id,
              previous, digest)
    WHERE u.via IS NULL OR u.via IN (SELECT run_id FROM head)
)

-- name: next_message @postgres
UPDATE runs SET
    inbox_seq = inbox_seq + 1,
    wake_at = CASE WHEN state = 'waiting' THEN 0 ELSE wake_at END
WHERE run_id = :run_id
  AND NOT EXISTS (SELECT 1 FROM inbox WHERE run_id = :run_id AND sender_key = :sender_key)
RETURNING inbox_seq;

-- name: promises @postgres
-- Whether a commit's answer means that it is safe, and whether a warning would reach us (law 4).
SELECT current_setting('synchronous_commit'), current_setting('client_min_messages');

-- name: lock_row @postgres
-- Before a look at the journal that decides about the row: a claim may be under way.
SELECT 1 FROM runs WHERE run_id = :run_id FOR UPDATE;

-- name: accept_again @postgres
-- In place: whoever waits for a row that is deleted finds none, though it is made anew, and a
-- message would be lost without anybody being told.
UPDATE runs SET
    workflow = :workflow, version = :version, digest = :digest, priority = :priority,
    queue = :queue, idempotency_key = :idempotency_key, parent_run_id = :parent_run_id,
    wake_first = :wake_at, labels = :labels, origin = :origin, input = :input,
    created_at = :created_at, picked_until = 0
WHERE run_id = :run_id;

-- name: barrier @postgres
-- Law 3: once this row is durable, so is everything that was seen before. It takes the number of a
-- commit whose outcome is unknown: either that one is there, or it can never come any more.
INSERT INTO commits (node_id, number, entries, digest) VALUES (:lane, :number, 0, ''::bytea);

-- name: commit_at @postgres
SELECT digest FROM commits WHERE node_id = :lane AND number = :number;

-- name: found @postgres
-- What stands at the places of entries that did not go in.
SELECT j.run_id, j.seq, j.digest FROM journal AS j
JOIN unnest(:run_id::uuid[], :seq::bigint[]) AS w (run_id, seq)
  ON j.run_id = w.run_id AND j.seq = w.seq;

-- name: journals @postgres
SELECT run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at FROM journal
WHERE run_id = ANY (:runs::uuid[]) ORDER BY run_id, seq;

-- name: anchors @postgres
SELECT run_id, head_seq, head_digest FROM runs WHERE run_id = ANY (:runs::uuid[]);

-- name: ids_of_entries @postgres
WITH RECURSIVE found (run_id) AS (
    (SELECT run_id FROM journal ORDER BY run_id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.run_id FROM journal AS j WHERE j.run_id > found.run_id
            ORDER BY j.run_id LIMIT 1)
    FROM found WHERE found.run_id IS NOT NULL
)
SELECT run_id FROM found WHERE run_id IS NOT NULL;

-- name: states @postgres
SELECT run_id, state FROM runs;

-- name: run_row @postgres
SELECT workflow, version, digest, priority, queue, idempotency_key, parent_run_id, wake_first,
       origin, labels, input,
       state, reason, owner, wake_at, inbox_seq, output, error,
       epoch, head_seq, head_digest, created_at, started_at, finished_at, run_id
FROM runs WHERE run_id = :run_id;

-- name: inbox_seqs @postgres
SELECT run_id, inbox_seq FROM runs WHERE run_id = ANY (:runs::uuid[]);

-- name: pick @postgres
-- Each node gets other runs (SKIP LOCKED), and keeps them for as long as a claim may take. A node
-- that died between pick and claim keeps nobody waiting.
WITH due AS MATERIALIZED (
    SELECT run_id FROM runs
    WHERE state IN ('pending', 'waiting') AND owner IS NULL AND wake_at <= :now::bigint
      AND (picked_until < :now::bigint OR picked_by = :node_id OR NOT EXISTS (
           SELECT 1 FROM nodes WHERE node_id = picked_by AND nodes.state IN ('alive', 'leaving')))
      AND queue <> ALL (:full_queues::text[]) AND digest <> ALL (:strange::text[])
      AND run_id <> ALL (:except_runs::uuid[])
      AND (:queue::text IS NULL OR queue = :queue::text)
    ORDER BY priority DESC, wake_at, run_id LIMIT :limit
    FOR UPDATE SKIP LOCKED
), picked AS (
    UPDATE runs SET picked_by = :node_id, picked_until = :until
    FROM due WHERE runs.run_id = due.run_id
    RETURNING runs.*
)
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM picked ORDER BY priority DESC, wake_at, run_id;

-- name: adopt @postgres
-- The same for runs of nodes that do not live any more.
WITH orphaned AS MATERIALIZED (
    SELECT run_id FROM runs
    WHERE owner IS NOT NULL
      AND owner NOT IN (SELECT node_id FROM nodes WHERE nodes.state IN ('alive', 'leaving'))
      AND (picked_until < :now::bigint OR picked_by = :node_id OR NOT EXISTS (
           SELECT 1 FROM nodes WHERE node_id = picked_by AND nodes.state IN ('alive', 'leaving')))
      AND run_id <> ALL (:except_runs::uuid[]) AND digest <> ALL (:strange::text[])
    ORDER BY priority DESC, run_id LIMIT :limit
    FOR UPDATE SKIP LOCKED
), picked AS (
    UPDATE runs SET picked_by = :node_id, picked_until = :until
    FROM orphaned WHERE runs.run_id = orphaned.run_id
    RETURNING runs.run_id, runs.priority
)
SELECT run_id FROM picked ORDER BY priority DESC, run_id;

-- name: put_back @postgres
UPDATE runs SET picked_until = 0 WHERE run_id = ANY (:runs::uuid[]) AND picked_by = :node_id;

-- name: lock_queue @postgres
-- Whoever counts what a queue has in flight does so alone, in a statement after this one (a lock and
-- what it protects must not share a snapshot).
SELECT pg_advisory_xact_lock(hashtextextended('llm_orchestrator.queue.' || :queue::text, 0));

-- name: in_flight @postgres
-- What somebody drives, or is about to: what `pick` would offer to nobody else.
SELECT count(*) FROM runs
WHERE queue = :queue
  AND (owner IS NOT NULL OR (
       state IN ('pending', 'waiting') AND picked_until >= :now::bigint AND EXISTS (
       SELECT 1 FROM nodes WHERE node_id = picked_by AND nodes.state IN ('alive', 'leaving'))));

-- name: join @postgres
INSERT INTO nodes (node_id, region, state, beat, started_at, heartbeat_at, info, session_pid,
                   session_start)
SELECT :node_id, :region, 'alive', 0, :now::bigint, :now::bigint, :info, pg_backend_pid(), a.backend_start
FROM pg_stat_get_activity(pg_backend_pid()) AS a;

-- name: beat @postgres
-- Says also from which session the node beats, so that others see when that one closes.
UPDATE nodes SET
    beat = beat + 1,
    heartbeat_at = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    info = :info,
    session_pid = pg_backend_pid(),
    session_start = (SELECT backend_start FROM pg_stat_get_activity(pg_backend_pid()))
WHERE node_id = :node_id AND state IN ('alive', 'leaving');

-- name: members @postgres
SELECT n.node_id, n.region, n.state, n.beat,
       EXISTS (SELECT 1 FROM pg_stat_get_activity(n.session_pid) AS a
               WHERE a.backend_start IS NULL OR a.backend_start = n.session_start),
       n.started_at, n.heartbeat_at, n.info
FROM nodes AS n WHERE n.state IN ('alive', 'leaving') OR n.node_id = :node_id ORDER BY n.node_id;

-- name: nodes @postgres
SELECT n.node_id, n.region, n.state, n.beat,
       EXISTS (SELECT 1 FROM pg_stat_get_activity(n.session_pid) AS a
               WHERE a.backend_start IS NULL OR a.backend_start = n.session_start),
       n.started_at, n.heartbeat_at, n.info
FROM nodes AS n ORDER BY n.started_at DESC, n.node_id LIMIT :limit;

-- name: server @postgres
-- Which server process this is, and whether it may be written to. A backend's own view of time.
SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on',
       pg_postmaster_start_time()::text || ' ' || COALESCE(inet_server_addr()::text, '')
       || ':' || COALESCE(inet_server_port()::text, ''),
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
       CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END;

-- name: may_see_standbys @postgres
-- Other roles see that there are some, and nothing of them.
SELECT pg_has_role(current_user, 'pg_monitor', 'USAGE');

-- name: standbys @postgres
-- A standby that answers no more keeps the lag that it told last: then count since it told it.
SELECT s.application_name, COALESCE(s.sync_state IN ('sync', 'quorum'), false),
       COALESCE(extract(epoch FROM CASE WHEN s.replay_lsn < pg_current_wal_lsn() THEN
           GREATEST(s.replay_lag, clock_timestamp() - s.reply_time) END), 0)::float8,
       COALESCE(pg_wal_lsn_diff(pg_current_wal_lsn(), s.replay_lsn), 0)::bigint,
       COALESCE(extract(epoch FROM CASE WHEN s.flush_lsn < pg_current_wal_lsn() THEN
           GREATEST(s.flush_lag, clock_timestamp() - s.reply_time) END), 0)::float8
FROM pg_stat_replication AS s ORDER BY s.application_name;

-- name: damaged_pages @postgres
-- Pages whose checksum did not fit, as this server has counted them, and how long ago the last one
-- was met. NULL where the data has no checksums.
SELECT sum(checksum_failures)::bigint,
       extract(epoch FROM clock_timestamp() - max(checksum_last_failure))::float8
FROM pg_stat_database;

-- name: nearest @postgres
-- pgvector; exact unless somebody has made an index for approximate search.
SELECT id, vector, metadata FROM vectors
WHERE index_name = :index_name AND namespace = :namespace
  AND vector_dims(embedding) = :dimensions
ORDER BY embedding <=> CAST(CAST(:near AS text) AS vector), id LIMIT :limit;

-- name: put_vector_near @postgres
INSERT INTO vectors (index_name, namespace, id, vector, metadata, embedding)
VALUES (:index_name, :namespace, :id, :vector, :metadata, CAST(CAST(:near AS text) AS vector))
ON CONFLICT (index_name, namespace, id) DO UPDATE
SET vector = excluded.vector, metadata = excluded.metadata, embedding = excluded.embedding;
