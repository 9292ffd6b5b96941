#!/usr/bin/env bash
# Read every byte of a backup, without restoring it: `llmo backup verify`.
# Usage: verify_backup.sh [-h|--help] [FILE|ID|s3://BUCKET/NAME]    (the newest one)
# Exit codes: 0 whole, 4 not there, 8 damaged, 12 no key opens it.
#
# BACKUP_DIR, S3_BUCKET, S3_PREFIX, DB_*, PGPASSWORD, LLMO   as for backup.sh
set -euo pipefail
# shellcheck source=scripts/backup/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

backup=
for word in "$@"; do
  case $word in
    -h | --help) usage_and_exit 0 ;;
    -*) refuse "there is no option $word" ;;
    *) if [ -z "$backup" ]; then backup=$word; else refuse "one backup, not also $word"; fi ;;
  esac
done
exec "${llmo[@]}" backup verify "${backup:-latest}" "${where[@]}"
