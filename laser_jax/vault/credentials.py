"""What servers and clients prove themselves by: tokens from the environment, certificates from files."""

import os
import ssl

from laser_jax.vault.errors import VaultError


def token_from(variable: str) -> str | None:
    """The token in a variable of the environment; None if there is no such variable.

    Raises:
      VaultError: it is empty, which is nobody's wish, or no header can hold it.
    """
    token = os.environ.get(variable)
    if token == "":
        raise VaultError(f"{variable} is empty: give it a token, or unset it to let everybody in")
    if token is not None and not all("!" <= character <= "~" for character in token):
        raise VaultError(f"{variable} holds a blank, a line's end or a letter beyond ASCII, which no header can hold")
    return token


def certificate_from(certificate: str | None, key: str | None) -> tuple[bytes, bytes] | None:
    """A server's certificate and its key, PEM; None if no files are named.

    Raises:
      VaultError: only one is named, one cannot be read, or they are no certificate and its key.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise VaultError("TLS needs both a certificate and a key")
    contents = []
    for name in (certificate, key):
        try:
            with open(name, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise VaultError(f"{name} cannot be read: {error}") from error
    try:
        # No passphrase is asked for at the terminal: nobody sits there.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise VaultError(f"{certificate} and {key} are no certificate and its key, in PEM: {error}") from error
    return contents[0], contents[1]
