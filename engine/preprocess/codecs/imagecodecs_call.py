"""Call a codec of imagecodecs; all calls go through here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

# it logs facts about valid files, such as an unusual colour profile in a PNG
logging.getLogger("imagecodecs").setLevel(logging.CRITICAL)


def call_codec(decoder: Callable[..., Any], data: bytes, *arguments: Any, **options: Any) -> Any:
    """Call `decoder` and return its result. Raises ValueError when it refuses the bytes.

    The decoder's own message is dropped: some messages come from uninitialized memory, so they differ from
    call to call or are not text.
    """
    try:
        return decoder(data, *arguments, **options)
    except MemoryError:
        raise
    except Exception:
        raise ValueError("the image is damaged") from None
