"""Identifiers are hashed where data comes in: no run, page or prompt ever holds a raw one.

A pseudonym is BLAKE2b of the identifier, keyed with a salt. Who has the salt and a list of identifiers can
tell who is who; without the salt nobody can. ``GGSM_SALT`` in the environment sets it. For data that anyone
can download ``PUBLIC_SALT`` stands in where it is not set: that hides a number from a reader, not from
somebody who tries all numbers.
"""

from __future__ import annotations

import os
from hashlib import blake2b

import polars as pl

SALT = "GGSM_SALT"
PUBLIC_SALT = "ggsm public data"
DIGEST = 10
"""Bytes of a pseudonym: among a hundred million users, two share one with probability 4e-9."""


class SaltError(ValueError):
    """A salt that hides nothing."""


def secret_salt() -> str:
    """The salt of the environment, for data that isn't public. Raises ``SaltError``."""
    salt = os.environ.get(SALT, "")
    if len(salt) < 16:
        raise SaltError(
            f"{SALT}: {'not set' if not salt else 'shorter than 16 characters'}; identifiers are hashed with "
            'it. Set it to a long random text and keep it (python -c "import secrets; '
            'print(secrets.token_hex())"), or say that the data is public'
        )
    return salt


def public_salt() -> str:
    """The salt for public data: that of the environment if there is one."""
    return secret_salt() if SALT in os.environ else PUBLIC_SALT


def pseudonym(identifier: str, salt: str) -> str:
    """What stands for an identifier: 20 hexadecimal digits."""
    key = blake2b(salt.encode()).digest()  # a salt of any length as a key of 64 bytes
    return blake2b(identifier.encode(), key=key, digest_size=DIGEST).hexdigest()


def hidden(column: pl.Expr, salt: str) -> pl.Expr:
    """The pseudonyms of a column of identifiers; null stays null."""

    def hide(identifiers: pl.Series) -> pl.Series:
        names = identifiers.cast(pl.String)
        raw = names.unique().drop_nulls().to_list()
        known = {name: pseudonym(name, salt) for name in raw}
        return names.replace_strict(known, default=None, return_dtype=pl.String)

    return column.map_batches(hide, return_dtype=pl.String, is_elementwise=True)


def fingerprint(salt: str) -> str:
    """Tells two salts apart and gives neither away: what a run that hashed with it depends on."""
    return pseudonym("", salt)
