"""Names the ranks for which the others waited. A rank that is stopped, or whose node is dead, says nothing itself.

Each supervisor of a rank that does not go on writes an account of it; ranks.json has the ranks that there were.

    account: place (run/rank_places.py), part, waited_s, overdue, answered, waits, state

    overdue:  this rank's own limit has passed; otherwise a peer's report has asked for the account
    answered: a thread of the rank has answered its supervisor
    waits:    the rank was in a collective; its peers are to blame
    state:    the kernel's word for the process, such as "stopped"

On a GPU a rank whose peer is gone also waits outside collectives: kernels are queued behind one that never ends, and
the launch of the next one blocks, in the forward or backward pass. So a rank that answers there is not blamed, unless
it is in an earlier step than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vjepa_scale.run.progress import PARTS
from vjepa_scale.run.rank_places import Place, in_words

Report = dict[str, Any]

MOST_NAMES = 8
# Where a rank launches kernels.
_ON_DEVICE = ("forward", "backward", "observe", "optimizer")


def blamed(worst: Report, reports: Sequence[Report], places: Sequence[Place]) -> Report:
    """Returns ``worst``, the report that best names the cause; of a rank that waits for peers, with these named.

    reports: of the attempt; places: of its ranks, if known
    """
    if not worst["bystander"] and "account" not in worst:
        return worst
    accounts = [report for report in reports if "account" in report]
    stuck = _stuck(accounts)
    reported = {report["rank"] for report in reports}
    missing = [place for place in places if place["rank"] not in reported]
    witness = _witness(reports, {report["rank"] for report in stuck})
    absent = _absent_words(missing, places)
    if any(report["account"]["overdue"] for report in accounts):
        return _hung(worst, accounts, stuck, absent, witness)
    said = _all_stuck_words(stuck)
    if absent:
        said.append(absent.words if absent.rank is None else f"{absent.words} ended without a word")
    if not said:
        return worst
    rank = stuck[0]["rank"] if stuck else absent and absent.rank
    message = "; ".join(said) + _noticed(witness) + _words_of_peers(reports)
    step = worst["step"] if witness is None else witness["step"]
    return {**worst, "rank": rank, "step": step, "kind": "Lost", "message": message, "recurs": False}


def _hung(
    worst: Report, accounts: Sequence[Report], stuck: Sequence[Report], absent: "_Absent | None", witness: Report | None
) -> Report:
    seconds = max(report["account"]["waited_s"] for report in accounts if report["account"]["overdue"])
    said = _all_stuck_words(stuck)
    if absent:
        said.append(absent.words if absent.rank is None else f"{absent.words} did not answer for {seconds:.0f} s")
    if not said:  # each waits for the others: a device, a network, or ranks that are in different collectives
        parts = sorted({report["account"]["part"] for report in accounts})
        who = in_words(accounts[0]["account"]["place"]) if len(accounts) == 1 else f"{len(accounts)} ranks"
        message = f"{who} waited for {seconds:.0f} s for collectives or devices, in {', '.join(parts)}"
        # With kernels that do not end, nobody knows whose peer, device or network it was.
        recurs = all(report["account"]["waits"] for report in accounts) or len(accounts) == 1
        return {**worst, "kind": "Hung", "message": message, "recurs": recurs, "cause": f"all wait, {', '.join(parts)}"}
    first = stuck[0] if stuck else worst
    rank = first["rank"] if stuck else absent and absent.rank
    # A rank that is stopped from outside, or lost, is no error of the code. One that answers may come again.
    recurs = len(stuck) == 1 and bool(first["account"]["answered"]) and not absent
    return {
        **first,
        "rank": rank,
        "kind": "Hung",
        "message": "; ".join(said) + _noticed(witness),
        "bystander": False,
        "recurs": recurs,
    }


def _stuck(accounts: Sequence[Report]) -> list[Report]:
    """Returns the ranks for which the others wait, the least far first; if some do not answer, only these."""
    latest = max(map(_step, accounts), default=-1)
    found = [report for report in accounts if _is_stuck(report["account"], behind=_step(report) < latest)]
    silent = [report for report in found if not report["account"]["answered"]]
    return sorted(silent or found, key=lambda report: (_step(report), _part(report), report["rank"]))


def _is_stuck(account: dict[str, Any], *, behind: bool) -> bool:
    """A rank that answers and computes is only late if its limit has passed. behind: others are in a later step"""
    if not account["answered"]:
        return True
    if account["waits"] or not account["overdue"]:
        return False
    on_gpu = account["place"]["gpu"] is not None
    return behind or not (on_gpu and account["part"] in _ON_DEVICE)


def _step(report: Report) -> int:
    return -1 if report["step"] is None else report["step"]


def _part(report: Report) -> int:
    return PARTS.index(report["account"]["part"])


def _all_stuck_words(stuck: Sequence[Report]) -> list[str]:
    more = [f"{len(stuck) - MOST_NAMES} more"] if len(stuck) > MOST_NAMES else []
    return [_stuck_words(report) for report in stuck[:MOST_NAMES]] + more


def _stuck_words(report: Report) -> str:
    account = report["account"]
    at = "before its first step" if report["step"] is None else f"in step {report['step']}"
    state = f", {account['state']}" if account["state"] not in ("running", "sleeping") else ""
    seen = f"last seen {at} ({account['part']}{state})"
    who, seconds = in_words(account["place"]), f"{account['waited_s']:.0f} s"
    if not account["answered"]:
        return f"{who} did not answer for {seconds}, {seen}"
    return f"{who} has not come further for {seconds}, {seen}"


def _witness(reports: Sequence[Report], stuck: set[int]) -> Report | None:
    others = [report for report in reports if report["rank"] not in stuck]
    return min(others, key=lambda report: report["rank"], default=None)


def _noticed(witness: Report | None) -> str:
    if witness is None:
        return ""
    at = "before its first step" if witness["step"] is None else f"at step {witness['step']}"
    return f"; noticed by rank {witness['rank']} {at}"


def _words_of_peers(reports: Sequence[Report]) -> str:
    """Returns the error of the first rank that has noticed it."""
    own = [report for report in reports if report["bystander"] and "account" not in report]
    if not own:
        return ""
    first = min(own, key=lambda report: report["rank"])
    first_line = str(first["message"]).partition("\n")[0]
    return f": {first['kind']}: {first_line}"


@dataclass(frozen=True)
class _Absent:
    """Who has left no report. rank: one of them; None if they are so many that something else is the cause."""

    words: str
    rank: int | None


def _absent_words(missing: Sequence[Place], places: Sequence[Place]) -> _Absent | None:
    if not missing:
        return None
    nodes = {place["node"] for place in missing}
    if len(missing) > 1 and len(nodes) == 1 and len(missing) == sum(place["node"] in nodes for place in places):
        ranks = _some([str(place["rank"]) for place in missing])
        return _Absent(f"node {missing[0]['node']} (ranks {ranks})", missing[0]["rank"])
    if 2 * len(missing) > len(places):
        return _Absent(f"{len(missing)} of {len(places)} ranks left no report", None)
    return _Absent(_some([in_words(place) for place in missing]), missing[0]["rank"])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
