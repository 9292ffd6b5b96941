#!/usr/bin/env bash
# Put the store back from a backup: `llmo restore`. It verifies first, restores aside, checks, and only
# then exchanges; the old store is kept under another name. Any failure leaves the live one as it was.
# Usage: restore.sh [OPTION...] [FILE|ID]        (the newest one)
#   -v, --verify         verify the backup, say what would be taken back, and then ask
#   -f, --force          do not ask
#   -d, --download URL   take it from s3://BUCKET/PREFIX/NAME
#   -n, --dry-run        only say what would be done
#   -h, --help           this
# Exit codes: 0 restored, 2 nobody said yes, 4 not there, 8 damaged, 11 an engine serves the file (stop
# it first), 12 no key opens it.
#
# BACKUP_DIR, S3_BUCKET, S3_PREFIX, DB_*, PGPASSWORD, LLMO   as for backup.sh
set -euo pipefail
# shellcheck source=scripts/backup/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

backup='' verify='' how=()
name() {
  if [ -n "$backup" ]; then refuse "one backup, not also $1"; fi
  backup=$1
}
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage_and_exit 0 ;;
    -v | --verify) verify=yes ;;
    -f | --force) how+=(--yes) ;;
    -n | --dry-run) how+=(--dry-run) ;;
    -d | --download)
      case ${2:-} in s3://?*) ;; *) refuse "$1 needs s3://BUCKET/PREFIX/NAME" ;; esac
      name "$2"
      shift
      ;;
    --download=s3://?*) name "${1#*=}" ;;
    -*) refuse "there is no option $1" ;;
    *) name "$1" ;;
  esac
  shift
done

if [ -n "$verify" ]; then "${llmo[@]}" backup verify "${backup:-latest}" "${where[@]}"; fi
exec "${llmo[@]}" restore "${backup:-latest}" "${where[@]}" "${how[@]}"
