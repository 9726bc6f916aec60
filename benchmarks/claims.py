"""What is claimed of headstart in the contest, what was found, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrants import ARMS, CONTENDERS, DEEP, FULL, OURSELVES
from headstart.metrics import TINY
from results import Entrants, Results, Standing, draw_errors, get_arms, get_rivals, group, list_ahead, list_whole, rank

LEAST = 0.1  # share by which headstart's mean error is to be lower than any rival's
LARGEST_SHARE = 1 / 3  # of a deep rival's time

Found = tuple[str, str]  # what was found, in words and figures, and whether the claim holds


def judge(results: Results) -> list[tuple[str, str, str]]:
    """(claim, what was found, whether it holds) of each claim."""
    error = f"a mean error at least {percent(LEAST, 0)} below the best rival's, over "
    claims = {
        "the most accurate, or within the noise of it, on every set": judge_places(results, CONTENDERS, get_rivals),
        "the best mean rank": judge_rank(results),
        **{error + name: judge_error(some) for name, some in group(results).items()},
        "full sets: at most a third of the fastest deep rival's time": judge_time(results),
        "`auto` never worse than a single strategy by more than the interval": judge_places(results, ARMS, get_arms),
    }
    return [(claim, *found) for claim, found in claims.items()]


def judge_places(results: Results, others: Sequence[str], choose: Callable[[Entrants], Entrants]) -> Found:
    """On how many sets and cuts headstart is behind none of the others; one where it is refutes the claim."""
    whole, behind = list_whole(results, others), list_behind(results, choose)
    best = [max(other.accuracy for other in choose(found).values()) for found in whole.values()]
    first = sum(found[OURSELVES].accuracy >= most for found, most in zip(whole.values(), best, strict=True))
    text = f"the most accurate or level with it on {first} of {len(whole)}, behind by more than the noise on "
    text += "; ".join(behind) or "none"
    return text if whole or behind else "-", say(not behind, bool(behind) or len(whole) == len(results))


def list_behind(results: Results, choose: Callable[[Entrants], Entrants]) -> list[str]:
    """Where headstart is behind, and whom."""
    ran = {", ".join(place): found for place, found in results.items() if OURSELVES in found}
    return [f"{place} ({name})" for place, found in ran.items() for name in list_ahead(found[OURSELVES], choose(found))]


def judge_rank(results: Results) -> Found:
    """Whether headstart's mean rank is lower than any rival's."""
    standings = rank(results)
    if not standings:
        return "-", say(False, told=False)
    ours, (best, name) = standings[OURSELVES].rank, find_best(standings, "rank")
    over, complete = say_over(results)
    return f"{ours:.2f} against {best:.2f} ({name}){over}", say(ours < best, complete)


def judge_error(results: Results) -> Found:
    """By how much headstart's mean error is lower than that of the best rival, who is the same in all resamples."""
    standings = rank(results)
    if not standings:
        return "-", say(False, told=False)
    ours, (best, name) = standings[OURSELVES].error, find_best(standings, "error")
    drawn = [draw_errors(results, entrant) for entrant in (OURSELVES, name)]
    share, shares = reduce(ours, best), np.quantile(reduce(*drawn), (0.025, 0.975))
    low, high = np.quantile(drawn[1] - drawn[0], (0.025, 0.975))
    text = f"{ours:.4f} against {best:.4f} ({name}), lower by {percent(share)} [{', '.join(map(percent, shares))}]"
    over, complete = say_over(results)
    holds = say(share >= LEAST, complete)
    if holds == "yes" and shares[0] < LEAST:
        holds += f", though the interval reaches below {percent(LEAST, 0)}"
    return f"{text}, that is by {best - ours:.4f} [{low:.4f}, {high:.4f}]{over}", holds


def judge_time(results: Results) -> Found:
    """On which full set headstart takes the largest share of the fastest deep rival's time."""
    whole = list_whole(results, [name for name in CONTENDERS if name in DEEP])
    full = {name: found for (name, cut), found in whole.items() if cut == FULL}
    shares = []
    for name, entrants in full.items():
        fastest, rival = min((entrants[rival].seconds, rival) for rival in DEEP if rival in entrants)
        ours = entrants[OURSELVES].seconds
        shares.append((ours / fastest, f"{name} ({ours:.0f} s against {fastest:.0f} s, {rival})"))
    if not shares:
        return "-", say(False, told=False)
    share, where = max(shares)
    complete = len(full) == sum(cut == FULL for _, cut in results)
    text = f"on {count(len(shares), 'full set')} at most {share:.3f} of it: {where}"
    return text, say(share <= LARGEST_SHARE, complete or share > LARGEST_SHARE)


def find_best(standings: dict[str, Standing], figure: str) -> tuple[float, str]:
    """The lowest figure of a rival, and whose it is."""
    return min((getattr(standing, figure), name) for name, standing in standings.items() if name != OURSELVES)


def reduce(ours: Any, theirs: Any) -> Any:
    """By which share of their error ours is lower; 0 where both are 0."""
    return (theirs - ours) / np.maximum(theirs, TINY)


# In words


def say(holds: bool, told: bool) -> str:
    """Whether a claim holds, where it can be told."""
    if not told:
        return "not told: not everybody has run everywhere"
    return "yes" if holds else "**no**"


def say_over(results: Results) -> tuple[str, bool]:
    """Over how many sets and cuts a mean is, and whether these are all."""
    whole = list_whole(results)
    return f", over {len(whole)} of {len(results)} sets and cuts", len(whole) == len(results)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
