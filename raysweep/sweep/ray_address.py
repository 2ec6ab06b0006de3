"""Addresses of Ray clusters as users write them. Ray is not needed to check them."""

from raysweep.errors import SpecError


def split_address(address: str, source: str = "--address") -> tuple[str, int]:
    """Split the address of a cluster's head node.

    Args:
        address: `host:port`, also with `ray://` before it.
        source: Option or variable that messages name.

    Returns:
        Host and port.

    Raises:
        SpecError: The address is not of this form.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise SpecError(
            f"{source} {address!r}: expected auto or host:port, for example 10.0.0.1:6379"
        )
    return host, int(port)
