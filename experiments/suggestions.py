"""What a message says of a name that is not among the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Finds the known name that was probably meant: another case, a typing error; None where nothing is close."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[found[0]] if found else None


def there_are(name: str, known: Iterable[str]) -> str:
    """Lists what there is, the nearest name first: "did you mean 'snapkv'? There are full, snapkv"."""
    known = list(known)
    close = nearest(name, known)
    listed = f"here are {', '.join(known)}."
    return f"t{listed}" if close is None else f"did you mean {close!r}? T{listed}"
