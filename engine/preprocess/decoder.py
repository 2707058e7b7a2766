"""Decode and resize in a separate process, so that a crash, a hang or a leak there costs one image.

`DecoderProcess` starts the process and sends requests, `main` runs in the process. A request over the socket
is the pickled list of the images' headers and then the images. The reply is a JSON object and the pixels of
the decoded images: it contains no pickle, so it cannot run code in the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from engine.core.errors import EngineError, UsageError
from engine.core.settings import Decode

if TYPE_CHECKING:
    from engine.core.records import Header
    from engine.preprocess.codecs.decode import DecodedImage
    from engine.preprocess.resize import ResizePipeline

DECODE_TIMEOUT_S = 120  # for one request; an image of 100 megapixels takes seconds
RECYCLE_BYTES = 3 << 29  # a process with more resident memory is replaced
RECYCLE_FAILURES = 1000  # a process that has refused more images is replaced: libraries leak where they fail
RECYCLE_REQUESTS = 16  # a process is replaced only after so many requests


class CrashedError(Exception):
    """The decoder process ended before it replied."""


@dataclass(frozen=True)
class DecodeReply:
    """The outcome of n images, by their position in the request."""

    pixels: npt.NDArray[np.uint8]  # [k, 1, H, W] of the decoded images
    failed: dict[int, str]  # one line for each failed image
    flags: dict[int, list[str]]


class DecoderProcess:
    """A decoder process, started at once and restarted after a crash."""

    def __init__(self, *, size: tuple[int, int], batch_size: int, threads: int, decode: Decode) -> None:
        self.size, self.batch_size, self.crashes = size, batch_size, 0
        fast = int(decode == "fast")
        numbers = (*size, batch_size, threads, fast, DECODE_TIMEOUT_S, RECYCLE_BYTES, RECYCLE_FAILURES)
        self._arguments = [str(number) for number in numbers]
        self._start()

    def decode(self, images: Sequence[bytes], headers: Sequence[Header]) -> DecodeReply:
        """Decode 1 to `batch_size` encoded images with their headers. Raises CrashedError."""
        self.await_start()
        try:
            request = pickle.dumps(headers, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, RecursionError, AttributeError, TypeError, ValueError):
            # objects that pydicom made of a damaged file
            raise CrashedError("the header cannot be sent to the decoder process") from None
        try:
            self._connection.send_bytes(request)
            for image in images:
                self._connection.send_bytes(image)
            outcome = json.loads(self._connection.recv_bytes())
            reply = self._parse_reply(outcome, self._connection.recv_bytes(), len(images))
        except (EOFError, OSError, ValueError, KeyError):  # the process ended, or its reply is invalid
            self.crashes += 1
            reason = self._end()
            self._start()
            raise CrashedError(reason) from None
        if outcome["retire"]:
            self._end()
            self._start()
        return reply

    def _parse_reply(self, outcome: dict[str, Any], pixels: bytes, images: int) -> DecodeReply:
        failed, flags = (
            {int(key): value for key, value in outcome[name].items()} for name in ("failed", "flags")
        )
        shape = (images - len(failed), 1, *self.size)
        return DecodeReply(np.frombuffer(pixels, np.uint8).reshape(shape), failed, flags)

    def _start(self) -> None:
        parent_end, child_end = socket.socketpair()
        with child_end, open(os.devnull, "rb+") as devnull:
            self._stderr = os.memfd_create("decoder", os.MFD_CLOEXEC)
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(child_end.fileno()), *self._arguments],
                stdin=devnull,
                stdout=devnull,
                stderr=self._stderr,
                pass_fds=[child_end.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches the engine only
            )
        self._connection = Connection(parent_end.detach())
        self._ready = False

    def await_start(self) -> None:
        """Wait until the process is ready.

        Raises UsageError when a package is missing, EngineError when the process ends at three starts.
        """
        for last_try in (False, False, True):
            if self._ready:
                return
            try:
                answer = self._connection.recv_bytes().decode()
            except (EOFError, OSError):
                reason = self._end()
                self._start()
                if last_try:
                    raise EngineError(f"the decoder process does not start: {reason}") from None
                continue
            if answer != "ready":
                raise UsageError(answer)
            self._ready = True

    def _end(self) -> str:
        """Wait for the end of the process and return its cause."""
        self._connection.close()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        stderr = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace")
        os.close(self._stderr)
        if status == -signal.SIGALRM:
            return f"the decoder process was stopped after {DECODE_TIMEOUT_S} s"
        if status < 0:
            return f"the decoder process was ended by {signal.Signals(-status).name}"
        last_line = " ".join(stderr.strip().splitlines()[-1:])[:200]
        return f"the decoder process ended with status {status}: {last_line}"

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(arguments: Sequence[str]) -> None:
    """Serve requests until the engine closes its end of the socket or ends."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine ends this process
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if memory runs out, the kernel kills this process and not the engine
        Path("/proc/self/oom_score_adj").write_text("500")
    descriptor, height, width, batch_size, threads, fast, timeout_s, *retire = map(int, arguments)
    connection = Connection(descriptor)
    try:
        resize = _make_resize(height, width, batch_size, threads)
    except EngineError as error:
        connection.send_bytes(str(error).encode())
        return
    connection.send_bytes(b"ready")
    with open(os.devnull, "w") as devnull:  # the libraries write messages about single files to stderr
        os.dup2(devnull.fileno(), 2)
    with contextlib.suppress(EOFError, ConnectionError), ThreadPoolExecutor(threads) as pool:
        decode = partial(_decode_or_error, least=resize.size if fast else None)
        _serve(connection, resize, decode, pool, timeout_s, *retire)


