"""The one way into imagecodecs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

# it reports what valid files hold, such as an odd colour profile in a PNG, on standard error
logging.getLogger("imagecodecs").setLevel(logging.CRITICAL)


def call_codec(decoder: Callable[..., Any], data: bytes, *arguments: Any, **options: Any) -> Any:
    """Call `decoder` and return its result. Raises ValueError when it refuses the bytes.

    The decoder's own words are dropped: some come from buffers that nobody filled, as text that differs from
    call to call or isn't text at all.
    """
    try:
        return decoder(data, *arguments, **options)
    except MemoryError:
        raise
    except Exception:
        raise ValueError("the image is damaged") from None
