"""Measure the WebSocket deliveries of one web process against other servers.

How many a second, how late they are, and what slow, stalled and returning clients cost.

Every server gets the same messages through Redis, one gradient event of 150 layers each, and runs on a core of its
own; publisher and clients share the others. A peer's name says where a server was not busy, which means that the
clients or the publisher were the limit, and where it did not keep up.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.rows import Row, paired_row
from benchmarks.stream_peers import LIMIT, PEERS, RANGES
from benchmarks.stream_runs import BUSY, Clients, Load, Outcome, measure, new_job
from benchmarks.stream_servers import Server, servers

NUM_ROUNDS = 3
NUM_CLIENTS = (1, 10, 100, 500)
RATES = (10.0, 100.0, 1000.0)
GOALS = ((100, 1000.0), (500, 100.0))  # measured NUM_GOAL_ROUNDS times, and against the limit
NUM_GOAL_ROUNDS = 5
DELIVERIES = {"naive": 20_000, "ours": 300_000, "bare": 300_000}  # of a run
PEER_DELIVERIES = 200_000
MAX_EVENTS = 6000  # of a run
NAIVE_MOST_CLIENTS = 100  # it keeps all connections that it ever had, and after thousands some get nothing
PACED_S = 4.0
STALLED_LOAD = Load(55, 4000, 1000.0)
NUM_STALLED = 5
NUM_STALL_ROUNDS = 9
NUM_IDLE = 500  # connections whose memory is measured
NUM_RESUMED, NUM_MISSED = 300, 1000  # clients that come back at once, and what each of them missed
CALM_S = 1.0  # for what a server does after a connection began or ended
CPU_TICK_S = 0.01  # the kernel's resolution

Round = list[Outcome]  # ours first, then the peers, in the order of their names


def saturation() -> Iterator[Row]:
    """`stream/saturation-CLIENTS/PEER` in deliveries/s."""
    with servers(tuple(PEERS)) as (ours, peers):
        for num_clients in NUM_CLIENTS:
            rounds = [
                [measure(server, Load(num_clients, _num_events(server, num_clients))) for server in (ours, *peers)]
                for _ in range(NUM_ROUNDS)
            ]
            yield from _rows(f"saturation-{num_clients}", peers, rounds, "deliveries/s", _idle, _deliveries)


def paced() -> Iterator[Row]:
    """`stream/p50-CLIENTSxRATE/PEER` and `stream/p99-...` in milliseconds from publication to arrival."""
    with servers((*PEERS, "bare")) as (ours, all_peers):
        for num_clients in NUM_CLIENTS:
            for rate in RATES:
                is_goal = (num_clients, rate) in GOALS
                num_rounds = NUM_GOAL_ROUNDS if is_goal else 1
                absent = {"naive"} if num_clients > NAIVE_MOST_CLIENTS else set()
                absent |= set() if is_goal else {"bare"}
                peers = [peer for peer in all_peers if peer.name not in absent]
                rounds = [
                    [
                        measure(
                            server, Load(num_clients, min(_num_events(server, num_clients), int(rate * PACED_S)), rate)
                        )
                        for server in (ours, *peers)
                    ]
                    for _ in range(num_rounds)
                ]
                what = f"{num_clients}x{rate:.0f}"
                yield from _rows(f"p50-{what}", peers, rounds, "ms", _late, lambda outcome: outcome.p50_ms)
                yield from _rows(f"p99-{what}", peers, rounds, "ms", _late, lambda outcome: outcome.p99_ms)


def memory() -> Iterator[Row]:
    """`stream/memory/PEER`: KiB of the server's memory for each idle connection."""
    with servers(tuple(PEERS)) as (ours, peers):
        grown = [_memory_kib(server) for server in (ours, *peers)]
    for peer, peer_kib in zip(peers, grown[1:], strict=True):
        yield paired_row(f"stream/memory/{peer.name}", grown[:1], [peer_kib], PEERS[peer.name], "KiB")


