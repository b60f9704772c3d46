"""Images of a request: in base64, or from hosts that the server's owner named. A URL never leads into a private network."""

import base64
import binascii
import io
import ipaddress
import socket
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from PIL import Image

from mmrecipes.errors import UserError
from mmrecipes.models.images import load_image
from mmrecipes.serve.refusals import Refused

NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, private ones, too, for machines that have only IPv6
SECONDS = 15  # for a download
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # fewer decoders for strangers' bytes than PIL has


def read_image(url: str, pixels: int, hosts: Collection[str], most: int) -> Image.Image:
    """The image behind a data URL, or behind http(s) on one of `hosts`: at most `pixels`, told from its header before it is
    decoded, and `most` bytes. Raises Refused."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        head, _, data = url.partition(",")
        if not head.endswith(";base64"):
            raise Refused(400, "image_url: a data URL without base64; expected data:image/png;base64,...", "invalid_image")
        try:
            content = base64.b64decode(data, validate=True)
        except binascii.Error as e:
            raise Refused(400, f"image_url: not base64 ({e})", "invalid_image") from e
    elif scheme in ("http", "https"):
        try:
            content = download(url, public_address(url, hosts), most)
        except ValueError as e:  # of urlsplit, and of names that are none
            raise Refused(400, f"image_url: not a URL ({e})", "invalid_image") from e
    else:
        raise Refused(400, f"image_url: {url[:20]!r}; expected data:image/...;base64,... or http(s)://", "invalid_image")
    return decode(content, pixels)


def decode(content: bytes, pixels: int) -> Image.Image:
    """RGB, from the bytes of a file; its size is looked at before a pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise Refused(400, f"an image of far more than {pixels:,} pixels", "image_too_large") from e
    except Exception as e:  # UnidentifiedImageError, and what decoders raise on a broken header
        raise Refused(400, f"an image that cannot be read; expected {', '.join(FORMATS)}", "invalid_image") from e
    if image.width * image.height > pixels:
        raise Refused(400, f"an image of {image.width} x {image.height} px; at most {pixels:,} pixels", "image_too_large")
    try:
        return load_image(image)
    except UserError as e:
        raise Refused(400, str(e), "invalid_image") from e


def public_address(url: str, hosts: Collection[str]) -> str:
    """The IP address to load `url` from. Refused for a host that is not in `hosts`, and where any of its
    addresses is not public."""
    host = (urlsplit(url).hostname or "").lower()
    if host not in hosts:
        raise Refused(400, f"image_url: the host {host!r} is not allowed here; send the image in base64", "host_not_allowed")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as e:
        raise Refused(400, f"image_url: the host {host!r} has no address", "host_not_allowed") from e
    if not all(is_public(address) for address in found):
        raise Refused(400, f"image_url: the host {host!r} has an address that is not public", "host_not_allowed")
    return min(found)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: no private, loopback, link-local, reserved or multicast one.
    >>> is_public("169.254.169.254"), is_public("::ffff:10.0.0.1"), is_public("8.8.8.8")
    (False, False, True)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "sixtofour", None), getattr(ip, "ipv4_mapped", None)
    return ip not in NAT64 and all(each.is_global and not each.is_multicast for each in (ip, *inner) if each)


def download(url: str, address: str, most: int) -> bytes:
    """What a GET of `url` at this IP `address` gives, at most so many bytes: the name is not looked up again, where it may have
    become another address, and no redirect is followed."""
    import urllib3

    parts = urlsplit(url)
    options = {"timeout": urllib3.Timeout(connect=5, read=10), "retries": False}
    if parts.scheme.lower() == "https":
        named = {"server_hostname": parts.hostname, "assert_hostname": parts.hostname, "cert_reqs": "CERT_REQUIRED"}
        pool = urllib3.HTTPSConnectionPool(address, parts.port or 443, **named, **options)
    else:
        pool = urllib3.HTTPConnectionPool(address, parts.port or 80, **options)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    try:
        with pool.request("GET", path, headers={"Host": host}, redirect=False, preload_content=False) as response:
            content, until = bytearray(), time.monotonic() + SECONDS
            while response.status == 200 and len(content) <= most and (piece := response.read1(2**16)):
                content += piece
                if time.monotonic() > until:  # the limit of `read` is one for each piece
                    raise Refused(400, f"image_url: {parts.hostname} took more than {SECONDS} seconds", "invalid_image")
    except urllib3.exceptions.HTTPError as e:
        raise Refused(400, f"image_url: {parts.hostname} could not be read ({type(e).__name__})", "invalid_image") from e
    if response.status != 200:
        raise Refused(400, f"image_url: {parts.hostname} answered with status {response.status}", "invalid_image")
    if len(content) > most:
        raise Refused(400, f"image_url: more than {most:,} bytes", "image_too_large")
    return bytes(content)
