#!/usr/bin/env bash
# Back the store up while it is used, and let old backups go: `llmo backup create --prune`.
# Usage: backup.sh [-h|--help] [more words for `llmo backup create`, e.g. --prove]
# Prints the file. Exit codes: 0 made, 3 made but not copied to S3, 11 another one is at it.
#
# BACKUP_DIR      where backup files are (backups in the data folder)
# RETENTION_DAYS  how long they are kept (30)
# S3_BUCKET       a second place, in this bucket (none)
# S3_PREFIX       below this (backups/llm-orchestrator)
# DB_HOST DB_PORT DB_NAME DB_USER PGPASSWORD
#                 a PostgreSQL store (localhost, 5432, orchestrator, orchestrator); if none of DB_* is
#                 set, the store is the configured one: LLM_ORCHESTRATOR_URL, llm-orchestrator.toml
# LLMO            the command to call (the one of this clone, else `llmo`)
set -euo pipefail
# shellcheck source=scripts/backup/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for word in "$@"; do
  case $word in -h | --help) usage_and_exit 0 ;; esac
done
exec "${llmo[@]}" backup create --prune "${keep[@]}" "${where[@]}" "$@"
