"""Prove that a seed runs the engine and the writer as they are: `python -m` this, exit code 0."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import llm_orchestrator.engine
from tests.simulation.__main__ import play


def parts() -> Iterator[tuple[str, Any]]:
    """Every class, method and function that engine/ and store/writer.py define."""
    names = [f"llm_orchestrator.engine.{m.name}" for m in pkgutil.iter_modules(_path())]
    for name in [*names, "llm_orchestrator.store.writer"]:
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            if getattr(value, "__module__", None) != name:
                continue
            yield f"{name}.{key}", value
            if inspect.isclass(value):
                yield from ((f"{name}.{key}.{k}", v) for k, v in sorted(vars(value).items()))


def _path() -> list[str]:
    return list(llm_orchestrator.engine.__path__)


def foreign(found: dict[str, Any]) -> list[str]:
    """Functions whose code does not come from the package's own files."""
    codes = {name: getattr(value, "__code__", None) for name, value in found.items()}
    return [
        name
        for name, code in codes.items()
        if code is not None and "llm_orchestrator" not in code.co_filename
        if code.co_filename != "<string>"  # what dataclasses write
        and not code.co_filename.startswith("<")
        and "/lib/python" not in code.co_filename
    ]


def main() -> int:
    """Compare before, while and after a seed is played."""
    from tests.simulation.world import World

    before = dict(parts())
    seen: list[dict[str, Any]] = []
    original = World.kill

    def kill(self: World, *arguments: Any, **options: Any) -> None:
        seen.append(dict(parts()))
        original(self, *arguments, **options)

    World.kill = kill  # type: ignore[method-assign]
    for seed in range(8):
        world, violations = play(seed)
        kinds = {type(machine.node).__module__ for machine in world.machines if machine.node}
        if violations or kinds - {"llm_orchestrator.engine.node"}:
            print(seed, violations, kinds)
            return 1
    seen.append(dict(parts()))
    changed = [name for look in seen for name in before if look.get(name) is not before[name]]
    wrong = [*changed, *foreign(before)]
    print(f"{len(before)} parts, looked at {len(seen)} times: {wrong or 'untouched'}")
    return 1 if wrong or len(seen) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
