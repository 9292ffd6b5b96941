"""The witness: a process outside the system under test, with a ledger of its own.

It asks through HTTP and plain SQL only and imports nothing of the engine, the store, the recovery,
the language or the server (import-linter holds that). What it has written down it has seen itself:
acceptances that were acknowledged to it, entries that a reader of the database found, effects that
it received. `python -m llm_orchestrator.drill.witness` reads orders as JSON lines from stdin and
answers on stdout; when stdin closes it ends.
"""
