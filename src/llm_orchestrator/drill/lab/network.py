"""The lab's network: a namespace for each host, one for the switch between them, and its faults.

    host's namespace        the switch's namespace
    eth0 10.77.0.11/24 ---- p-a-db1 --+
                                      br0, an nftables table `part` on what it forwards
    eth0 10.77.0.12/24 ---- p-a-db2 --+

The machine's own interfaces, routes and rules are never touched, and nothing in the lab reaches the
world outside, nor the other way round: who wants to talk to a host opens a socket inside
(`inside`). A cut drops packets without a word, as a router that is gone does: nobody is told, not
even by an address that nobody answers to, for every host knows the others' hardware addresses.

The kernel keeps a namespace as long as its name is there: `clear` removes all that have our prefix,
and with it the interfaces. Needs root, `ip` (iproute2) and `nft` (nftables).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_orchestrator.drill.lab.spec import Place
from llm_orchestrator.drill.lab.tools import call, find
from llm_orchestrator.drill.lab_process import LabError

NAMES = Path("/run/netns")
_SWITCH = "switch"
_CLONE_NEWNET = 0x40000000
_RULES = """\
table bridge part {
  set mute { type ifname; }
  set deaf { type ifname; }
  set pair { type ifname . ifname; }
  chain loss {
  }
  chain hide {
  }
  chain fw {
    type filter hook forward priority 0; policy accept;
    iifname @mute drop
    oifname @deaf drop
    iifname . oifname @pair drop
    jump loss
    jump hide
  }
}
"""
_PROBE_PORT = 9_999
_PROBE_S = 0.2


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let this thread work in a namespace; a socket that it opens there stays there. "": nothing.

    There must be no `await` between. Raises LabError.
    """
    if not namespace:
        yield
        return
    try:
        there = (NAMES / namespace).open("rb")
    except OSError as error:
        raise LabError(f"there is no network namespace {namespace}: {error.strerror}") from error
    with there, Path("/proc/thread-self/ns/net").open("rb") as here:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise LabError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def prefix(place: Place) -> list[str]:
    """What goes before a command that is to run on a host."""
    if not place.namespace:
        return []
    return [find("nsenter"), f"--net={NAMES / place.namespace}", "--"]


