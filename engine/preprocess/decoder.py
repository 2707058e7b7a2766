"""The decoder: a process that decodes and resizes, so that a crash, a hang or a leak in it costs one image.

`Decoder` is the engine's end, `main` the process. They speak over a socket: a request is the
pickled list of the images' headers and then the images; the reply a JSON object, and the pixels of those that
decoded. The process only gets pickles, so that nothing it says can run code in the engine.
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

DECODE_TIMEOUT_S = 120  # of one request; an image of 100 megapixels takes seconds
RECYCLE_BYTES = 3 << 29  # a decoder that has grown beyond is replaced by a fresh one
RECYCLE_FAILURES = 1000  # and so is one that has refused so many images: libraries leak where they fail
RECYCLE_REQUESTS = 16  # but not before it has answered so many requests


class CrashedError(Exception):
    """The decoder died over a request."""


@dataclass(frozen=True)
class DecodeReply:
    """The outcome of n images, by their position in the request."""

    pixels: npt.NDArray[np.uint8]  # [k, 1, H, W], of those that decoded
    failed: dict[int, str]  # one line each
    flags: dict[int, list[str]]


class DecoderProcess:
    """The engine's end. The process starts at once, and anew after a crash."""

    def __init__(self, *, size: tuple[int, int], batch_size: int, threads: int, decode: Decode) -> None:
        self.size, self.batch_size, self.crashes = size, batch_size, 0
        fast = int(decode == "fast")
        numbers = (*size, batch_size, threads, fast, DECODE_TIMEOUT_S, RECYCLE_BYTES, RECYCLE_FAILURES)
        self._arguments = [str(number) for number in numbers]
        self._start()

    def decode(self, images: Sequence[bytes], headers: Sequence[Header]) -> DecodeReply:
        """Decode 1 to `batch_size` encoded images, whose headers were parsed. Raises CrashedError."""
        self.await_start()
        try:
            request = pickle.dumps(headers, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, RecursionError, AttributeError, TypeError, ValueError):
            # whatever pydicom makes of a damaged file
            raise CrashedError("its header can't be sent to the process that decodes") from None
        try:
            self._connection.send_bytes(request)
            for image in images:
                self._connection.send_bytes(image)
            said = json.loads(self._connection.recv_bytes())
            reply = self._reply(said, self._connection.recv_bytes(), len(images))
        except (EOFError, OSError, ValueError, KeyError):  # it died, or talks nonsense
            self.crashes += 1
            reason = self._end()
            self._start()
            raise CrashedError(reason) from None
        if said["retire"]:
            self._end()
            self._start()
        return reply

    def _reply(self, said: dict[str, Any], pixels: bytes, images: int) -> DecodeReply:
        failed, flags = (
            {int(key): value for key, value in said[name].items()} for name in ("failed", "flags")
        )
        shape = (images - len(failed), 1, *self.size)
        return DecodeReply(np.frombuffer(pixels, np.uint8).reshape(shape), failed, flags)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb+") as nothing:
            self._said = os.memfd_create("decoder", os.MFD_CLOEXEC)
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *self._arguments],
                stdin=nothing,
                stdout=nothing,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the engine
            )
        self._connection = Connection(ours.detach())
        self._ready = False

    def await_start(self) -> None:
        """Raises UsageError when a package is missing, EngineError when the process keeps dying."""
        for last_try in (False, False, True):
            if self._ready:
                return
            try:
                answer = self._connection.recv_bytes().decode()
            except (EOFError, OSError):
                reason = self._end()
                self._start()
                if last_try:
                    raise EngineError(f"the decoder does not start: {reason}") from None
                continue
            if answer != "ready":
                raise UsageError(answer)
            self._ready = True

    def _end(self) -> str:
        """Let the process end, and say how it did."""
        self._connection.close()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        said = os.pread(self._said, 1 << 16, 0).decode(errors="replace")
        os.close(self._said)
        if status == -signal.SIGALRM:
            return f"stopped after {DECODE_TIMEOUT_S} s"
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        return f"ended with status {status}: {' '.join(said.strip().splitlines()[-1:])[:200]}"

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(arguments: Sequence[str]) -> None:
    """Serve requests until the engine closes its end of the socket or dies."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine says when to stop
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # short of memory, this process goes and not the engine
        Path("/proc/self/oom_score_adj").write_text("500")
    descriptor, height, width, batch_size, threads, fast, timeout_s, *retire = map(int, arguments)
    connection = Connection(descriptor)
    try:
        graph = _make_resize(height, width, batch_size, threads)
    except EngineError as error:
        connection.send_bytes(str(error).encode())
        return
    connection.send_bytes(b"ready")
    with open(os.devnull, "w") as nowhere:  # the libraries' words about single files
        os.dup2(nowhere.fileno(), 2)
    with contextlib.suppress(EOFError, ConnectionError), ThreadPoolExecutor(threads) as pool:
        decoded = partial(_decode_one, least=graph.size if fast else None)
        _serve(connection, graph, decoded, pool, timeout_s, *retire)


def _make_resize(height: int, width: int, batch_size: int, threads: int) -> ResizePipeline:
    from engine.preprocess.resize import ResizePipeline

    graph = ResizePipeline(size=(height, width), batch_size=batch_size, threads=threads)
    graph.run([np.zeros((1, 1), np.uint8)])  # the first run is slow
    return graph


def _serve(
    connection: Connection,
    graph: ResizePipeline,
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
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # its signal ends the process
        found = list(pool.map(decode, images, headers))
        decoded = [image for image in found if not isinstance(image, str)]
        pixels = b""
        if decoded:
            gray, margins = [image.gray for image in decoded], [image.margins for image in decoded]
            pixels = graph.run(gray, margins).tobytes()
            del gray
        signal.setitimer(signal.ITIMER_REAL, 0)
        failures += len(images) - len(decoded)
        grown = _resident_bytes() > recycle_bytes or failures > recycle_failures
        reply: dict[str, Any] = {
            "failed": {place: text for place, text in enumerate(found) if isinstance(text, str)},
            "flags": {
                place: image.flags
                for place, image in enumerate(found)
                if not isinstance(image, str) and image.flags
            },
            "retire": grown and number >= RECYCLE_REQUESTS,
        }
        del images, headers, found, decoded
        connection.send_bytes(json.dumps(reply).encode())
        connection.send_bytes(pixels)


def _decode_one(image: bytes, header: Header, least: tuple[int, int] | None) -> DecodedImage | str:
    """Decode the image; return it, or one line that says why it failed."""
    from engine.preprocess.codecs.decode import decode

    try:
        return decode(image, header, least=least)
    except ValueError as error:
        return str(error)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