def stalled() -> Iterator[Row]:
    """Measure what stalled clients cost.

    `stream/stalled-memory/PEER`: MiB for each client that reads nothing; `stream/stalled-p99/ours`: what the others
    see of it, against as many clients that all read.
    """
    load = STALLED_LOAD
    with_stalled = Load(load.num_clients - NUM_STALLED, load.num_events, load.rate, NUM_STALLED)
    names = tuple(name for name in PEERS if name != "naive")  # that one does not keep up with the load
    with servers(names) as (ours, peers):
        measure(ours, load)  # the first run fills caches
        without, among = [], []
        for _ in range(NUM_STALL_ROUNDS):
            without.append(measure(ours, load))
            among.append(measure(ours, with_stalled))
        late = [outcome.p99_ms for outcome in among], [outcome.p99_ms for outcome in without]
        yield paired_row("stream/stalled-p99/ours", *late, f"as many clients; {NUM_STALLED} of ours read nothing", "ms")
        growth = [among[0].server_rss_bytes - without[0].server_rss_bytes]
        for peer in peers:
            before = measure(peer, load)
            growth.append(measure(peer, with_stalled).server_rss_bytes - before.server_rss_bytes)
    mib = [bytes_ / NUM_STALLED / (1 << 20) for bytes_ in growth]
    for peer, peer_mib in zip(peers, mib[1:], strict=True):
        yield paired_row(f"stream/stalled-memory/{peer.name}", mib[:1], [peer_mib], PEERS[peer.name], "MiB")


def resume() -> Iterator[Row]:
    """Measure what returning clients cost.

    `stream/resume-300/ranges`: CPU seconds to bring clients up to date that come back at once, beyond those that their
    connections cost; `stream/reconnect-300/ranges`: with those.
    """
    with servers(("ranges",)) as (ours, [peer]):
        _reconnect_cpu_s(ours, 0)
        beyond: dict[str, list[float]] = {"ours": [], "ranges": []}
        whole: dict[str, list[float]] = {"ours": [], "ranges": []}
        for _ in range(NUM_ROUNDS):
            for server in (ours, peer):
                bare_s, spent_s = _reconnect_cpu_s(server, 0), _reconnect_cpu_s(server, NUM_MISSED)
                whole[server.name].append(spent_s)
                beyond[server.name].append(max(spent_s - bare_s, CPU_TICK_S))
    yield paired_row(f"stream/resume-{NUM_RESUMED}/ranges", beyond["ours"], beyond["ranges"], RANGES, "CPU s")
    yield paired_row(f"stream/reconnect-{NUM_RESUMED}/ranges", whole["ours"], whole["ranges"], RANGES, "CPU s")


SCENARIOS: dict[str, Callable[[], Iterator[Row]]] = {
    "saturation": saturation,
    "paced": paced,
    "memory": memory,
    "stalled": stalled,
    "resume": resume,
}


def _num_events(server: Server, num_clients: int) -> int:
    return min(MAX_EVENTS, DELIVERIES.get(server.name, PEER_DELIVERIES) // num_clients)


def _rows(
    what: str,
    peers: Sequence[Server],
    rounds: Sequence[Round],
    unit: str,
    remark: Callable[[str, Sequence[Outcome]], str],
    value: Callable[[Outcome], float],
) -> Iterator[Row]:
    mine = [outcomes[0] for outcomes in rounds]
    for index, peer in enumerate(peers, start=1):
        others = [outcomes[index] for outcomes in rounds]
        name = {**PEERS, "bare": LIMIT}[peer.name] + remark("we", mine) + remark("the peer", others)
        yield paired_row(f"stream/{what}/{peer.name}", [*map(value, mine)], [*map(value, others)], name, unit)


def _deliveries(outcome: Outcome) -> float:
    return outcome.deliveries_per_s


def _idle(who: str, outcomes: Sequence[Outcome]) -> str:
    busy = statistics.median(outcome.server_busy for outcome in outcomes)
    return "" if busy > BUSY else f"; {who} used only {busy:.0%} of a core: the clients were the limit"


def _late(who: str, outcomes: Sequence[Outcome]) -> str:
    return "" if all(outcome.kept_up for outcome in outcomes) else f"; {who} did not keep up"


def _reconnect_cpu_s(server: Server, num_missed: int) -> float:
    job_id, first_seq = new_job(server.settings, NUM_MISSED)
    after = first_seq - 1 - num_missed
    before = server.cpu_s()
    clients = Clients(server, server.url(job_id, after), NUM_RESUMED, "eager" if num_missed else "silent")
    clients.result()
    time.sleep(CALM_S)
    return server.cpu_s() - before


def _memory_kib(server: Server) -> float:
    job_id, first_seq = new_job(server.settings)
    url = server.url(job_id, first_seq - 1)
    warm = Clients(server, url, 20, "silent")
    before = server.rss_bytes()
    idle = Clients(server, url, NUM_IDLE, "silent")
    time.sleep(CALM_S)
    grown = server.rss_bytes() - before
    idle.result()
    warm.result()
    return grown / NUM_IDLE / 1024
