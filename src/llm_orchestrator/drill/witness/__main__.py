"""`python -m llm_orchestrator.drill.witness`."""

from llm_orchestrator.drill.witness.service import main

main()
