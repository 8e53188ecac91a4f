"""The errors of a vault. Each names the place, the value and, where there is one, the remedy."""

from laser_jax.schema import SchemaError, VaultError

__all__ = [
    "CorruptionError",
    "LockedError",
    "MissingError",
    "NotAVaultError",
    "SchemaError",
    "UnavailableError",
    "UnknownFieldError",
    "VaultError",
    "VaultExistsError",
    "VersionError",
]


class NotAVaultError(VaultError):
    """The path holds no vault: nothing, something else, or the leftovers of a writer that was killed."""


class VaultExistsError(VaultError):
    """`create` was pointed at a directory that is already in use."""


class VersionError(VaultError):
    """The vault was written in a newer format than this code reads."""


class LockedError(VaultError):
    """Another writer holds the vault."""


class UnknownFieldError(VaultError, KeyError):
    """A field was asked for that the schema does not have."""

    # KeyError prints its argument quoted; this is a sentence.
    __str__ = Exception.__str__


class CorruptionError(VaultError):
    """Stored bytes are not what was written: a flipped bit, a truncated or missing file."""


class MissingError(CorruptionError):
    """A file that the manifest names is not there."""


class UnavailableError(VaultError):
    """The storage refused: no permission, no space, an I/O error. The data may well be whole."""
