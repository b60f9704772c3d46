"""The tables of results/README.md about `mmrecipes serve`: results/serve-speed.json and results/serve.json."""

from __future__ import annotations

from typing import Any


def speed(content: dict[str, Any], table) -> str:
    """Each server and case, one request at a time and several at once. `table(head, rows, words)` writes one."""
    knobs, rows = content["knobs"], []
    users = knobs["users"]
    for row in content["rows"]:
        for case in dict.fromkeys(cell.partition(",")[0] for cell in row["cells"]):
            cells = one, many = [row["cells"][f"{case}, {n}"] for n in (1, users)]
            rates = [f"{c['requests_per_s']:.2f}" for c in cells]
            if row["rounds"] > 1:
                rates = [f"{rate} [{c['low']:.2f}, {c['high']:.2f}]" for rate, c in zip(rates, cells, strict=True)]
            times = [f"{c[key]['p50']:,.0f}, {c[key]['p95']:,.0f}" for key in ("first_ms", "gap_ms") for c in cells]
            gain = f"{many['requests_per_s'] / one['requests_per_s']:.2f}x"
            rows.append([row["server"], case, *rates, gain, *times, f"{row['peak_mb']:,.0f}"])
    head = ["server", "", "requests/s, one at a time", f"{users} at a time", "gain", "TTFT p50, p95 ms, one at a time"]
    head += [f"{users} at a time", "between tokens p50, p95 ms, one at a time", f"{users} at a time", "peak MB"]
    counts = sorted({cell["n"] for row in content["rows"] for cell in row["cells"].values()})
    about = f"{knobs['new_tokens']} tokens a request; n={', '.join(map(str, counts))} requests a cell; one round where no range"
    about += " is shown, else the median of two [lowest, highest]."
    return f"{table(head, rows, 2)}\n\n{about}"


def faults(content: dict[str, Any], table) -> str:
    """What 200 clients got, and what memory did in the soak."""
    clients, soak, told = content["clients"], content["soak"], []
    for kind, statuses in clients["statuses"].items():
        told.append([kind, ", ".join(f"{n} x {status}" for status, n in statuses.items())])
    late = [row["mb"] for row in soak["memory"] if row["minute"] >= soak["minutes"] / 2]
    ms, admitted, users = clients["ms"], clients["admitted at most"], content["knobs"]["users"]
    swapped, ended, killed = content["swapped"], content["SIGTERM"], content["SIGKILL"]
    lines = [
        f"Of {clients['accepted']} answers accepted {clients['not whole']} were not whole, {clients['wrong']} wrong. Whole"
        f" answers: p50 {ms['p50']:.0f} ms, p95 {ms['p95']:.0f} ms (n={ms['n']}). Admitted at once at most {admitted['seen']} of"
        f" {admitted['bound']}.",
        f"Directory replaced while {users} ask: {swapped['wrong']} of {swapped['accepted']} wrong. SIGTERM: {ended['whole']} of"
        f" {ended['running']} running answers came to their end, a new request got {ended['a new request']}. SIGKILL:"
        f" {killed['whole']} of {killed['running']}.",
        f"Soak of {soak['minutes']:.0f} minutes, {sum(soak['statuses'].values()):,} requests of all kinds, new images:"
        f" {min(late):.0f} to {max(late):.0f} MB in the second half, {soak['MB a minute, second half']:+.1f} MB a minute.",
    ]
    return "\n\n".join([table(["client", "statuses"], told, 2), *lines])
