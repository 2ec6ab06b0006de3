"""Signature of a bundle's manifest by an SSH key.

OpenSSH's `ssh-keygen -Y` signs and verifies. It is a part of OpenSSH since version 8.0.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from raysweep.errors import InfrastructureError
from raysweep.robustness_bundle.files import MANIFEST_FILE, SIGNATURE_FILE
from raysweep.spec import SpecError

# A signature for another purpose, such as one of a git commit, is none of a bundle.
_NAMESPACE = "raysweep-bundle"
_MAX_SIGNATURE_BYTES = 2**16
_TIMEOUT_SECONDS = 60
_KEY_PATTERN = re.compile(r"with (\S+) key (SHA256:\S+)")


@dataclass(frozen=True)
class SignatureReport:
    """What the signature of a bundle shows.

    Attributes:
        key: Type and fingerprint of the key that signed the manifest, such as
            "ED25519 SHA256:..."; None if there is no valid signature.
        signer: Name of the key's owner in the verifier's `~/.ssh/allowed_signers`; None if that
            file does not name the key for this purpose.
        description: What to say about it, in one line.
        problem: Why the signature is false, in one line; None if it is not.
    """

    key: str | None
    signer: str | None
    description: str
    problem: str | None = None


def check_signing_key(key: Path) -> None:
    """Raise an error unless `sign_manifest` can use a key; a passphrase is not asked for.

    Args:
        key: File of a private key, or of the public key if the SSH agent has the private one.

    Raises:
        SpecError: The file is no key.
        InfrastructureError: `ssh-keygen` is missing.
    """
    if not key.is_file():
        raise SpecError(f"--sign {key}: no such file; give the file of an SSH key")
    result = _run_keygen(["-l", "-f", str(key)])
    if result.returncode:
        raise SpecError(f"--sign {key}: not an SSH key; `ssh-keygen -t ed25519 -f FILE` makes one")


def sign_manifest(folder: Path, key: Path) -> None:
    """Sign the manifest of a bundle.

    A passphrase is asked for on the terminal, unless the SSH agent has the key.

    Args:
        folder: The bundle.
        key: File of a private key, or of the public key if the SSH agent has the private one.

    Raises:
        InfrastructureError: `ssh-keygen` is missing, or cannot use the key.
    """
    command = ["-Y", "sign", "-q", "-f", str(key), "-n", _NAMESPACE, str(folder / MANIFEST_FILE)]
    # A person may need minutes to find the passphrase.
    result = _run_keygen(command, timeout=None)
    if result.returncode or not (folder / SIGNATURE_FILE).is_file():
        reason = _first_line(result.stderr) or f"exit code {result.returncode}"
        raise InfrastructureError(f"--sign {key}: ssh-keygen cannot sign: {reason}")


def check_signature(folder: Path, file_names: list[str]) -> SignatureReport:
    """Check the signature of a bundle's manifest.

    Args:
        folder: The bundle.
        file_names: Its files, from `list_bundle_files`.

    Returns:
        Who signed it, as far as this machine can tell.
    """
    if SIGNATURE_FILE not in file_names:
        return SignatureReport(None, None, "not signed: nothing shows who made it")
    problem = f"{SIGNATURE_FILE} is not a signature of {MANIFEST_FILE}"
    signature = folder / SIGNATURE_FILE
    if MANIFEST_FILE not in file_names or signature.stat().st_size > _MAX_SIGNATURE_BYTES:
        return SignatureReport(None, None, "not signed", problem)
    manifest = (folder / MANIFEST_FILE).read_bytes()
    signed_with = ["-n", _NAMESPACE, "-s", str(signature)]
    try:
        result = _run_keygen(["-Y", "check-novalidate", *signed_with], manifest)
        match = _KEY_PATTERN.search(result.stdout)
        if result.returncode or match is None:
            return SignatureReport(None, None, "not signed", problem)
        key = f"{match[1]} {match[2]}"
        signer = _find_signer(signed_with, manifest)
    except InfrastructureError as error:
        return SignatureReport(None, None, f"the signature was not checked: {error}")
    if signer is None:
        who = f"the key {key}, which ~/.ssh/allowed_signers does not name"
    else:
        who = f"{signer}, key {key}"
    return SignatureReport(key, signer, f"signed by {who}")


def _find_signer(signed_with: list[str], manifest: bytes) -> str | None:
    """Return the owner of the key by `~/.ssh/allowed_signers`; None if it names none.

    `ssh-keygen` heeds the purposes and the times for which that file allows a key.
    """
    allowed = Path("~/.ssh/allowed_signers").expanduser()
    if not allowed.is_file():
        return None
    signers = ["-f", str(allowed)]
    found = _run_keygen(["-Y", "find-principals", *signers, *signed_with[2:]])
    for principal in found.stdout.splitlines() if found.returncode == 0 else ():
        verify = ["-Y", "verify", *signers, "-I", principal, *signed_with]
        if _run_keygen(verify, manifest).returncode == 0:
            return principal
    return None


def _run_keygen(
    args: list[str], stdin: bytes | None = None, timeout: float | None = _TIMEOUT_SECONDS
) -> "subprocess.CompletedProcess[str]":
    """Run `ssh-keygen` with English messages. Raises InfrastructureError if it is missing."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise InfrastructureError("ssh-keygen is not installed (it is a part of OpenSSH)")
    try:
        result = subprocess.run([program, *args], input=stdin, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"ssh-keygen does not answer: {error}") from error
    except OSError as error:
        raise InfrastructureError(f"ssh-keygen cannot be started: {error}") from error
    out, err = (stream.decode(errors="replace") for stream in (result.stdout, result.stderr))
    return subprocess.CompletedProcess(result.args, result.returncode, out, err)


def _first_line(text: str) -> str:
    """Return the first line of a text; "" if it has none."""
    return next(iter(text.strip().splitlines()), "")
