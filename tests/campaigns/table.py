"""What the campaigns' tables share: whether a figure keeps its bound, and the word for that."""

from __future__ import annotations

VERDICTS = {None: "", True: "kept", False: "MISSED"}


def is_kept(figure: float, bound: float | None, relation: str = "<=") -> bool | None:
    """Whether a figure keeps its bound, an upper one or (">=") a lower one; None without a bound."""
    if bound is None:
        return None
    return figure <= bound if relation == "<=" else figure >= bound
