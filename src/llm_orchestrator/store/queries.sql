-- Every statement, once. A name line starts each; parameters are :named and numbered by the adapter
-- in the order in which they first appear. Text after `--` below a name says why it is as it is.

-- name: append
-- Law 1: plain INSERT, never ON CONFLICT; the predecessor must be there with its digest (without
-- it the key is NULL, which no row takes), and the primary key refuses a seq that is taken.
-- VALUES, not SELECT: SQLite copies what a SELECT on the same table gives into a table of its own.
-- Differs because SQLite has no unnest and PostgreSQL wants one statement a batch.
INSERT INTO journal (run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at)
VALUES (
    CASE WHEN :prev_seq = 0
           OR (SELECT digest FROM journal WHERE run_id = :run_id AND seq = :prev_seq) = :prev_digest
         THEN :run_id END,
    :seq, :epoch, :kind, :step, :attempt, :payload, :digest, :recorded_at);

-- name: digest_at
SELECT digest FROM journal WHERE run_id = :run_id AND seq = :seq;

-- name: scan_digest
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

-- name: next_message
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

-- name: inbox_seq
SELECT inbox_seq FROM runs WHERE run_id = :run_id;

-- name: register
INSERT INTO workflows (name, version, digest, definition, created_at)
VALUES (:name, :version, :digest, :definition, :created_at)
ON CONFLICT (name, version, digest) DO UPDATE SET definition = excluded.definition;

-- name: workflow
SELECT name, version, digest, definition, created_at FROM workflows
WHERE name = :name AND (:version IS NULL OR version = :version) AND (:digest IS NULL OR digest = :digest)
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

-- name: journal_from
-- A run's rows and the first one behind them: an index whose key was damaged shows there.
SELECT run_id, seq, epoch, kind, step, attempt, payload, digest, recorded_at FROM journal
WHERE run_id >= :run_id ORDER BY run_id, seq;

-- name: journal_scan
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
  AND (:workflow IS NULL OR workflow = :workflow)
  AND (:parent_run_id IS NULL OR parent_run_id = :parent_run_id)
  AND (:queue IS NULL OR queue = :queue)
  AND (:label IS NULL OR instr(labels, '{' || :label) > 0 OR instr(labels, ',' || :label) > 0)
  AND (:before IS NULL OR run_id < :before)
ORDER BY run_id DESC LIMIT :limit;

-- name: ids_of_rows
SELECT run_id FROM runs ORDER BY run_id;

-- name: ids_of_entries
-- From run to run through the key, without looking at every entry.
WITH RECURSIVE found (run_id) AS (
    SELECT MIN(run_id) FROM journal
    UNION ALL
    SELECT (SELECT MIN(run_id) FROM journal WHERE run_id > found.run_id)
    FROM found WHERE found.run_id IS NOT NULL
)
SELECT run_id FROM found WHERE run_id IS NOT NULL;

-- name: states
-- From the table, past its index: a row whose own id is damaged is there under its right one only
-- in the index. Differs because only SQLite says it so.
SELECT run_id, state FROM runs NOT INDEXED;

-- name: anchor
SELECT head_seq, head_digest FROM runs WHERE run_id = :run_id;

-- name: run_row
-- The last column is the id as the table has it (found was the row through the index).
SELECT workflow, version, digest, priority, queue, idempotency_key, parent_run_id, wake_first,
       origin, labels, input,
       state, reason, owner, wake_at, inbox_seq, output, error,
       epoch, head_seq, head_digest, created_at, started_at, finished_at,
       (SELECT own.run_id FROM runs AS own NOT INDEXED WHERE own.rowid = runs.rowid)
FROM runs WHERE run_id = :run_id;

-- name: claimable
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs
WHERE state IN ('pending', 'waiting') AND owner IS NULL AND wake_at <= :now
  AND instr(:full_queues, ',' || queue || ',') = 0
  AND instr(:strange, ',' || digest || ',') = 0
  AND (:queue IS NULL OR queue = :queue)
ORDER BY priority DESC, wake_at, run_id LIMIT :limit;

-- name: driven
SELECT COUNT(*) FROM runs WHERE owner IS NOT NULL AND queue = :queue;

-- name: owned
-- Runs of nodes that do not live.
SELECT run_id FROM runs
WHERE owner IS NOT NULL AND instr(:alive, ',' || owner || ',') = 0 ORDER BY priority DESC, run_id;

-- name: next_wake
SELECT MIN(wake_at) FROM runs WHERE state IN ('pending', 'waiting') AND owner IS NULL;

-- name: expirable
-- The oldest finished runs beyond an age or a count, a handful at a time: no long lock.
SELECT run_id, workflow, version, digest, state, reason, owner, epoch, priority, queue,
       idempotency_key, parent_run_id, wake_at, inbox_seq, labels, created_at, started_at, finished_at
FROM runs
WHERE finished_at IS NOT NULL AND state IN ('completed', 'failed', 'cancelled')
  AND (finished_at < :finished_before
       OR finished_at < (SELECT finished_at FROM runs WHERE finished_at IS NOT NULL
                         ORDER BY finished_at DESC LIMIT 1 OFFSET :keep - 1))
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

-- name: drop_row
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

-- name: join
INSERT INTO nodes (node_id, region, state, beat, started_at, heartbeat_at, info)
VALUES (:node_id, :region, 'alive', 0, :now, :now, :info);

-- name: beat
UPDATE nodes SET beat = beat + 1, heartbeat_at = :now, info = :info
WHERE node_id = :node_id AND state IN ('alive', 'leaving');

-- name: members
SELECT node_id, region, state, beat, 1, started_at, heartbeat_at, info FROM nodes
WHERE state IN ('alive', 'leaving') OR node_id = :node_id ORDER BY node_id;

-- name: nodes
-- For people: the dead ones, too, newest first.
SELECT node_id, region, state, beat, 1, started_at, heartbeat_at, info FROM nodes
ORDER BY started_at DESC, node_id LIMIT :limit;

-- name: bury
-- Only while it is as silent as it was when it was judged.
UPDATE nodes SET state = 'dead'
WHERE node_id = :node_id AND beat = :beat AND state IN ('alive', 'leaving');

-- name: bury_others
-- A file has one engine: whoever holds its lock is the only one that lives.
UPDATE nodes SET state = 'dead' WHERE state IN ('alive', 'leaving') AND node_id <> :node_id;

-- name: leave
UPDATE nodes SET state = :state WHERE node_id = :node_id AND state IN ('alive', 'leaving');

-- name: forget_nodes
-- Rows of nodes that are gone are kept for people, not for ever.
DELETE FROM nodes WHERE state IN ('left', 'dead') AND heartbeat_at < :before
  AND NOT EXISTS (SELECT 1 FROM runs WHERE owner = nodes.node_id);
