"""Randomness that is a function of where it is used, so that a run can be stopped and continued anywhere."""

import hashlib


def derived_seed(purpose: str, *numbers: int) -> int:
    """Mix a purpose and whole numbers into one seed of 63 bits, the same on every machine."""
    digest = hashlib.sha256("|".join((purpose, *map(str, numbers))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
