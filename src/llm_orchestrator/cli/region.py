"""`llmo region`: which regions work, and moving the work from one to another.

The roles are one record in the store that every node obeys. Where the primary of the database is,
the arbiter decides (Patroni); with `patroni_urls` in the configuration it is moved with the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import ObjectFormat, ObjectOutput, make_app
from llm_orchestrator.cli.output import emit, print_object, print_table
from llm_orchestrator.cli.session import Session, session_of, whoami
from llm_orchestrator.model import Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.engine.region import Regions
    from llm_orchestrator.recovery.region import Done, Plan, Scene, Site

app = make_app("Which regions work; fail over, and back. Without a verb: status.")
COLUMNS = ("region", "role", "home", "nodes", "runs", "primary", "note")
SERVERS = ("server", "region", "role", "state", "lag_bytes", "lag_s", "note")
Name = Annotated[str, typer.Argument(metavar="REGION", help="The region, as nodes name it.")]
To = Annotated[str, typer.Option("--to", metavar="REGION", help="The region that is to work.")]
Why = Annotated[str, typer.Option("--reason", help="Why: it stands in the record.")]
By = Annotated[str | None, typer.Option("--by", help="Who says so (you).")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
IsOff = Annotated[
    bool,
    typer.Option(
        "--old-region-is-off",
        help="You vouch for it that nothing runs in the old region: no arbiter can say so.",
    ),
]
Wait = Annotated[
    float, typer.Option("--wait", min=0.0, help="How long runs get to leave, in seconds.")
]


@app.command()
def status(context: typer.Context, *, output: ObjectOutput = ObjectFormat.TABLE) -> None:
    """Say which regions work, where the primary is, and who follows it how far behind."""
    session = session_of(context)

    async def work() -> Scene:
        from llm_orchestrator.recovery.region import look

        async with _site(session) as site:
            return await look(site)

    scene = session.run(work())
    facts = facts_of(scene)
    if output is not ObjectFormat.TABLE:
        print_object(facts, output.value)
        return
    print_table(facts["regions"], COLUMNS)
    if facts["servers"]:
        emit("")
        print_table(facts["servers"], SERVERS)
    about = f"{facts['policy']}, sync {facts['sync'] or 'unknown'}"
    session.note(about + (f"; since {facts['since']}: {facts['why']}" if facts["since"] else ""))


@app.command()
def plan(
    context: typer.Context,
    *,
    to: To,
    is_off: IsOff = False,
    output: ObjectOutput = ObjectFormat.TABLE,
) -> None:
    """Check what a failover needs, and print what it would do. Changes nothing."""
    session = session_of(context)

    async def work() -> Plan:
        from llm_orchestrator.recovery.region import look, make_plan

        async with _site(session) as site:
            return make_plan(await look(site), to, lease_s=site.lease_s, is_off=is_off)

    found = session.run(work())
    _print_plan(found, output)
    if found.troubles:
        raise typer.Exit(1)


@app.command()
def failover(
    context: typer.Context,
    *,
    to: To,
    is_agreed: Yes = False,
    is_off: IsOff = False,
    wait_s: Wait = 30.0,
    reason: Why = "",
    by: By = None,
) -> None:
    """Let another region do the work; the primary goes with it where Patroni is configured."""
    session = session_of(context)
    why = reason or "failover"
    move = _Move(session, "region.failover", is_off=is_off, wait_s=wait_s, by=by or whoami())
    _print_done(session, session.run(move.work(lambda _: to, why, is_agreed=is_agreed)))


@app.command()
def failback(
    context: typer.Context,
    *,
    is_agreed: Yes = False,
    wait_s: Wait = 30.0,
    reason: Why = "",
    by: By = None,
) -> None:
    """Everything as the policy has it, in order: home works, or all do; nobody is fenced."""
    session = session_of(context)
    why = reason or "failback"
    move = _Move(session, "region.failback", is_off=False, wait_s=wait_s, by=by or whoami())
    move.is_back = True

    def home(regions: Regions) -> str:
        from llm_orchestrator.recovery.region import home_of

        return home_of(regions)

    _print_done(session, session.run(move.work(home, why, is_agreed=is_agreed)))


@app.command()
def fence(context: typer.Context, region: Name, *, reason: Why = "", by: By = None) -> None:
    """A region claims nothing and does not take over, until `unfence`, failover to it, failback."""
    session = session_of(context)

    def change(regions: Regions) -> Regions:
        from llm_orchestrator.engine.region import fenced

        return fenced(regions, region)

    _change(session, "region.fence", change, target=region, why=reason or "fenced", by=by)
    session.note(f"region {region} is fenced\nhint: llmo region unfence {region}")


@app.command()
def unfence(context: typer.Context, region: Name, *, reason: Why = "", by: By = None) -> None:
    """Let a fenced region work again; where one region works, it stands by."""
    session = session_of(context)

    def change(regions: Regions) -> Regions:
        from llm_orchestrator.engine.region import unfenced

        return unfenced(regions, region)

    _change(session, "region.unfence", change, target=region, why=reason or "unfenced", by=by)
    session.note(f"region {region} is not fenced any more")


@app.command()
def policy(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[POLICY]", help="active-active or active-passive.")
    ] = None,
    *,
    home: Annotated[str, typer.Option("--home", help="Where the work belongs.")] = "",
    sync: Annotated[
        str | None,
        typer.Option(
            "--sync", help="strict or degrade: commits without a second copy stall or not."
        ),
    ] = None,
    reason: Why = "",
    by: By = None,
) -> None:
    """Set which regions work while nothing is wrong, and what commits wait for."""
    from llm_orchestrator.engine.region import Policy, with_policy

    session = session_of(context)
    if name is None and sync is None:
        raise typer.BadParameter("give a policy, or --sync")
    if name is not None and name not in list(Policy):
        raise typer.BadParameter(f"the policy is {' or '.join(Policy)}")
    if sync not in (None, "strict", "degrade"):
        raise typer.BadParameter("--sync is strict or degrade")
    if name is not None:
        chosen = Policy(name)
        why = reason or f"policy {name}"
        _change(
            session,
            "region.policy",
            lambda regions: with_policy(regions, chosen, home),
            target=home,
            why=why,
            by=by,
        )
        session.note(f"policy {name}" + (f", home {home}" if home else ""))
    if sync is not None:
        session.run(_set_sync(session, sync, by=by))
        session.note(f"sync {sync}")


class _Move:
    """A failover or a failback, from the first question to the audit log's last entry."""

    def __init__(
        self, session: Session, action: str, *, is_off: bool, wait_s: float, by: str
    ) -> None:
        self._session = session
        self._action = action
        self._is_off = is_off
        self._wait_s = wait_s
        self._by = by
        self.is_back = False

    async def work(self, to: Callable[[Regions], str], why: str, *, is_agreed: bool) -> Done:
        """`to`: where, as the record has it. Raises Refused, StoreError, Abort."""
        from llm_orchestrator.engine.region import Regions
        from llm_orchestrator.recovery.region import arbitrate, demand, fail_over, look, make_plan
        from llm_orchestrator.wire.region import patroni_of

        session = self._session
        async with patroni_of(session.config, session.clock) as patroni:
            if patroni is not None and not self.is_back:
                await arbitrate(patroni, to(Regions()), is_off=self._is_off)
        async with _site(session) as site:
            scene = await look(site)
            region = to(scene.regions)
            plan = make_plan(scene, region, lease_s=site.lease_s, is_off=self._is_off)
            if not is_agreed:
                _print_plan(plan, ObjectFormat.TABLE)
                typer.confirm("do it?", abort=True, err=True)
            detail: dict[str, Json] = {"by": self._by, "reason": why, "is_off": self._is_off}
            async with session.audited(
                site.store, self._action, target=region, detail=detail
            ) as told:
                demand(plan)
                done = await fail_over(
                    site,
                    plan,
                    by=self._by,
                    why=why,
                    wait_s=self._wait_s,
                    is_back=self.is_back,
                    tell=session.note,
                )
                told["gap_s"] = round(done.gap_s, 3)
            return done


