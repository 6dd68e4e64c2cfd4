"""Gray images of more than 8 bits: what is black and what is white in them.

Pillow hands their numbers on as they are stored, and its own conversion to 8 bits clips them at 255. The range of the
numbers is not in the pixels but in the file's header, so it is read there.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _FORMAT = 258, 259, 262, 284, 339  # TIFF tags
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a TIFF or a BigTIFF begins


class Depth(NamedTuple):
    """How the numbers of a gray image are stored.

    bits      of a pixel
    signed    whether they may be negative
    inverted  whether 0 is white
    """

    bits: int = 16
    signed: bool = False
    inverted: bool = False


def depth_of(image: Image.Image) -> Depth | None:
    """None for images that Pillow turns into 8 bits itself.

    Raises ValueError for images that Pillow is known to read wrongly.
    """
    deep = image.mode == "I" or image.mode.startswith("I;16")
    if not isinstance(image, TiffImageFile):
        if not deep:
            return None
        # PNG and PGM have 16 bits, whichever mode Pillow gives them; of the others only 32-bit ones have mode "I".
        return Depth() if image.mode != "I" or image.format in ("PNG", "PPM") else Depth(32, signed=True)
    tags = image.tag_v2
    bits, packed = max(tags.get(_BITS, (1,))), tags.get(_COMPRESSION, 1) != 1
    if bits == 16 and tags.get(_PLANES, 1) == 2 and not packed:
        raise ValueError("Pillow misreads 16-bit colours in separate planes; save it with interleaved ones")
    if not deep:
        return None
    signed = tags.get(_FORMAT, (1,))[0] == 2
    if signed and packed and tags.prefix == b"MM":
        raise ValueError("Pillow misreads compressed signed numbers in big-endian order; save it uncompressed")
    return Depth(bits, signed, tags.get(_PHOTOMETRIC) == 0)


def eight_bits(image: Image.Image, depth: Depth) -> Image.Image:
    """Mode L: black is 0, white the largest number that a pixel can hold, and the highest 8 bits between them count.

    A 32-bit image whose numbers all fit into 16 bits is read as a 16-bit image in a larger container.

    Raises ValueError for numbers of which that does not say what black and white are.
    """
    bits, signed, inverted = depth
    values = np.asarray(image).astype(np.int64)
    if bits == 32 and not signed:
        values &= 0xFFFFFFFF  # Pillow has no unsigned mode
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0:
        raise ValueError(f"pixels down to {lowest}: negative ones have no fixed black; convert it to 8 or 16 bits")
    used = 16 if bits == 32 and highest < 2**16 else bits - signed
    if used > 16 and not highest >> (used - 8):
        raise ValueError(
            f"pixels up to {highest} in {bits} bits: neither 16 bits nor the full range; convert it to 8 or 16 bits"
        )
    high = values >> (used - 8)
    return Image.fromarray((255 - high if inverted else high).astype(np.uint8))


def mark(content: bytes) -> tuple[str, ...]:
    """What belongs in the fingerprint of an image file beside its bytes: nothing, as a rule.

    Once, attrib decoded gray TIFF files of more than 8 bits wrongly unless they held 16 unsigned bits with 0 as black.
    The others carry a mark, so that maps of the wrong pixels are not taken for theirs.
    """
    if not content.startswith(_TIFF):
        return ()
    try:
        depth = depth_of(Image.open(io.BytesIO(content)))
    except ValueError:
        return ("depth",)
    except Exception:  # Pillow raises anything on damaged files; reading the sample will say so
        return ()
    return () if depth in (None, Depth()) else ("depth",)
