# What the four scripts share: words on stderr, and the documented environment as llmo wants it.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that read this use what is set here

usage_and_exit() { # the comment at the head of the calling script is its help
  sed -n '2,/^[^#]/{s/^# \{0,1\}//;t show;d;:show;p}' "$0"
  exit "$1"
}

refuse() { # what is wrong; exit code 2
  echo "error: $1" >&2
  echo "hint: $(basename "$0") --help" >&2
  exit 2
}

encoded() { # as a part of a URL; bytes, whatever the locale
  local LC_ALL=C text=$1 character position
  for ((position = 0; position < ${#text}; position++)); do
    character=${text:position:1}
    case $character in
      [a-zA-Z0-9._~-]) printf '%s' "$character" ;;
      *) printf '%%%02X' "'$character" ;;
    esac
  done
}

# The command: LLMO, else the one of this clone, else the one that is installed.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -n "${LLMO:-}" ]; then
  read -r -a llmo <<< "$LLMO"
elif [ -x "$here/.venv/bin/llmo" ]; then
  llmo=("$here/.venv/bin/llmo")
else
  llmo=(llmo)
fi

# DB_* name a PostgreSQL store, if any of them is set. The password stays in the environment: no
# list of processes shows it.
if [ -n "${DB_HOST:-}${DB_PORT:-}${DB_NAME:-}${DB_USER:-}" ]; then
  user=$(encoded "${DB_USER:-orchestrator}")
  if [ -n "${PGPASSWORD:-}" ]; then user+=:$(encoded "$PGPASSWORD"); fi
  database=$(encoded "${DB_NAME:-orchestrator}")
  export LLM_ORCHESTRATOR_URL="postgresql://$user@${DB_HOST:-localhost}:${DB_PORT:-5432}/$database"
  unset user database
fi

# Where backup files are. More words for any verb of `llmo backup`, and for `llmo restore`.
where=()
if [ -n "${BACKUP_DIR:-}" ]; then where+=(--dir "$BACKUP_DIR"); fi
if [ -n "${S3_BUCKET:-}" ]; then
  prefix=${S3_PREFIX-backups/llm-orchestrator}
  where+=(--place "s3://$S3_BUCKET/${prefix#/}")
fi

keep=()
if [ -n "${RETENTION_DAYS:-}" ]; then
  case $RETENTION_DAYS in
    *[!0-9]*) refuse "RETENTION_DAYS is '$RETENTION_DAYS'; it takes a whole number of days" ;;
  esac
  keep=(--keep-days "$RETENTION_DAYS")
fi