@asynccontextmanager
async def _site(session: Session) -> AsyncIterator[Site]:
    from llm_orchestrator.recovery.region import Site
    from llm_orchestrator.wire.region import patroni_of

    lease_s = session.config.lease_ms / 1_000
    async with patroni_of(session.config, session.clock) as patroni, session.client() as store:
        yield Site(store, lease_s, patroni)


def _change(
    session: Session,
    action: str,
    change: Callable[[Regions], Regions],
    *,
    target: str,
    why: str,
    by: str | None,
) -> None:
    async def work() -> Regions:
        from llm_orchestrator.engine.region import change_regions

        async with session.client() as store:
            detail: dict[str, Json] = {"by": by, "reason": why}
            async with session.audited(store, action, target=target, detail=detail):
                return await change_regions(store, store.clock, change, by=by or whoami(), why=why)

    print_object(session.run(work()).to_json(), "json")


async def _set_sync(session: Session, sync: str, *, by: str | None) -> None:
    from llm_orchestrator.errors import ConfigError

    async with _site(session) as site:
        if site.patroni is None:
            raise ConfigError("patroni_urls is not set", hint="llmo config show")
        detail: dict[str, Json] = {"by": by, "sync": sync}
        async with session.audited(site.store, "region.policy", target="sync", detail=detail):
            await site.patroni.set_strict(is_strict=sync == "strict")


