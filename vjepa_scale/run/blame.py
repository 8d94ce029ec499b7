"""Names the ranks for which the others waited. A rank that is stopped, or whose node is dead, says nothing itself.

Each supervisor of a rank that does not go on writes an account of it; ranks.json has the ranks that there were.

    account: place (run/rank_places.py), part, waited_s, overdue, answered, waits, state

    overdue:  this rank's own limit has passed; otherwise a peer's report has asked for the account
    answered: a thread of the rank has answered its supervisor
    waits:    the rank was in a collective; its peers are to blame
    state:    the kernel's word for the process, such as "stopped"
"""

from collections.abc import Sequence
from typing import Any

from vjepa_scale.run.rank_places import Place, in_words

Report = dict[str, Any]

MOST_NAMES = 8


def blamed(worst: Report, reports: Sequence[Report], places: Sequence[Place]) -> Report:
    """Returns ``worst``, the report that best names the cause; of a rank that waits for peers, with these named.

    reports: of the attempt; places: of its ranks, if known
    """
    if not worst["bystander"] and "account" not in worst:
        return worst
    accounts = [report for report in reports if "account" in report]
    stuck = [report for report in accounts if not report["account"]["waits"] and _is_stuck(report["account"])]
    reported = {report["rank"] for report in reports}
    missing = [place for place in places if place["rank"] not in reported]
    witness = _witness(reports, {report["rank"] for report in stuck})
    if any(report["account"]["overdue"] for report in accounts):
        return _hung(worst, accounts, stuck, missing, witness)
    said = [_stuck_words(report) for report in stuck]
    if missing:
        said.append(f"{_names(missing)} ended without a word")
    if not said:
        return worst
    rank = stuck[0]["rank"] if stuck else missing[0]["rank"]
    message = "; ".join(said) + _noticed(witness) + _words_of_peers(reports)
    step = worst["step"] if witness is None else witness["step"]
    return {**worst, "rank": rank, "step": step, "kind": "Lost", "message": message, "recurs": False}


def _hung(
    worst: Report, accounts: Sequence[Report], stuck: Sequence[Report], missing: Sequence[Place], witness: Report | None
) -> Report:
    seconds = max(report["account"]["waited_s"] for report in accounts if report["account"]["overdue"])
    said = [_stuck_words(report) for report in stuck[:MOST_NAMES]]
    if len(stuck) > MOST_NAMES:
        said.append(f"{len(stuck) - MOST_NAMES} more")
    if missing:
        said.append(f"{_names(missing)} did not answer for {seconds:.0f} s")
    if not said:  # each waits for the others: a device, a network, or ranks that are in different collectives
        parts = sorted({report["account"]["part"] for report in accounts})
        who = in_words(accounts[0]["account"]["place"]) if len(accounts) == 1 else f"{len(accounts)} ranks"
        message = f"{who} waited for {seconds:.0f} s for collectives or devices, in {', '.join(parts)}"
        return {**worst, "kind": "Hung", "message": message}
    first = stuck[0] if stuck else worst
    rank = first["rank"] if stuck else missing[0]["rank"]
    # A rank that is stopped from outside, or lost, is no error of the code. One that answers may come again.
    recurs = bool(stuck) and all(report["account"]["answered"] for report in stuck) and not missing
    return {
        **first,
        "rank": rank,
        "kind": "Hung",
        "message": "; ".join(said) + _noticed(witness),
        "bystander": False,
        "recurs": recurs,
    }


def _is_stuck(account: dict[str, Any]) -> bool:
    """A rank that answers and computes is only late if its limit has passed."""
    return bool(account["overdue"] or not account["answered"])


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


def _names(places: Sequence[Place]) -> str:
    more = f" and {len(places) - MOST_NAMES} more" if len(places) > MOST_NAMES else ""
    return ", ".join(map(in_words, places[:MOST_NAMES])) + more
