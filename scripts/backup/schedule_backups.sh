#!/usr/bin/env bash
# Make this machine back up by itself, with a systemd timer or with cron, one of them:
# `llmo backup schedule install`. Each backup is proved, old ones go.
# Usage: schedule_backups.sh [-h|--help] [install|show|remove] [more words, e.g. --with cron, --root DIR,
#        --user NAME, --dry-run]
#
# BACKUP_SCHEDULE   cron text ("0 2 * * *" where an archive keeps what comes between, else hourly)
# BACKUP_DIR, RETENTION_DAYS, S3_BUCKET, S3_PREFIX, DB_*, PGPASSWORD, LLMO   as for backup.sh
set -euo pipefail
# shellcheck source=scripts/backup/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for word in "$@"; do
  case $word in -h | --help) usage_and_exit 0 ;; esac
done
verb=install
case ${1:-} in
  install | show | remove)
    verb=$1
    shift
    ;;
esac
if [ "$verb" != install ]; then exec "${llmo[@]}" backup schedule "$verb" "$@"; fi
when=()
if [ -n "${BACKUP_SCHEDULE:-}" ]; then when=(--cron "$BACKUP_SCHEDULE"); fi
exec "${llmo[@]}" backup schedule install "${when[@]}" "${keep[@]}" "${where[@]}" "$@"