class Network:
    """The switch of one lab. `places`: hosts with a namespace each."""

    def __init__(self, lab_id: str, places: Sequence[Place]) -> None:
        self._id = lab_id
        self._places = {place.name: place for place in places}
        self._switch = f"{lab_id}-{_SWITCH}"

    # -- its life -----------------------------------------------------------------------------

    def make(self) -> None:
        """Everything, at once. Raises LabError."""
        places = list(self._places.values())
        names = [self._switch, *(place.namespace for place in places)]
        lines = [f"netns add {name}" for name in names]
        for place in places:
            peer = f"peer name {_port(place.name)} netns {self._switch}"
            own = f"eth0 netns {place.namespace} address {_hardware(place)}"
            lines.append(f"link add {own} type veth {peer}")
        self._ip(lines)
        lines = ["link add br0 type bridge forward_delay 0", "link set br0 up"]
        for place in places:
            port = _port(place.name)
            lines += [f"link set {port} master br0", f"link set {port} up"]
        self._ip(lines, self._switch)
        for place in places:
            lines = [f"address add {place.address}/24 dev eth0", "link set eth0 up"]
            for other in places:
                if other is not place:
                    known = f"{other.address} lladdr {_hardware(other)} dev eth0"
                    lines.append(f"neighbour add {known} nud permanent")
            self._ip([*lines, "link set lo up"], place.namespace)
        self._nft(_RULES)

    def _ip(self, lines: Sequence[str], namespace: str = "") -> None:
        where = ("-n", namespace) if namespace else ()
        call(find("ip", hint="apt-get install iproute2"), *where, "-batch", "-", given=_text(lines))

    def _nft(self, rules: str) -> None:
        nft = find("nft", hint="make setup, or apt-get install nftables")
        place = Place(_SWITCH, "", "", self._switch, ())
        call(*prefix(place), nft, "-f", "-", given=rules)

    # -- faults -------------------------------------------------------------------------------

    def cut(self, name: str, *, says: bool = True, hears: bool = True) -> None:
        """Nothing that the host says (`says`), or that it should hear (`hears`), gets through."""
        port = _port(self._known(name))
        for is_wanted, group in ((says, "mute"), (hears, "deaf")):
            if is_wanted:
                self._nft(f'add element bridge part {group} {{ "{port}" }}\n')

    def cut_between(self, one: str, other: str, *, both_ways: bool = True) -> None:
        """Nothing gets from `one` to `other`, nor back unless told so; all others are heard."""
        ports = _port(self._known(one)), _port(self._known(other))
        for each in (ports, ports[::-1])[: 2 if both_ways else 1]:
            self._nft(f'add element bridge part pair {{ "{each[0]}" . "{each[1]}" }}\n')

    def lose(self, name: str, percent: int) -> None:
        """So much of what the host says and hears is lost, by chance. 0 ends it."""
        port = _port(self._known(name))
        if not 0 <= percent <= 100:
            raise LabError(f"{percent} % cannot be lost")
        lines = [f"flush chain bridge part loss_{_word(name)}"] if self._has_chain(name) else []
        if not lines:
            lines = [f"add chain bridge part loss_{_word(name)}"]
            lines.append(f"add rule bridge part loss jump loss_{_word(name)}")
        if percent:
            rule = f"numgen random mod 100 < {percent} drop" if percent < 100 else "drop"
            for side in ("iifname", "oifname"):
                lines.append(f'add rule bridge part loss_{_word(name)} {side} "{port}" {rule}')
        self._nft(_text(lines))

    def refuse(self, name: str, port: int) -> None:
        """The host answers its TCP port with a reset, whether somebody is connected or wants to."""
        place = self._places[self._known(name)]
        self._accept(name)
        rules = f"""\
table inet refuse {{
  chain in {{
    type filter hook input priority 0; policy accept;
    tcp dport {port} iifname != "lo" reject with tcp reset
  }}
}}
"""
        call(*prefix(place), find("nft"), "-f", "-", given=rules)

    def hide(self, name: str, other: str, port: int) -> None:
        """To the host `name`, a TCP port of `other` is gone without a word; all else is there."""
        side, address = _port(self._known(name)), self._places[self._known(other)].address
        rules = (
            f'iifname "{side}" ip daddr {address} tcp dport {port} drop',
            f'oifname "{side}" ip saddr {address} tcp sport {port} drop',
        )
        self._nft(_text([f"add rule bridge part hide {rule}" for rule in rules]))

    def _accept(self, name: str) -> None:
        """The end of `refuse`."""
        table = "table inet refuse\n"
        place = self._places[name]
        call(*prefix(place), find("nft"), "-f", "-", given=f"add {table}delete {table}")

    def _has_chain(self, name: str) -> bool:
        return f"chain loss_{_word(name)} " in self.rules()

    def rules(self) -> str:
        """What is in force, as nft prints it."""
        place = Place(_SWITCH, "", "", self._switch, ())
        return call(*prefix(place), find("nft"), "list", "table", "bridge", "part")

    def heal(self) -> None:
        """Everything gets through again."""
        self._nft("flush table bridge part\ndelete table bridge part\n" + _RULES)
        for name in self._places:
            self._accept(name)

    def heal_host(self, name: str) -> None:
        """What was done to this host alone is over; cuts between it and others, too."""
        port = _port(self._known(name))
        rules = self.rules()
        for group in ("mute", "deaf"):
            if f'"{port}"' in _elements(rules, group):
                self._nft(f'delete element bridge part {group} {{ "{port}" }}\n')
        for pair in _pairs(_elements(rules, "pair")):
            if port in pair:
                self._nft(f'delete element bridge part pair {{ "{pair[0]}" . "{pair[1]}" }}\n')
        if self._has_chain(name):
            self.lose(name, 0)
        self._accept(name)

    def _known(self, name: str) -> str:
        if name not in self._places:
            raise LabError(f"the lab has no host {name}; it has {', '.join(self._places)}")
        return name

    # -- looking ------------------------------------------------------------------------------

    def heard(self, one: str, other: str, *, count: int = 3) -> int:
        """How many of `count` datagrams from `one` arrive at `other`: what is true of a cut."""
        sender, receiver = self._places[self._known(one)], self._places[self._known(other)]
        with inside(receiver.namespace):
            ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with inside(sender.namespace):
            mouth = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        arrived = 0
        with ear, mouth:
            ear.bind((receiver.address, _PROBE_PORT))
            ear.settimeout(_PROBE_S)
            for number in range(count):
                with contextlib.suppress(OSError):  # no neighbour answers
                    mouth.sendto(bytes([number % 256]), (receiver.address, _PROBE_PORT))
            with contextlib.suppress(TimeoutError):
                while arrived < count:
                    ear.recv(1)
                    arrived += 1
        return arrived


def clear(lab_id: str) -> None:
    """Remove every namespace of a lab, whatever state it is in."""
    left = [path.name for path in NAMES.glob(f"{lab_id}-*")] if NAMES.is_dir() else []
    for name in left:
        call(find("ip", hint="apt-get install iproute2"), "netns", "delete", name)


def _port(name: str) -> str:
    """The switch's end of a host's cable: at most 15 characters."""
    return f"p-{name}"


def _hardware(place: Place) -> str:
    return "02:00:" + ":".join(f"{int(part):02x}" for part in place.address.split("."))


def _word(name: str) -> str:
    return name.replace("-", "_")


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _elements(rules: str, group: str) -> str:
    """The elements of one set, as nft prints them."""
    body = rules.partition(f"set {group} {{")[2].partition("chain")[0].partition("set ")[0]
    return body.partition("elements = {")[2].partition("}")[0]


def _pairs(elements: str) -> list[tuple[str, str]]:
    found = []
    for each in elements.split(","):
        one, dot, other = each.replace('"', "").partition(" . ")
        if dot:
            found.append((one.strip(), other.strip()))
    return found