# --- printing ---


def facts_of(scene: Scene) -> dict[str, Json]:
    """Everything about the regions, for printing."""
    regions, cluster = scene.regions, scene.cluster
    runs = scene.runs_in()
    known = (
        set(scene.living) | {each.region for each in cluster.servers} if cluster else scene.living
    )
    return {
        "policy": regions.policy.value,
        "home": regions.home or None,
        "counter": regions.counter,
        "since": stamp(regions.since) if regions.since else None,
        "by": regions.by or None,
        "why": regions.why or None,
        "sync": cluster.sync if cluster else None,
        "primary": cluster.leader or None if cluster else None,
        "primary_region": cluster.region or None if cluster else None,
        "patroni": _patroni(scene),
        "regions": [
            {
                "region": name,
                "role": regions.role_of(name).value,
                "home": "home" if name == regions.home else None,
                "nodes": sum(node.region == name for node in scene.nodes),
                "runs": runs[name],
                "primary": "primary" if cluster and cluster.region == name else None,
                "note": None if name in scene.living else "no node lives there",
            }
            for name in regions.known(known)
        ],
        "servers": _servers(scene),
    }


def _patroni(scene: Scene) -> str:
    if not scene.has_patroni:
        return "not configured"
    if scene.cluster is None:
        return "no answer"
    return f"{scene.cluster.leader} leads" if scene.cluster.leader else "nobody leads"


def _servers(scene: Scene) -> list[dict[str, Json]]:
    """The database's servers: as Patroni tells it, else as the primary sees who follows it."""
    lags = {standby.name: standby for standby in scene.standbys or ()}
    if scene.cluster is None:
        return [
            {
                "server": each.name,
                "region": None,
                "role": "sync_standby" if each.is_sync else "replica",
                "state": None,
                "lag_bytes": each.lag_bytes,
                "lag_s": round(each.lag_s, 3),
                "note": None,
            }
            for each in lags.values()
        ]
    home = scene.cluster.region
    has_others = any(each.region != home for each in scene.cluster.servers)
    return [
        {
            "server": each.name,
            "region": each.region,
            "role": each.role,
            "state": each.state,
            "lag_bytes": lags[each.name].lag_bytes if each.name in lags else each.lag_bytes,
            "lag_s": round(lags[each.name].lag_s, 3) if each.name in lags else None,
            "note": (
                "commits wait for it, and it dies with the primary's region"
                if has_others and each.is_sync and each.region == home
                else "outside the primary's region"
                if each.is_sync and each.region != home
                else None
            ),
        }
        for each in scene.cluster.servers
    ]


def _print_plan(found: Plan, output: ObjectFormat) -> None:
    checks = [
        {"check": each.name, "result": "ok" if each.is_ok else "not ok", "detail": each.detail}
        for each in found.checks
    ]
    if output is not ObjectFormat.TABLE:
        facts = {"to": found.to, "is_ok": not found.troubles, "checks": checks}
        print_object({**facts, "steps": list(found.steps)}, output.value)
        return
    print_table(checks, ("check", "result", "detail"))
    emit("")
    for number, step in enumerate(found.steps, 1):
        emit(f"{number}. {step}")


def _print_done(session: Session, done: Done) -> None:
    facts: dict[str, Json] = {
        "roles": {name: role.value for name, role in done.regions.roles.items()},
        "counter": done.regions.counter,
        "primary_moved_to": done.primary or None,
        "write_gap_s": round(done.gap_s, 3),
        "runs_moved": done.runs_before - done.runs_left,
        "runs_left": done.runs_left,
        "nodes_that_have_not_heard": list(done.deaf),
    }
    session.note(f"nothing could be written for {done.gap_s:.2f} s")
    if done.runs_left:
        session.note(f"{done.runs_left} runs still end a step elsewhere; they leave after it")
    print_object(facts, "json")