def _make_resize(height: int, width: int, batch_size: int, threads: int) -> ResizePipeline:
    from engine.preprocess.resize import ResizePipeline

    pipeline = ResizePipeline(size=(height, width), batch_size=batch_size, threads=threads)
    pipeline.run([np.zeros((1, 1), np.uint8)])  # the first run is slow
    return pipeline


def _serve(
    connection: Connection,
    resize: ResizePipeline,
    decode: Callable[[bytes, Header], DecodedImage | str],
    pool: ThreadPoolExecutor,
    timeout_s: int,
    recycle_bytes: int,
    recycle_failures: int,
) -> None:
    """Answer requests; raises EOFError when the engine has closed its end."""
    failures = 0
    for number in range(1, sys.maxsize):
        headers: list[Header] = pickle.loads(connection.recv_bytes())
        images = [connection.recv_bytes() for _ in headers]
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # SIGALRM ends the process
        outcomes = list(pool.map(decode, images, headers))
        decoded = [image for image in outcomes if not isinstance(image, str)]
        pixels = b""
        if decoded:
            gray, margins = [image.gray for image in decoded], [image.margins for image in decoded]
            pixels = resize.run(gray, margins).tobytes()
            del gray
        signal.setitimer(signal.ITIMER_REAL, 0)
        failures += len(images) - len(decoded)
        grown = _resident_bytes() > recycle_bytes or failures > recycle_failures
        reply: dict[str, Any] = {
            "failed": {position: text for position, text in enumerate(outcomes) if isinstance(text, str)},
            "flags": {
                position: image.flags
                for position, image in enumerate(outcomes)
                if not isinstance(image, str) and image.flags
            },
            "retire": grown and number >= RECYCLE_REQUESTS,
        }
        del images, headers, outcomes, decoded
        connection.send_bytes(json.dumps(reply).encode())
        connection.send_bytes(pixels)


def _decode_or_error(image: bytes, header: Header, least: tuple[int, int] | None) -> DecodedImage | str:
    """Decode the image; return it, or the error in one line."""
    from engine.preprocess.codecs.decode import decode

    try:
        return decode(image, header, least=least)
    except ValueError as error:
        return str(error)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
