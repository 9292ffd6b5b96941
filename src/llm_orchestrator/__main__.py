"""`python -m llm_orchestrator` is `llmo`."""

from __future__ import annotations

import sys

from llm_orchestrator.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
