# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Reads the images that a client of `serve.py` sends or refers to, within the limits of the server."""

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from PIL import Image

from dehvf import images
from demo.openai_api import RequestError, shorten


# The formats that OpenAI reads. Pillow supports others too, some of which start programs (EPS) or are rarely tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
START_OF_JPEG = b"\xff\xd8"
START_OF_SCAN = b"\xff\xda"  # of a JPEG. Each scan of a progressive one is decoded over the whole image
USUAL_SCANS = 20  # at most; cameras write about 10
EXIF_OF_JPEG = re.compile(rb"\xff\xe1(..)Exif\0\0", re.DOTALL)  # a part, with its number of bytes
EXIF_NAMES = ("exif", "Raw profile type exif")  # where Pillow puts that of other formats
MAX_EXIF_BYTES = 2**16  # the most that one part of a JPEG has. Pillow's memory for them may grow with their square
DECODE_SECONDS = 20  # small files may take long too, for example if a comment has a million parts
MAX_ASPECT_RATIO = 300  # less than `read_image` allows, whose message would be for the server's operator
MAX_REDIRECTS = 3
# IPv6 addresses that represent an IPv4 address behind a translator
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# The only range in which addresses of the public internet are assigned. `is_global` also accepts some addresses
# outside it, which old systems and translators may route elsewhere.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def parse_host(entry: str) -> tuple[str, int | None]:
    """Name and port of an allowed host, `None` for the default port. Raises `ValueError` if it is not a host."""
    try:
        url = httpx.URL(f"image://{entry}")  # a scheme without a usual port, which would be dropped
        is_host = url.host and "*" not in entry and entry.lower() == url.netloc.decode("ascii")
    except (httpx.InvalidURL, UnicodeDecodeError):
        is_host = False
    if not is_host:
        raise ValueError(
            f"The image host {entry!r} is neither a name nor a name and a port. Give for example "
            "`images.example.org`, `images.example.org:8080` or `[::1]:8080`, without `https://`, path or `*`."
        )
    return url.host, url.port


