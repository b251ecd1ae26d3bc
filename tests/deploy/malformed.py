"""Bodies of requests that the service refuses."""

import json
import struct
import zlib

from tests.deploy.serving import form, picture


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and has hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + (chunk(b"IEND", b""))
    )


def tile_bomb() -> bytes:
    """Return a TIFF of 64×64 whose one tile is said to be 60000×60000."""
    tags = [(256, 64), (257, 64), (258, 8), (259, 5), (262, 1), (277, 1), (322, 60_000),
            (323, 60_000), (324, 8), (325, 8)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 16)
        + bytes(8)
        + struct.pack("<H", len(tags))
        + entries
        + (bytes(4))
    )


JSON = "application/json"
ONE, FORM = form(picture())
REFUSED = {
    "no body": (b"", "", 415, "Content-Type"),
    "raw image": (picture(), "image/png", 415, "multipart/form-data"),
    "no boundary": (b"", "multipart/form-data", 400, "boundary"),
    "empty form": (b"--x-y-z--\r\n", FORM, 422, "no image"),
    "no form at all": (b"\x00\x01\x02", FORM, 400, "damaged"),
    "cut form": (ONE[:-30], FORM, 400, "ends in the middle"),
    "other field": (form(picture(), field="image")[0], FORM, 422, "unknown field 'image'"),
    "text field": (
        b'--x-y-z\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n--x-y-z--\r\n',
        FORM, 422, "no filename",
    ),
    "no JSON": (b"{", JSON, 400, "damaged JSON"),
    "JSON list": (b"[]", JSON, 422, "the body: "),
    "JSON number": (b'{"images": [1]}', JSON, 422, "images.0: "),
    "JSON text": (b'{"images": "AAAA"}', JSON, 422, "images: "),
    "JSON of none": (b'{"images": []}', JSON, 422, "images: "),
    "JSON and more": (b'{"images": ["AAAA"], "path": "x"}', JSON, 422, "path: "),
    "JSON path": (b'{"images": ["/etc/passwd"]}', JSON, 422, "not base64"),
    "data URL": (b'{"images": ["data:image/png;base64,AAAA"]}', JSON, 422, "images.0: not base64"),
    "deep JSON": (b"[" * 100_000, JSON, 400, "damaged JSON"),
    "empty file": (form(b"")[0], FORM, 422, "0.bin: cannot read"),
    "no image": (form(b"%PDF-1.7")[0], FORM, 422, "none of PNG"),
    "one of two": (form(picture(), b"GIF89a")[0], FORM, 422, "1.bin: cannot read"),
    "cut image": (form(picture(suffix=".jpg")[:400])[0], FORM, 422, "0.bin: cannot read"),
    "bomb": (form(png_header(30_000, 30_000))[0], FORM, 413, "decompression bomb"),
    "large": (form(png_header(2000, 1001))[0], FORM, 413, "2.002 million pixels"),
    "tile": (form(tile_bomb())[0], FORM, 413, "3600 million pixels"),
    "many": (form(*[picture()] * 9)[0], FORM, 413, "more than 8 images"),
    "many in JSON": (json.dumps({"images": ["AAAA"] * 9}).encode(), JSON, 413, "more than 8"),
    "long": (form(b"x" * 2_100_000)[0], FORM, 413, "more than 2,000,000 bytes"),
}  # fmt: skip
