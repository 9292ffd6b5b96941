"""Reading the settings again while the process runs (SIGHUP): what can change changes, by name.

What a process is built on (its store, its address, its identity, how it beats) cannot: a changed
value of those is named in a warning and waits for a restart. A file that cannot be read changes
nothing: the caller keeps the old configuration when `load_config` raises.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from llm_orchestrator.config import Config
from llm_orchestrator.wire.orchestrator import Orchestrator, node_options

logger = logging.getLogger(__name__)
_BOUNDS = {
    "maintenance_poll_s": "poll_s",
    "memory_limit_mb": "memory",
    "queues": "queues",
    "runs_max": "runs_max",
    "steps_max": "steps_max",
}
"""Settings of a node, and the NodeOptions that they become."""
RELOADABLE = frozenset({*_BOUNDS, "drain_timeout_s", "log_level", "outgoing_allow"})
LIMITS = frozenset({"requests_per_minute", "tokens_per_minute"})
"""What of a provider's table can change."""
_NOT_SETTINGS = frozenset({"origins"})
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "error": logging.ERROR}


class Reloaded(NamedTuple):
    """Names of settings: those in force now, and those that wait for a restart."""

    changed: tuple[str, ...]
    waiting: tuple[str, ...]
    config: Config
    """The configuration as it is in force: the new one, with old values for what waits."""


def reload(old: Config, new: Config, orchestrator: Orchestrator | None = None) -> Reloaded:
    """Put into force what can be. `orchestrator`: the node of this process, if it has one.

    Raises ConfigError for values that make no sense; then nothing has changed.
    """
    names = [item.name for item in fields(Config) if item.name not in _NOT_SETTINGS]
    different = [name for name in names if getattr(old, name) != getattr(new, name)]
    can_limit = "providers" in different and _bare(old.providers) == _bare(new.providers)
    changed = [name for name in different if name in RELOADABLE or (name, can_limit) == _LIMITED]
    waiting = [name for name in different if name not in changed]
    kept: dict[str, Any] = {name: getattr(old, name) for name in waiting}
    config = replace(new, **kept)
    if "outgoing_allow" in changed:
        _check_outgoing(config.outgoing_allow)
    if orchestrator is not None:
        _change(orchestrator, config, changed)
    if "log_level" in changed and config.log_level:
        level = _LEVELS.get(config.log_level, logging.WARNING)
        logging.getLogger().setLevel(level)
    if changed:
        logger.warning("settings changed: %s", ", ".join(changed))
    if waiting:
        logger.warning(
            "these settings changed, but need a restart to be in force: %s", ", ".join(waiting)
        )
    return Reloaded(tuple(changed), tuple(waiting), config)


def _check_outgoing(entries: Sequence[str]) -> None:
    """Raises ConfigError for an entry that means nothing."""
    from llm_orchestrator.steps.outgoing import Outgoing  # noqa: PLC0415 (its client is slow)

    Outgoing(entries)


def _change(orchestrator: Orchestrator, config: Config, changed: Sequence[str]) -> None:
    """The node's part. What the command line set stays, unless the setting itself has changed."""
    fresh, node = node_options(config, url=config.store_url), orchestrator.node
    bounds = {_BOUNDS[name]: getattr(fresh, _BOUNDS[name]) for name in changed if name in _BOUNDS}
    orchestrator.reconfigure(config)
    if bounds:
        node.reconfigure(replace(node.driver.options, **bounds))


_LIMITED = ("providers", True)


def _bare(providers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Providers without their limits; a table that has nothing else is none."""
    left = {
        name: {key: value for key, value in table.items() if key not in LIMITS}
        for name, table in providers.items()
    }
    return {name: table for name, table in left.items() if table}