class TimedFile(io.BytesIO):
    """A file in memory that raises `TimeoutError` if it is still read after `DECODE_SECONDS`."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.end = time.monotonic() + DECODE_SECONDS

    def read(self, *args) -> bytes:
        if time.monotonic() > self.end:
            raise TimeoutError(f"it takes more than {DECODE_SECONDS} seconds to decode")
        return super().read(*args)


class ImageReader:
    """
    Reads images from data URLs, and from allowed hosts and folders.

    Args:
        hosts: host names from which images may be fetched, each with a port unless it is the default of the URL's
            scheme. Addresses that are not public must be listed themselves.
        folders: folders from which `file:` URLs may be read, including subfolders.
        max_bytes: maximum size of an image file.
        max_pixels: maximum width times height of an image, checked before it is decoded. Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, is raised to it if it is lower.
        max_seconds: maximum time to fetch an image, including redirects.

    Raises:
        ValueError: if a host is malformed or a folder does not exist.
    """

    def __init__(
        self,
        hosts: list[str] = (),
        folders: list[str] = (),
        max_bytes: int = 20 * 2**20,
        max_pixels: int = 25_000_000,
        max_seconds: float = 10.0,
    ):
        self.hosts = [parse_host(entry) for entry in hosts]
        self.folders = [Path(folder).resolve() for folder in folders]
        for given, folder in zip(folders, self.folders):
            if not folder.is_dir():
                raise ValueError(f"The image folder {given} does not exist. Give an existing folder.")
        self.max_bytes, self.max_pixels, self.max_seconds = max_bytes, max_pixels, max_seconds
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
        # Threads of their own, so that slow images and name servers do not delay requests without them
        self._threads, self._look_ups = ThreadPoolExecutor(4), ThreadPoolExecutor(8)

    async def load(self, url: str) -> Image.Image:
        """Reads and decodes the image at a URL without blocking other requests. Raises as [`read`] and [`decode`]."""
        data = await self.read(url)
        return await self._run(self.decode, data)

    async def _run(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def read(self, url: str) -> bytes:
        """
        Reads the bytes of the image at a URL without blocking other requests.

        Raises:
            RequestError: if the URL is malformed or not allowed, or the image is too large or cannot be fetched in
                time.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await self._run(self._read_data_url, url)
        if scheme == "file":
            return await self._run(self._read_file, url)
        if scheme in ("http", "https"):
            return await self._fetch(url)
        raise refuse(
            f"The image address {shorten(url)} is not a URL that this server reads. Send the image as "
            "`data:image/png;base64,...`."
        )

    def decode(self, data: bytes) -> Image.Image:
        """The RGB image in a file. Raises `RequestError` for other formats, damage, and what exceeds a limit."""
        try:
            if data.startswith(START_OF_JPEG):  # Pillow reads it while it opens the file
                check_exif(sum(map(int.from_bytes, EXIF_OF_JPEG.findall(data))))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own limits, which are not lower or raise exceptions too
                image = Image.open(TimedFile(data), formats=FORMATS)
            self._check_image(image, data)
            image.load()  # of a PNG file, EXIF data may be after the pixels
            check_exif(max(len(image.info.get(name, b"")) for name in EXIF_NAMES))
            return images.read_image(image)
        except RequestError:
            raise
        except Image.UnidentifiedImageError as error:
            raise refuse(
                f"The image cannot be read: its {len(data)} bytes are not a {', '.join(FORMATS)} file. Send one."
            ) from error
        except Image.DecompressionBombError as error:
            raise refuse(
                f"The image has more pixels than the {self.max_pixels} that this server reads. Send a smaller one.",
                code="image_too_large",
            ) from error
        except Exception as error:  # Pillow raises many kinds
            raise refuse(
                f"The image cannot be read: {error.__cause__ or error}. Save it again and send the new file."
            ) from error

    def _check_image(self, image: Image.Image, data: bytes):
        """Raises `RequestError` for an image that would take long to decode, or much memory."""
        width, height = image.size
        if width * height > self.max_pixels:
            raise refuse(
                f"The image has {width} x {height} = {width * height} pixels. This server reads up to "
                f"{self.max_pixels}. Send a smaller one.",
                code="image_too_large",
            )
        if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
            raise refuse(
                f"The image has {width} x {height} pixels. This server reads images whose longer side is up to "
                f"{MAX_ASPECT_RATIO} times the shorter one. Crop it and send the new file.",
                code="image_too_large",
            )
        # Not by Pillow's name of the format, which is MPO if the file also refers to another image
        num_scans = data.count(START_OF_SCAN) if data.startswith(START_OF_JPEG) else 1
        if num_scans * width * height > USUAL_SCANS * self.max_pixels:
            raise refuse(
                f"The image is a JPEG with {num_scans} scans of {width} x {height} pixels, which would take long to "
                "decode. Save it again as a baseline JPEG and send the new file.",
                code="image_too_large",
            )

    def _read_data_url(self, url: str) -> bytes:
        head, comma, encoded = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise refuse(
                f"The image address {shorten(url)} is not a base64 data URL. Send `data:image/png;base64,...`."
            )
        encoded = "".join(unquote(encoded).split())
        self._check_size(len(encoded) * 3 // 4 - 2)  # before decoding, without the padding
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise refuse(
                f"The image's data URL is not valid base64: {error}. Encode the bytes of the image file with the "
                "standard alphabet and padding."
            ) from error

    def _read_file(self, url: str) -> bytes:
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path, errors="strict")).resolve()  # follows links and `..`
            is_inside = parts.netloc in ("", "localhost") and any(
                path.is_relative_to(folder) for folder in self.folders
            )
            if is_inside and path.is_file():
                self._check_size(path.stat().st_size)
                return path.read_bytes()
        except (ValueError, OSError, RuntimeError):  # not a path, circular links, or no permission
            pass
        # The same message for files outside and for missing files, so that it does not reveal which files exist
        raise refuse(
            f"The image address {shorten(url)} does not name a file in the folders that this server reads "
            "(`--allow-image-folder`). Send the image as `data:image/png;base64,...`.",
            code="image_not_allowed",
        )

    async def _fetch(self, url: str) -> bytes:
        try:
            async with asyncio.timeout(self.max_seconds):
                address = httpx.URL(url)
                for _ in range(MAX_REDIRECTS + 1):
                    data = await self._get(address)
                    if isinstance(data, bytes):
                        return data
                    address = data
        except TimeoutError as error:
            raise refuse(
                f"The image {shorten(url)} was not fetched within {self.max_seconds:g} seconds. Try again, or send it "
                "as `data:image/png;base64,...`.",
                code="image_timeout",
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last for international names
            raise refuse(
                f"The image {shorten(url)} cannot be fetched: {str(error) or type(error).__name__}. Check the "
                "address, or send the image as `data:image/png;base64,...`."
            ) from error
        raise refuse(f"The image {shorten(url)} has more than {MAX_REDIRECTS} redirects. Send its final address.")

    async def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        """The image at an address, or the address that it redirects to."""
        fault = None
        for ip in await self._resolve(url):
            # Connects to the address that was checked: a second DNS query could return another one
            async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
                request = client.build_request(
                    "GET",
                    url.copy_with(host=ip),
                    headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "dehvf"},
                    extensions={"sni_hostname": url.raw_host.decode("ascii")},  # whose certificate is checked
                )
                try:
                    response = await client.send(request, stream=True)
                except httpx.ConnectError as error:
                    fault = error
                    continue
                if response.has_redirect_location:
                    return url.join(response.headers["location"])
                if response.status_code != 200:
                    raise refuse(f"The image {shorten(str(url))} could not be fetched: status {response.status_code}.")
                self._check_size(int(response.headers.get("content-length", "0")))
                data = bytearray()
                async for piece in response.aiter_raw():  # raw: decompression could exceed the counted size
                    data += piece
                    self._check_size(len(data))
                return bytes(data)
        raise fault

    async def _resolve(self, url: httpx.URL) -> list[str]:
        """The IP addresses of a URL's host, if an image may be fetched from all of them."""
        is_web = url.scheme in ("http", "https")
        port = url.port or (443 if url.scheme == "https" else 80)
        if not is_web or url.userinfo or not {(url.host, url.port), (url.host, port)} & set(self.hosts):
            raise refuse(
                f"The image address {shorten(str(url))} is on a host from which this server fetches no images "
                "(`--allow-image-host`). Send the image as `data:image/png;base64,...`.",
                code="image_not_allowed",
            )
        try:
            look_up = partial(socket.getaddrinfo, url.host, port, type=socket.SOCK_STREAM)
            found = await asyncio.get_running_loop().run_in_executor(self._look_ups, look_up)
        except (socket.gaierror, UnicodeError) as error:
            raise refuse(f"The image host {shorten(url.host)} is not found. Check the address.") from error
        addresses = list(dict.fromkeys(entry[4][0] for entry in found))
        for address in addresses:
            if not is_public(address) and not {(address, url.port), (address, port)} & set(self.hosts):
                raise refuse(
                    f"The image host {shorten(url.host)} has an address that is not public. This server fetches no "
                    "images from it unless the address itself is listed (`--allow-image-host`). Send the image as "
                    "`data:image/png;base64,...`.",
                    code="image_not_allowed",
                )
        return addresses

    def _check_size(self, num_bytes: int):
        if num_bytes > self.max_bytes:
            raise refuse(
                f"The image file has at least {num_bytes} bytes. This server reads up to {self.max_bytes}. Send a "
                "smaller one.",
                code="image_too_large",
            )


def check_exif(num_bytes: int):
    if num_bytes > MAX_EXIF_BYTES:
        raise refuse(
            f"The image has at least {num_bytes} bytes of EXIF data. This server reads up to {MAX_EXIF_BYTES}. Save "
            "it again without them and send the new file.",
            code="image_too_large",
        )


def refuse(message: str, code: str = "invalid_image") -> RequestError:
    return RequestError(message, param="image_url", code=code)
